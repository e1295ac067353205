"""Plain text of tables and lists, in lines of at most ``WIDTH`` characters."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType

WIDTH = 120


def not_judged(left_out: Sequence[str]) -> str:
    """The line that lists what the limits of backend and layer exclude."""
    return f"not judged: {'; '.join(left_out)}"


def render(renderable: RenderableType, width: int = WIDTH) -> str:
    """Plain text of a rich object, with lines broken at ``width``, by default the width of a log."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip("\n").split("\n"))


def wrapped(head: str, items: Iterable[str]) -> str:
    """``head`` and the items, separated by commas; further lines are indented."""
    lines, line = [], head
    for item in items:
        if len(line) + len(item) > WIDTH:
            lines.append(line.rstrip())
            line = "  "
        line += item + ", "
    return "\n".join([*lines, line.rstrip(", ")])
