"""What a process sees, from outside, of one that works for it: that it is stopped, or far behind its time limit.

Nothing within a process that is stopped runs any more, the time limit of a case included.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from contextlib import suppress
from multiprocessing.sharedctypes import RawArray

SECONDS_BETWEEN_LOOKS = 0.1
_LOOKS = 30  # in a row that find it stopped
_SECONDS_BEHIND = 10.0  # the last resort of a time limit within the process, which is told with a stack
_kill_group = os.killpg  # while a case is judged, ``os.killpg`` is another function


class Watch:
    """Made by the process that waits, and shared with the one that works, which notes its time limits in it."""

    def __init__(self) -> None:
        self._limit = RawArray("d", 2)  # of how many seconds; when it ends, as time.monotonic() has it, 0: none
        self._stopped = 0

    def begin(self, seconds: float, last_resort: float) -> None:
        """Note a time limit, and after how many seconds it ends the process itself."""
        self._limit[:] = seconds, time.monotonic() + last_resort

    def end(self) -> None:
        """Note that there is no time limit."""
        self._limit[1] = 0.0

    def complaint(self, process: int) -> str:
        """Why ``process``, a child of this process, is to be ended; empty if there is no reason."""
        seconds, ends = self._limit
        if ends and time.monotonic() > ends + _SECONDS_BEHIND:
            return f"the process did not answer within {seconds:g} s, nor long after that, and was ended"
        self._stopped = self._stopped + 1 if _is_stopped(process) else 0
        if self._stopped < _LOOKS:
            return ""
        return f"the process was stopped, did not answer within {_LOOKS * SECONDS_BETWEEN_LOOKS:g} s, and was ended"


def _is_stopped(process: int) -> bool:
    with suppress(ChildProcessError, AttributeError):  # macOS has no waitid before Python 3.13
        return os.waitid(os.P_PID, process, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    return False


def lead_a_group() -> None:
    """Make this process and what it starts a group, in a session without a terminal, which it can still read.

    In the terminal's own session, a group that is not in the foreground would be stopped when it reads.
    """
    with suppress(OSError):  # it leads one
        os.setsid()


def die_with_the_parent() -> None:
    """Have this process killed when the thread that has forked it ends."""
    with suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end_group(leader: int) -> None:
    """Kill what is left of the group of a process that has ended: nobody else knows what judged code has started."""
    with suppress(OSError):  # nothing is left
        _kill_group(leader, signal.SIGKILL)
