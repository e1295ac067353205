"""Tells a user's interruption from one that judged code makes up, and keeps judged code from ending the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from nsa_oracle.harness.signals import postponed

_ENDING = ("_exit", "execv", "execve")  # functions of ``os`` that end this program without any clean-up


class ProcessExit(SystemExit):
    """Judged code has called a function that would have ended the process, as ``os._exit`` does."""


class RefusedExits:
    """Calls by judged code of functions that would have ended the process. first: of these calls, or None."""

    first: ProcessExit | None = None

    def check(self) -> None:
        """Raises the first call's ProcessExit, in case judged code, or a thread of it, has swallowed it."""
        if self.first is not None:
            raise self.first


@contextmanager
def exits_refused() -> Iterator[RefusedExits]:
    """In the body ``os._exit`` and ``os.exec*`` raise ProcessExit: a verdict must not get lost with the process.

    Processes that the body forks may end as they like.
    """
    refused, process = RefusedExits(), os.getpid()

    def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*arguments: Any, **options: Any) -> NoReturn:
            if os.getpid() != process:
                function(*arguments, **options)
            said = ProcessExit(f"os.{name}({', '.join(map(repr, arguments))[:80]}), which ends the process")
            refused.first = refused.first or said
            raise said

        return refuse

    before = {name: getattr(os, name) for name in _ENDING}
    for name, function in before.items():
        setattr(os, name, guarded(name, function))
    try:
        yield refused
    finally:
        for name, function in before.items():
            setattr(os, name, function)


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
