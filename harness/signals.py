"""SIGTERM ends a run as Ctrl-C does: what was found so far is reported."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections import OrderedDict
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143  # the exit codes that shells give to a command ended by Ctrl-C and by SIGTERM
_SECONDS_LATER = 0.05
_kill = os.kill  # while a case is judged, ``os.kill`` is another function


# The collector's phases, the last one at the end. A method in C keeps the order: what a signal raises in a function of
# Python would be dropped.
_phases: OrderedDict[str, None] = OrderedDict.fromkeys(("start", "stop"))
gc.callbacks.append(_phases.move_to_end)  # type: ignore[arg-type]  # its second argument is always true


def _is_collecting() -> bool:
    return next(reversed(_phases)) == "start"


def _is_dropped(frame: FrameType | None) -> bool:
    """Whether what is raised at ``frame`` gets lost: in another callback of the collector, or in a finaliser."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None and frame.f_code not in callbacks and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def postponed(number: int, frame: FrameType | None) -> bool:
    """Whether a signal has arrived while garbage is collected, or in a finaliser; it is then sent again soon.

    Python prints and drops what callbacks raise then. Hypothesis, torch and the harness have some.
    """
    if not _is_collecting() and not _is_dropped(frame):
        return False
    timer = threading.Timer(_SECONDS_LATER, _kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
    return True


class Termination:
    """From its creation until ``close``, the first SIGTERM raises KeyboardInterrupt; later ones are ignored.

    ``timeout`` sends two, and the second would interrupt the clean-up after the first. Outside the main thread, where
    Python handles no signals, nothing happens. arrived: whether SIGTERM has arrived.
    """

    def __init__(self) -> None:
        self.arrived = False
        self._is_main = threading.current_thread() is threading.main_thread()
        self._before = signal.signal(signal.SIGTERM, self.interrupt) if self._is_main else None

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if postponed(number, frame):
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.arrived = True
        raise KeyboardInterrupt

    def close(self) -> None:
        """Handle SIGTERM as before."""
        if self._is_main:
            signal.signal(signal.SIGTERM, self._before)

    @property
    def exit_code(self) -> int:
        """That of a run which was interrupted."""
        return TERMINATED if self.arrived else INTERRUPTED
