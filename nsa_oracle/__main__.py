"""The command ``nsa-oracle``; also ``python -m nsa_oracle``."""

from __future__ import annotations

import sys

from nsa_oracle.starting import ended_in_one_line, open_files_told


def main() -> None:
    """Run the command line. A signal while torch is imported, a second or two, ends it without a traceback."""
    with open_files_told(_unusable):
        with ended_in_one_line():
            from nsa_oracle.harness.__main__ import main as run
        run()


def _unusable(message: str) -> SystemExit:
    sys.stderr.write(f"error: {message}\n")
    return SystemExit(2)


if __name__ == "__main__":
    main()
