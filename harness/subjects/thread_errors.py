"""Exceptions in threads that judged code has started: Python prints and drops them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from nsa_oracle.harness.errors import error_line
from nsa_oracle.harness.graphs.callers import judged_frames


@contextmanager
def thread_errors_noted() -> Iterator[dict[str, int]]:
    """Yields counts of the exceptions that end threads in the body, by a line that names the place.

    Those that have passed no judged code are left to what handled them before.
    """
    noted: dict[str, int] = {}
    before = threading.excepthook

    def note(ended: threading.ExceptHookArgs) -> None:
        frames = judged_frames(ended.exc_traceback)
        if ended.exc_value is None or not frames:
            before(ended)
            return
        place = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}"
        line = f"{ended.exc_type.__name__} at {place}: {error_line(ended.exc_value)}"
        noted[line] = noted.get(line, 0) + 1

    threading.excepthook = note
    try:
        yield noted
    finally:
        if threading.excepthook is note:
            threading.excepthook = before
