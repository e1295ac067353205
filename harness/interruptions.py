"""Tells a user's interruption from one that judged code makes up, and keeps judged code from ending the process."""

from __future__ import annotations

import _thread
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from nsa_oracle.harness.signals import postponed

_ASKING = (signal.SIGINT, signal.SIGTERM)  # what others send to a process that is to end


def _asks_itself(process: int, number: int) -> bool:
    return process in (0, os.getpid()) and number in _ASKING


def _asks_its_group(group: int, number: int) -> bool:
    return group in (0, os.getpgrp()) and number in _ASKING


def _is_asking(number: int = signal.SIGINT) -> bool:
    return number in _ASKING


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
}


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
    """In the body ``os._exit``, ``os.exec*`` and signals to itself raise ProcessExit, and so does ``os.closerange``.

    A verdict must not get lost with the process. Processes that the body forks may end as they like.
    """
    refused, process = RefusedExits(), os.getpid()

    def guarded(name: str, function: Callable[..., Any], ends: Callable[..., bool]) -> Callable[..., Any]:
        def refuse(*arguments: Any, **options: Any) -> Any:
            if os.getpid() != process or not ends(*arguments, **options):
                return function(*arguments, **options)
            shown = ", ".join("os.getpid()" if one == process else repr(one) for one in arguments)[:80]
            effect = "closes files of the process" if name.endswith("closerange") else "ends the process"
            said = ProcessExit(f"{name}({shown}), which {effect}")
            refused.first = refused.first or said
            raise said

        return refuse

    before = {(module, name): getattr(module, name) for module, name in _ENDING}
    for (module, name), function in before.items():
        setattr(module, name, guarded(f"{module.__name__}.{name}", function, _ENDING[module, name]))
    try:
        yield refused
    finally:
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
