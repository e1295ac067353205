"""Progress bars and signals of commands that take long."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_of(what: str, count: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on stderr, if that is a terminal. Yields a function that sets how many are done."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=count)
        yield lambda done: progress.update(task, completed=done)


INTERRUPTED = 130  # the exit code that shells give to a command ended by Ctrl-C


@contextmanager
def ended_by_a_signal() -> Iterator[None]:
    """The first SIGTERM raises KeyboardInterrupt, as Ctrl-C does. Later ones are ignored until the context ends.

    ``timeout`` sends two, and the second would interrupt the clean-up after the first.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
