"""Says during a run how far it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from nsa_oracle.harness.search.progress import Count, counts_in, progress_line, shrinking_lines

LOOK, LATER, IN_A_LOG = 3.0, 10.0, 60.0  # seconds between looks, and between lines on a terminal and in a log


class Lines:
    """What to say of the counts of a run, and when. begun: value of ``time.monotonic()``."""

    def __init__(self, begun: float) -> None:
        self._begun = begun
        self._first = begun  # when cases began to be judged: other tests may come first
        self._judged = -1
        self._due = begun
        self._shrinking: set[tuple[int, str]] = set()

    def of(self, counts: Sequence[Count], now: float, between: float) -> list[str]:
        """Lines if more has been judged or if a case is made smaller, at most once in ``between`` seconds.

        At once when the shrinking of a case has begun: nothing else may be told for minutes.
        """
        judged = sum(count.cases + bool(count.saved) for count in counts)
        self._first = self._first if judged else now
        shrinking = {(count.process, count.saved) for count in counts if count.is_shrinking(now)}
        if shrinking <= self._shrinking and (now < self._due or (judged == self._judged and not shrinking)):
            return []
        self._judged, self._due = judged, now + between
        self._shrinking |= shrinking
        return [progress_line(counts, now - self._begun, now - self._first), *shrinking_lines(counts, now)]


class Live:
    """Prints a line now and then, from ``start`` to ``close``, as the counts in ``folder`` change."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, unless something has begun before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="oracle's progress", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Print nothing more."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        lines = Lines(time.monotonic())
        while terminal is not None and not self._end.wait(LOOK):
            counts = counts_in(self._folder)
            for line in lines.of(counts, time.monotonic(), LATER if terminal.isatty else IN_A_LOG):
                terminal.ensure_newline()
                terminal.write_line(line, red=any(count.saved for count in counts))
