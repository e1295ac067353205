"""Tells a user's interruption from one that judged code makes up, and keeps judged code from ending the process."""

from __future__ import annotations

import _thread
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from nsa_oracle.harness.graphs.callers import is_judged_code, judged_stack
from nsa_oracle.harness.signals import postponed
from nsa_oracle.harness.watching import die_with_the_parent

_SECONDS_TO_COME_BACK = 1.0  # of a fork, behind the call that made it; one that works on is waited for once
_SECONDS_FOR_ANOTHER = 0.02  # where one has not come back; later looks find it all the same
_end_process = os._exit  # while a case is judged, ``os._exit`` is another function

_DEPTH = 1000  # calls within calls that Python allows by default, which harness and torch may need
_STOPPING = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)  # until another process has it go on
_ASKING = (signal.SIGINT, signal.SIGTERM, *_STOPPING)  # what others send to a process that is to end, or to stop


def _asks_itself(process: int, number: int) -> bool:
    return process in (0, os.getpid()) and number in _ASKING


def _asks_its_group(group: int, number: int) -> bool:
    return group in (0, os.getpgrp()) and number in _ASKING


def _is_asking(number: int = signal.SIGINT) -> bool:
    return number in _ASKING


def _is_too_low(limit: int) -> bool:
    return limit < min(_DEPTH, sys.getrecursionlimit())  # behind that the harness itself could not go on


def _always(*arguments: Any) -> bool:
    return True


_ENDING: dict[tuple[Any, str], Callable[..., bool]] = {  # functions, and with which arguments they end this program
    (os, "_exit"): _always,
    (os, "execv"): _always,
    (os, "execve"): _always,
    (os, "kill"): _asks_itself,
    (os, "killpg"): _asks_its_group,
    (os, "closerange"): _always,  # the pipe to the parent, at the latest when it is to answer
    (signal, "raise_signal"): _is_asking,
    (_thread, "interrupt_main"): _is_asking,
    (sys, "setrecursionlimit"): _is_too_low,
}


class ProcessExit(SystemExit):
    """Judged code has called a function that would have ended the process, as ``os._exit`` does."""


class ForkReturned(ProcessExit):
    """Judged code has called ``os.fork`` and returned in both processes. stack: of the call, outermost frame first."""

    def __init__(self, stack: tuple[traceback.FrameSummary, ...]) -> None:
        super().__init__("os.fork(), and its child returned, too")
        self.stack = stack


class _Fork:
    """A fork of judged code. Its end of a pipe closes when it ends or becomes another program."""

    def __init__(self, process: int, pipe: int, stack: tuple[traceback.FrameSummary, ...]) -> None:
        self.error = ForkReturned(stack)
        self.is_settled = False
        self._process = process
        self._pipe = pipe
        self._has_been_waited_for = False

    def has_returned(self, patience: float) -> bool:
        """Whether it was about to leave judged code, and has ended for that. It is waited for once."""
        seconds = 0.0 if self._has_been_waited_for else patience
        self._has_been_waited_for = True
        if self.is_settled or not select.select([self._pipe], [], [], seconds)[0]:
            return False
        returned = bool(os.read(self._pipe, 1))
        self.close()
        if returned:
            with suppress(ChildProcessError):
                os.waitpid(self._process, 0)
        return returned

    def close(self) -> None:
        if not self.is_settled:
            os.close(self._pipe)
        self.is_settled = True


class RefusedExits:
    """Calls by judged code of functions that would have ended the process, and of ``os.fork``.

    first: of the calls that would have ended it, or of the forks that returned from judged code; None if there is none.
    """

    first: ProcessExit | None = None

    def __init__(self) -> None:
        self.forks: list[_Fork] = []
        self._patience = _SECONDS_TO_COME_BACK

    def check_forks(self) -> None:
        """Raises ForkReturned if a fork has returned from judged code, at the first look behind that."""
        for fork in self.forks:
            if fork.has_returned(self._patience):
                self.first = self.first or fork.error
                raise fork.error
            if not fork.is_settled:  # a backend that starts a worker in each call would use up the time of its case
                self._patience = _SECONDS_FOR_ANOTHER
        self.forks = [fork for fork in self.forks if not fork.is_settled]

    def check(self) -> None:
        """Raises the first call's ProcessExit, in case judged code, or a thread of it, has swallowed it."""
        self.check_forks()
        if self.first is not None:
            raise self.first


def _ends_behind(outermost: FrameType, pipe: int) -> Callable[[FrameType, str, Any], None]:
    """A profile function that ends the process when ``outermost`` is left, and says so in ``pipe``."""

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if frame is outermost and event == "return":
            with suppress(OSError):  # nobody waits for it any more
                os.write(pipe, b"1")
            _end_process(0)

    return profile


@contextmanager
def exits_refused() -> Iterator[RefusedExits]:
    """In the body ``os._exit``, ``os.exec*`` and signals to itself raise ProcessExit, and so does ``os.closerange``.

    So does ``sys.setrecursionlimit`` with a limit below Python's own: a higher one is the judged code's to choose.
    A verdict must not get lost with the process. Processes that the body forks may end as they like, but must not leave
    judged code: there would be two verdicts. They are ended there.
    """
    refused, process, body = RefusedExits(), os.getpid(), sys._getframe(2)  # behind contextlib's

    def guarded(name: str, function: Callable[..., Any], ends: Callable[..., bool]) -> Callable[..., Any]:
        def refuse(*arguments: Any, **options: Any) -> Any:
            if os.getpid() != process or not ends(*arguments, **options):
                return function(*arguments, **options)
            shown = ", ".join("os.getpid()" if one == process else repr(one) for one in arguments)[:80]
            effect = "stops the process" if any(one in _STOPPING for one in arguments) else "ends the process"
            effect = "closes files of the process" if name.endswith("closerange") else effect
            effect = "leaves the process too little stack" if name.endswith("recursionlimit") else effect
            said = ProcessExit(f"{name}({shown}), which {effect}")
            refused.first = refused.first or said
            raise said

        return refuse

    original_fork = os.fork

    def fork() -> int:
        running = judged_stack(sys._getframe(1), body)
        if os.getpid() != process or not running or not is_judged_code(sys._getframe(1).f_code.co_filename):
            return original_fork()  # those of the standard library do not return
        stack = tuple(traceback.StackSummary.extract((frame, frame.f_lineno) for frame in running))
        receiver, sender = os.pipe()
        child = original_fork()
        if child == 0:
            os.close(receiver)
            if threading.current_thread() is threading.main_thread():  # which ends last
                die_with_the_parent()
            sys.setprofile(_ends_behind(running[0], sender))
        else:
            os.close(sender)
            refused.forks.append(_Fork(child, receiver, stack))
        return child

    before = {(module, name): getattr(module, name) for module, name in _ENDING}
    os.fork = fork
    for (module, name), function in before.items():
        setattr(module, name, guarded(f"{module.__name__}.{name}", function, _ENDING[module, name]))
    try:
        yield refused
    finally:
        if os.getpid() != process:  # a fork that native code has made
            _end_process(0)
        os.fork = original_fork
        for one in refused.forks:
            one.close()
        for (module, name), function in before.items():
            setattr(module, name, function)


class Interruptions:
    """Signals that asked this process to stop. received: whether there was one."""

    received = False

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was one, in case judged code has swallowed it."""
        if self.received:
            raise KeyboardInterrupt


@contextmanager
def interruptions_noted() -> Iterator[Interruptions]:
    """Notes SIGINT and SIGTERM that have a handler in Python, which is then called as it would be without this.

    Outside the main thread, which alone handles signals, nothing is noted.
    """
    noted = Interruptions()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def noting(handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            noted.received = True
            if not postponed(number, frame):
                handler(number, frame)

        return handle

    before: dict[signal.Signals, Callable[[int, FrameType | None], Any]] = {}
    ours: dict[signal.Signals, Callable[[int, FrameType | None], None]] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if callable(handler):
            before[number], ours[number] = handler, noting(handler)
            signal.signal(number, ours[number])
    try:
        yield noted
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is ours[number]:  # the handler itself may have set another
                signal.signal(number, handler)
