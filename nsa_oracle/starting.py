"""What a signal does while a process starts, which takes seconds: importing torch, building a backend.

Also what is said where a process may open no more files.

Imports neither torch nor pytest, because it is needed before them.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

_end_process = os._exit  # while a backend is loaded, ``os._exit`` is another function
MESSAGE = "interrupted before anything was judged\n"
CASE_SECONDS = 600.0  # that a case may take, unless an option says otherwise
# Of a case, in seconds: a shorter limit ends none of the harness's own steps, timers cannot be longer.
SHORTEST_LIMIT, LONGEST_LIMIT = 0.1, 1e6
FILES_OF_PYTEST, FILES_OF_THE_HARNESS = 8, 4  # that each opens at the least while it starts
LIMITS = f"from {SHORTEST_LIMIT:g} to {LONGEST_LIMIT:,.0f} seconds (0: no limit)"


def lacks_files(error: BaseException) -> bool:
    """Whether ``error`` says that this process may open no more files."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return True
    return isinstance(error, ImportError) and os.strerror(errno.EMFILE) in str(error)  # of a shared library


@contextmanager
def open_files_told(refusal: Callable[[str], BaseException]) -> Iterator[None]:
    """In the body an error of too many open files becomes what ``refusal`` makes of a line that says what to do."""
    try:
        yield
    except (OSError, ImportError) as error:
        if not lacks_files(error):
            raise
        raise refusal(too_many_open_files()) from None


def too_many_open_files() -> str:
    """The line that says so, and what to do."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"too many open files: this process may have {most}; raise that, as by ulimit -n 1024"


def check_open_files(files: int, refusal: Callable[[str], BaseException]) -> None:
    """Raise what ``refusal`` makes of that line if this process may not open so many ``files`` more.

    For the start of a run: what others open meanwhile, as pytest does, would fail without that line.
    """
    opened: list[int] = []
    try:
        with open_files_told(refusal):
            for _ in range(files):
                opened.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _is_default(number: signal.Signals) -> bool:
    return signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


@contextmanager
def ended_in_one_line(quiet: bool = False, leftover: Path | None = None) -> Iterator[None]:
    """In the body SIGINT and SIGTERM end the process with a line on stderr and the exit code that shells expect.

    An exception would not do: it would be printed with its traceback, or swallowed by what is being imported. Signals
    that someone else handles are left alone, as they are behind ``nohup``.

    quiet: without the line, in a process whose parent says it. leftover: a folder to remove then.
    """
    process = os.getpid()

    def end(number: int, frame: FrameType | None = None) -> NoReturn:
        if os.getpid() == process:
            if not quiet:
                os.write(2, MESSAGE.encode())
            if multiprocessing := sys.modules.get("multiprocessing"):
                for child in multiprocessing.active_children():  # it would notice only once it has started itself
                    child.kill()
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)
        _end_process(128 + number)

    is_main = threading.current_thread() is threading.main_thread()
    handled = [number for number in (signal.SIGINT, signal.SIGTERM) if is_main and _is_default(number)]
    before = {number: signal.signal(number, end) for number in handled}
    try:
        yield
    except KeyboardInterrupt:  # raised by what is being imported itself
        end(signal.SIGINT)
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is end:
                signal.signal(number, handler)


@contextmanager
def interruption_deferred() -> Iterator[None]:
    """In the body the first Ctrl-C is only noted, and handled at its end, as it would be without this.

    What is being imported may swallow a KeyboardInterrupt, or make another error of it: numpy cannot be imported again
    once its import was interrupted. A second Ctrl-C is handled at once. Outside the main thread, or where a Ctrl-C is
    no KeyboardInterrupt, nothing is deferred.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    has_arrived = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal has_arrived
        has_arrived = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if has_arrived:  # whatever the body raises
            raise KeyboardInterrupt
