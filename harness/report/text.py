"""Plain text of tables and lists, in lines as wide as the terminal, and of at most ``WIDTH`` characters.

Cells of tables are broken on a terminal alone: what reads a pipe or a file looks for whole lines.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType

WIDTH = 120  # of a log, and of a wide terminal
UNBROKEN = 10_000  # columns; wider than any row of a table


def text_width() -> int:
    """The width of the terminal, or of a log."""
    return max(40, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def _is_on_a_terminal() -> bool:
    try:
        return sys.__stdout__ is not None and os.isatty(sys.__stdout__.fileno())
    except (OSError, ValueError):  # it is closed
        return False


def not_judged(left_out: Sequence[str]) -> str:
    """The line that lists what the limits of backend and layer exclude."""
    return f"not judged: {'; '.join(left_out)}"


def render(renderable: RenderableType, width: int | None = None) -> str:
    """Plain text of a rich object, with lines broken at ``width``: by default that of the terminal, if there is one."""
    width = width or (text_width() if _is_on_a_terminal() else UNBROKEN)
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip("\n").split("\n"))


def wrapped(head: str, items: Iterable[str]) -> str:
    """``head`` and the items, separated by commas; further lines are indented."""
    lines, line, width = [], head, text_width()
    for item in items:
        if len(line) + len(item) > width:
            lines.append(line.rstrip())
            line = "  "
        line += item + ", "
    return "\n".join([*lines, line.rstrip(", ")])
