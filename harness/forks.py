"""Work in a fork of this process: what judged code does to the fork does not concern this process.

A fork has everything imported, and costs milliseconds. It can read from the terminal, so that debuggers work in it.
What it has started ends with it.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, NoReturn, TypeVar

from nsa_oracle.harness.processes import (
    SECONDS_TO_END,
    ChildDied,
    death_of,
    last_words_in,
    write_last_words_to,
)
from nsa_oracle.harness.signals import Termination
from nsa_oracle.harness.watching import (
    SECONDS_BETWEEN_LOOKS,
    Watch,
    die_with_the_parent,
    end_group,
    lead_a_group,
    watched_by,
)

_T = TypeVar("_T")
_SECONDS_TO_KILL = 4.0  # judged code may swallow any exception
_end_process = os._exit  # while a case is judged, ``os._exit`` is another function

Tell = Callable[[object], None]
"""Passes a message to the process that waits for a fork."""


def forked(work: Callable[[Tell], _T], hear: Callable[[Any], None] | None = None, timeout: float | None = None) -> _T:
    """Call ``work`` in a fork of this process and return its result. This process must not have used CUDA.

    hear: is called in this process with each message of ``work``. Raises what ``work`` raises, and ChildDied if the
    fork ends without a result, takes longer than ``timeout`` seconds, is stopped, or outlives the time limit of a case.
    Signals that ask this process to stop are for the fork.
    """
    fork, pipe = _Fork.start(work)
    ends = math.inf if timeout is None else time.monotonic() + timeout
    failed: BaseException | None = None
    complaint = ""
    with pipe, fork.signals():
        while time.monotonic() < ends and failed is None and not complaint:
            has_ended = fork.has_ended()  # first: what it said before is then in the pipe
            complaint = fork.complaint()
            # What it has started can keep the pipe open when it has ended.
            while pipe.poll(0 if has_ended else SECONDS_BETWEEN_LOOKS):
                try:
                    is_result, answer, error = pipe.recv()
                except EOFError:
                    break
                if is_result:
                    fork.end(SECONDS_TO_END)
                    if error is None:
                        result: _T = answer
                        return result
                    failed = error
                    break
                if hear is not None:
                    hear(answer)
            if has_ended:
                break
    if failed is not None:
        if isinstance(failed, KeyboardInterrupt):
            _raise_interruption(fork)
        raise failed
    if not fork.has_ended():
        fork.end()
        _raise_interruption(fork)
        raise ChildDied(complaint or f"it took longer than {timeout:.0f} s and was ended", hung=bool(complaint))
    _raise_interruption(fork)
    raise death_of(fork.code, last_words_in(fork.words), fork.watch)


def _raise_interruption(fork: _Fork) -> None:
    """Act on a signal that asked this process to stop."""
    if fork.terminated:
        signal.raise_signal(signal.SIGTERM)  # raises KeyboardInterrupt, or ends this process
    if fork.interrupts:
        raise KeyboardInterrupt


class _Fork:
    """A fork that works, as its parent sees it.

    interrupts: how often a user has pressed Ctrl-C. terminated: whether the parent was told to end, by SIGTERM. What
    does not end then is killed. words: a pipe of what a time limit or a fault says that ends it. watch: what it notes.
    code: as ``multiprocessing`` gives it, once the fork has ended.
    """

    def __init__(self, process: int, words: Connection, watch: Watch) -> None:
        self.interrupts = 0
        self.terminated = False
        self._process = process
        self.words = words
        self.watch = watch
        self.code: int | None = None
        self._kill_at = math.inf

    @staticmethod
    def start(work: Callable[[Tell], Any]) -> tuple[_Fork, Connection]:
        """The fork that does ``work``, and the pipe that its messages come from."""
        _flush()  # otherwise the fork would print it again
        receiver, sender = multiprocessing.Pipe(duplex=False)
        words, words_sender = multiprocessing.Pipe(duplex=False)
        watch = Watch()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: numpy has idle ones
            process = os.fork()
        if process == 0:
            lead_a_group()
            receiver.close()
            write_last_words_to(words_sender)
            watched_by(watch)
            _carry_out(work, sender)
        sender.close()
        words_sender.close()
        return _Fork(process, words, watch), receiver

    def has_ended(self) -> bool:
        if time.monotonic() > self._kill_at:
            self._send(signal.SIGKILL)
        if self.code is None:
            ended, status = os.waitpid(self._process, os.WNOHANG)
            if ended:
                self.code = os.waitstatus_to_exitcode(status)
                end_group(self._process)
        return self.code is not None

    def complaint(self) -> str:
        """Why the fork is to be ended; empty if there is no reason."""
        return self.watch.complaint(self._process) if self.code is None else ""

    def end(self, seconds: float = 0) -> None:
        """Kill the fork unless it ends within ``seconds``."""
        ends = time.monotonic() + seconds
        while not self.has_ended():
            if time.monotonic() > ends:
                self._send(signal.SIGKILL)
            time.sleep(0.002)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """In the body, signals that ask this process to stop are passed on. Only a main thread gets any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(number: int, frame: FrameType | None) -> None:
            self.interrupts += 1
            self._send(signal.SIGINT)  # the terminal does not, because it is in another session
            self._kill_at = min(self._kill_at, time.monotonic() + _SECONDS_TO_KILL / self.interrupts)

        def terminate(number: int, frame: FrameType | None) -> None:
            self.terminated = True
            owner = getattr(before[signal.SIGTERM], "__self__", None)
            if isinstance(owner, Termination):
                owner.arrived = True
            self._kill_at = min(self._kill_at, time.monotonic() + _SECONDS_TO_KILL)
            self._send(signal.SIGTERM)

        handlers = {signal.SIGINT: interrupt, signal.SIGTERM: terminate}
        before = {
            number: signal.signal(number, handler)
            for number, handler in handlers.items()
            if signal.getsignal(number) is not signal.SIG_IGN  # as it is behind nohup
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _send(self, number: signal.Signals) -> None:
        if self.code is None:
            with suppress(ProcessLookupError):
                os.kill(self._process, number)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # there is none, nobody reads it, or it is closed
            stream.flush()


def _carry_out(work: Callable[[Tell], Any], sender: Connection) -> NoReturn:
    """Do ``work`` in the fork, send its result, and end the fork."""
    code = 1
    try:
        die_with_the_parent()  # should that be killed
        atexit._clear()  # what this process registered before is for the parent to do
        answer: Any = None
        error: BaseException | None = None
        try:
            answer = work(lambda message: sender.send((False, message, None)))
        except (Exception, KeyboardInterrupt) as raised:
            raised.add_note("".join(traceback.format_tb(raised.__traceback__)))  # which pickling would lose
            error = raised
        _flush()
        sender.send((True, answer, error))
        atexit._run_exitfuncs()  # last: they may be those of judged code
        code = 0
    finally:
        _end_process(code)
