"""What a process sees, from outside, of one that works for it: that it is stopped, or far behind its time limit.

Nothing within a process that is stopped runs any more, the time limit of a case included. Of one that has been killed
nothing is left but what it has noted before: which method of judged code it was about to call.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.sharedctypes import RawArray
from typing import ParamSpec, TypeVar

import torch

from nsa_oracle.harness.graphs.callers import definition_of

_P = ParamSpec("_P")
_T = TypeVar("_T")
SECONDS_BETWEEN_LOOKS = 0.1
_LOOKS = 30  # in a row that find it stopped
_SECONDS_BEHIND = 10.0  # the last resort of a time limit within the process, which is told with a stack
_kill_group = os.killpg  # while a case is judged, ``os.killpg`` is another function


_MOST_BYTES = 500  # of what is noted about a call


class Watch:
    """Made by the process that waits, and shared with the one that works, which notes its time limits in it.

    It also notes what judged code it calls.
    """

    def __init__(self) -> None:
        self._limit = RawArray("d", 2)  # of how many seconds; when it ends, as time.monotonic() has it, 0: none
        self._called = RawArray("c", _MOST_BYTES + 1)
        self._stopped = 0

    @property
    def called(self) -> str:
        """The judged code that is being called, as FILE:LINE in NAME; "" if none is known to be."""
        what: bytes = self._called.value
        return what.decode(errors="replace")

    @called.setter
    def called(self, what: str) -> None:
        self._called.value = what.encode(errors="replace")[:_MOST_BYTES]

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
            return f"the process did not answer within {seconds:g} s, nor long after that, and was ended{self.during()}"
        self._stopped = self._stopped + 1 if _is_stopped(process) else 0
        if self._stopped < _LOOKS:
            return ""
        patience = f"{_LOOKS * SECONDS_BETWEEN_LOOKS:g} s"
        return f"the process was stopped, did not answer within {patience}, and was ended{self.during()}"

    def during(self) -> str:
        """A clause that names the judged code that was being called; "" if none is known to be."""
        return f" during the call of {self.called}" if self.called else ""


_watch = Watch()


def watched_by(watch: Watch) -> None:
    """What this process does is noted in ``watch``, which the process has made that waits for it."""
    global _watch
    _watch = watch


def watch_of_this_process() -> Watch:
    """Where this process notes what it does."""
    return _watch


def noted(method: Callable[_P, _T], judged: object = None) -> Callable[_P, _T]:
    """``method``, noted as what is being called while it runs. judged: the judged method in it, if it is wrapped.

    If it has denormals flushed to zero, that ends with it: the reference would lose its own.
    """

    def call(*arguments: _P.args, **options: _P.kwargs) -> _T:
        try:
            with noted_as(definition_of(judged or method)):
                return method(*arguments, **options)
        finally:
            torch.set_flush_denormal(False)

    return call


@contextmanager
def noted_as(what: str) -> Iterator[None]:
    """Note, while the body runs, that judged code is called, as FILE:LINE in NAME. "": leave what is noted."""
    watch, before = _watch, _watch.called
    watch.called = what or before
    try:
        yield
    finally:
        watch.called = before


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
