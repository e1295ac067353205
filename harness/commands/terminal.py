"""Progress bars and signals of commands that take long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nsa_oracle.harness.signals import Termination


@contextmanager
def progress_of(what: str, count: int) -> Iterator[Callable[[int, str], None]]:
    """Shows a progress bar on stderr, if that is a terminal.

    Yields a function that sets how many are done, and what is shown instead of ``what``, if it is not empty.
    """
    times = TimeElapsedColumn(), TimeRemainingColumn()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=count)
        yield lambda done, doing: progress.update(task, completed=done, description=escape(doing or what))


@contextmanager
def ended_by_a_signal() -> Iterator[Termination]:
    """The first SIGTERM raises KeyboardInterrupt, as Ctrl-C does; later ones are ignored until the context ends."""
    termination = Termination()
    try:
        yield termination
    finally:
        termination.close()
