"""What child processes print, as a test's own output."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path


class Output:
    """A file that children print to. ``show`` prints what is new in it, so that pytest captures it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._shown = 0

    def show(self) -> None:
        """Print what children have printed since the last time."""
        with suppress(OSError), self.file.open(encoding="utf-8", errors="replace") as file:
            file.seek(self._shown)
            sys.stdout.write(file.read())
            self._shown = file.tell()
