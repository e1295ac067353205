"""The command ``nsa-oracle``; also ``python -m nsa_oracle``, and in a checkout ``python -m harness``."""

from __future__ import annotations

import sys

from nsa_oracle.harness.commands import (  # each adds some
    bugs,
    cases,
    exploring,
    importing,
    mutants,
    replaying,
    reporting,
    surveys,
    upstream,
)
from nsa_oracle.harness.commands.app import app

__all__ = [
    "app",
    "bugs",
    "cases",
    "exploring",
    "importing",
    "main",
    "mutants",
    "replaying",
    "reporting",
    "surveys",
    "upstream",
]


def main() -> None:
    """Run the command line. Backends and layers are imported from the current folder too, as with ``python -m``."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    app()


if __name__ == "__main__":
    main()
