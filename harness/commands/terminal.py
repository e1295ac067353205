"""How far a long command is, on a terminal."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_of(what: str, count: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of ``count`` are done, on a terminal's stderr; the function that is given tells it."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=count)
        yield lambda done: progress.update(task, completed=done)


INTERRUPTED = 130  # exit code, as a shell has it of what Ctrl-C ends


@contextmanager
def ended_by_a_signal() -> Iterator[None]:
    """Let the first SIGTERM do what Ctrl-C does: raise KeyboardInterrupt. Others do nothing until the context ends.

    ``timeout`` sends two, and the second would hit whatever cleans up after the first.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
