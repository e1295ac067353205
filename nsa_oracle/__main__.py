"""The command ``nsa-oracle``; also ``python -m nsa_oracle``."""

from __future__ import annotations

import sys

INTERRUPTED = 130  # as in harness/signals.py, which is not imported yet


def main() -> None:
    """Run the command line. Ctrl-C while torch is imported, a second or two, ends it without a traceback."""
    try:
        from nsa_oracle.harness.__main__ import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted before anything was judged\n")
        raise SystemExit(INTERRUPTED) from None
    run()


if __name__ == "__main__":
    main()
