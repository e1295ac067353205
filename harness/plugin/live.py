"""Says during a run how far it is."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from nsa_oracle.harness.search.progress import counts_in, progress_line

FIRST, LATER, IN_A_LOG = 3.0, 10.0, 60.0  # seconds until the first line, and between lines on a terminal and in a log


class Live:
    """Prints a line now and then, from ``start`` to ``close``, as long as the counts in ``folder`` change."""

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
        began, before = time.monotonic(), -1
        first = began  # when cases began to be judged: other tests may come first
        wait = FIRST
        while terminal is not None and not self._end.wait(wait):
            counts = counts_in(self._folder)
            judged = sum(count.cases + bool(count.saved) for count in counts)
            now = time.monotonic()
            first = first if judged else now
            if judged > before:
                before = judged
                terminal.ensure_newline()
                line = progress_line(counts, now - began, now - first)
                terminal.write_line(line, red=any(count.saved for count in counts))
                wait = LATER if terminal.isatty else IN_A_LOG
