"""The command ``nsa-oracle``; also ``python -m nsa_oracle``."""

from __future__ import annotations

from nsa_oracle.starting import ended_in_one_line


def main() -> None:
    """Run the command line. A signal while torch is imported, a second or two, ends it without a traceback."""
    with ended_in_one_line():
        from nsa_oracle.harness.__main__ import main as run
    run()


if __name__ == "__main__":
    main()
