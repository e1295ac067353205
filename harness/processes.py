"""Child processes that run cases and may die: a kernel that faults leaves the GPU unusable for its process.

Functions called in a child, their arguments and their results are pickled. After a child has died, or has taken too
long, the next call starts a new one. What a child has started ends with it.
"""

from __future__ import annotations

import faulthandler
import functools
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from nsa_oracle.harness.compiled import launcher
from nsa_oracle.harness.errors import CaseTimeout
from nsa_oracle.harness.graphs.callers import is_harness, is_judged_code, judged_stack
from nsa_oracle.harness.interpreter import bounds, promises
from nsa_oracle.harness.interpreter.masks import accept_integer_masks
from nsa_oracle.harness.interpreter.speed import speed_up
from nsa_oracle.harness.signals import INTERRUPTED
from nsa_oracle.harness.watching import (
    SECONDS_BETWEEN_LOOKS,
    Watch,
    end_group,
    lead_a_group,
    watch_of_this_process,
    watched_by,
)

_T = TypeVar("_T")
SECONDS_TO_END = 3
_FAULT = "Fatal Python error: "  # as faulthandler says it
_FRAME = re.compile(r'File "(.*)", line (\d+) in (.*)')
_end_process = os._exit  # while a case is judged, ``os._exit`` is another function


class ChildDied(Exception):
    """A process ended, or was killed, before it returned a result. The message is one line that says how.

    process: its number, if it ended by itself. hung: whether it was ended by the time limit of a case, which nothing
    could interrupt.
    """

    def __init__(self, message: str, process: int | None = None, hung: bool = False) -> None:
        super().__init__(message)
        self.process = process
        self.hung = hung


def how_it_ended(code: int | None) -> str:
    """An exit code as ``multiprocessing`` gives it, in words: negative for a signal."""
    if code is None or code >= 0:
        return f"exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"signal {names.get(-code, -code)}"


def death_of(code: int | None, words: str, watch: Watch, process: int | None = None) -> ChildDied:
    """The error for a process that ended with ``code``. words: what it wrote to ``write_last_words_to``."""
    if not words:
        return ChildDied(f"the process ended ({how_it_ended(code)}){watch.during()}", process)
    stacks = _judged_stacks(words)
    at = next((f" at {file}:{line} in {name}" for _, frames in stacks for file, line, name in frames), "")
    said = [line for line in words.splitlines() if line.startswith((_FAULT, "Timeout", "ORACLE FAILURE"))]
    for heading, frames in stacks:
        said += [heading, *(f'  File "{file}", line {line} in {name}' for file, line, name in frames)]
    sys.stderr.write("".join(f"{line}\n" for line in said))
    if any(line.startswith(_FAULT) for line in said):
        return ChildDied(f"the process ended ({how_it_ended(code)}){at or watch.during()}", process)
    return ChildDied(f"the process was still running{at} long after the time limit, and was ended", process, hung=True)


def _judged_stacks(words: str) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """The heading and the frames of judged code of each thread in ``words``, innermost first.

    The current thread comes first. What has called the harness is not judged. A thread without such frames is left out.
    """
    found = []
    for part in words.split("\n\n"):
        frames: list[tuple[str, str, str]] = _FRAME.findall(part)
        ends = max((number for number, (file, *_) in enumerate(frames) if is_harness(file)), default=len(frames))
        if judged := [frame for frame in frames[:ends] if is_judged_code(frame[0])]:
            heading = next((line for line in part.splitlines() if "thread 0x" in line.lower()), "")
            found.append((heading, judged))
    return sorted(found, key=lambda stack: not stack[0].startswith("Current"))


class Child:
    """A child process in which kernels run on ``device``. The first call starts it.

    number: of this child among those that run in parallel; it selects the GPU if there are several. output: file that
    what it prints is appended to; None: it prints where this process does.
    """

    def __init__(self, device: str, number: int = 0, output: Path | None = None) -> None:
        self.device = device
        self.number = number
        self.output = output
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._words: Connection | None = None
        self._watch = Watch()

    def call(self, function: Callable[..., _T], *arguments: object, timeout: float | None = None) -> _T:
        """Call ``function`` in the child and return its result.

        Raises what ``function`` raises, and ChildDied if there is no result within ``timeout`` seconds (None: no
        limit), or the child dies, is stopped, or outlives the time limit of a case. A BaseException of ``function``
        that is no Exception, such as a KeyboardInterrupt, ends the child. One that is raised here, while this waits,
        is for the child as well.
        """
        if self._process is not None and not self._process.is_alive():
            self.close()  # it was killed after it had answered
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._pipe is not None
        process = self._process.pid
        try:
            self._pipe.send((function, arguments))
            self._wait_for_answer(self._process, self._pipe, timeout)
            answer, error = self._pipe.recv()
        except (EOFError, OSError):  # the other end is closed
            words = self._words
            code = self.close()
            raise death_of(code, "" if words is None else last_words_in(words), self._watch, process) from None
        except KeyboardInterrupt:
            if process is not None:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGINT)  # the terminal does not, because it is in another session
            raise
        if error is not None:
            raise error
        result: _T = answer
        return result

    def _wait_for_answer(self, process: BaseProcess, pipe: Connection, timeout: float | None) -> None:
        """Raises EOFError if the process has ended: what it has started can keep the pipe open."""
        ends = math.inf if timeout is None else time.monotonic() + timeout
        assert process.pid is not None
        while not pipe.poll(max(0.0, min(SECONDS_BETWEEN_LOOKS, ends - time.monotonic()))):
            if not process.is_alive() and not pipe.poll():
                raise EOFError
            if complaint := self._watch.complaint(process.pid):
                self.end()
                self.close()
                raise ChildDied(complaint, process.pid, hung=True)
            if time.monotonic() > ends:
                self.close()
                raise ChildDied(f"it took longer than {_seconds(round(timeout or 0))} and was ended")

    def end(self) -> None:
        """Kill the process at once; a thread that waits for its result gets ChildDied."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> int | None:
        """End the process and return its exit code, or None if there is no process."""
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None
        if process is None or pipe is None:
            return None
        pipe.close()  # a child that waits for work ends when its pipe closes
        ends = time.monotonic() + SECONDS_TO_END
        while process.is_alive() and time.monotonic() < ends:  # join waits for all that it has started
            time.sleep(0.002)
        if process.is_alive():
            process.kill()
        process.join()
        if process.pid is not None:
            end_group(process.pid)
        return process.exitcode

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, childs_end = context.Pipe()
        self._words, words = context.Pipe(duplex=False)
        self._watch = Watch()
        self._process = context.Process(
            target=_serve, args=(childs_end, words, self._watch, self.device, self.number, self.output), daemon=True
        )
        resource_tracker.ensure_running()  # starting it would end what is blocked
        blocked = signal.pthread_sigmask(
            signal.SIG_BLOCK, (signal.SIGINT,)
        )  # until it serves: it would print where it is
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        childs_end.close()  # otherwise recv would not raise EOFError when the child dies
        words.close()


def _serve(pipe: Connection, words: Connection, watch: Watch, device: str, number: int, output: Path | None) -> None:
    """Execute calls until the other end of the pipe is closed, or the parent has died: its children die with it."""
    lead_a_group()
    if output is not None:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    write_last_words_to(words)
    watched_by(watch)
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    take_gpu(number)
    prepare_process(device)
    code = 0
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
        _serve_calls(pipe)
    except KeyboardInterrupt:  # Ctrl-C reaches the parent too, which reports
        code = INTERRUPTED
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    sys.exit(code)


def _serve_calls(pipe: Connection) -> None:
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        answer: Any = None
        error: Exception | None = None
        try:
            answer = function(*arguments)
        except Exception as raised:
            error = raised
        try:
            pipe.send((answer, error))
        except OSError:  # nobody waits for the answer any more, or the judged code has closed the pipe
            return


def _die_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        end_group(os.getpid())
        _end_process(1)


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise CaseTimeout in the body once it has run for ``seconds``, and in all judged code if that swallows it.

    Code that never returns to Python, as a GPU's synchronisation behind a kernel without an end, or that blocks the
    signal, cannot be interrupted: after three times the time the process prints its stacks and ends. Without a limit,
    or outside the main thread, where Python handles no signals, nothing happens.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    body = sys._getframe(2)  # behind contextlib's
    insistence: _Insistence | None = None
    is_closed = False  # while a signal is handled, and at the end: another signal then does nothing

    def insist(number: int, frame: FrameType | None) -> None:
        nonlocal insistence, is_closed
        if is_closed:
            return
        is_closed = True
        try:
            if insistence is None:
                insistence = _Insistence(seconds, frame, body)
            insistence.interrupt(frame)
        finally:
            is_closed = False

    def first(number: int, frame: FrameType | None) -> None:
        if is_closed:
            return
        signal.signal(signal.SIGALRM, insist)
        raise CaseTimeout(f"still running after {_seconds(seconds)}")

    handler, mask = signal.signal(signal.SIGALRM, first), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # not sooner: what cleans up must not be interrupted
        faulthandler.dump_traceback_later(3 * seconds, exit=True, file=_for_last_words())
        watch_of_this_process().begin(seconds, 3 * seconds)
        yield
    finally:
        is_closed = True  # before anything is called: signals are handled at calls
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        faulthandler.cancel_dump_traceback_later()
        watch_of_this_process().end()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if insistence is not None:
            insistence.end()


class _Insistence:
    """Raises CaseTimeout in judged code again and again, until ``end``.

    A loop around ``except BaseException: pass`` catches any exception that is raised inside its ``try``. Judged code is
    therefore traced, and the next line that it runs, in a handler or behind it, raises as well. That ends the tracing,
    so each further signal begins it anew. Nothing is raised in the harness, which may be cleaning up. What swallows all
    this for ``seconds`` more ends the process, with a line that says so.

    frame: where the code is. body: the frame that set the limit.
    """

    INTERVAL = 0.05  # seconds between signals, which also end waiting calls

    def __init__(self, seconds: float, frame: FrameType | None, body: FrameType) -> None:
        message = f"still running after {_seconds(seconds)} and ignores interruption"
        running = judged_stack(frame, body)
        stack = tuple(traceback.StackSummary.extract((frame, frame.f_lineno) for frame in running))

        class Insistent(CaseTimeout):
            def __init__(self) -> None:
                super().__init__(message)
                self.stack = stack

        self._error = Insistent
        self._body = body
        self._tracing_before = sys.gettrace()
        self._ends = time.monotonic() + 0.9 * seconds  # before the limit's own last resort
        self._verdict = f"ORACLE FAILURE  does not end: {message}, at {_described(stack)}\n"
        signal.setitimer(signal.ITIMER_REAL, self.INTERVAL, self.INTERVAL)

    def interrupt(self, frame: FrameType | None) -> None:
        """Raise, if judged code runs at ``frame`` or has called what runs there."""
        running = judged_stack(frame, self._body)
        if not running:
            return
        if time.monotonic() > self._ends:
            os.write(_for_last_words(), self._verdict.encode())
            _end_process(1)
        for caller in running:
            caller.f_trace = self._trace
        sys.settrace(self._trace)
        raise self._error

    def end(self) -> None:
        sys.settrace(self._tracing_before)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not is_judged_code(frame.f_code.co_filename):
            return None
        if event == "line":
            raise self._error
        return self._trace


def _seconds(seconds: float) -> str:
    return f"{seconds:g} second{'' if seconds == 1 else 's'}"


def _described(stack: Sequence[traceback.FrameSummary]) -> str:
    return f"{stack[-1].filename}:{stack[-1].lineno} in {stack[-1].name}" if stack else "an unknown line"


@functools.cache
def _stderr() -> int:
    """The standard error of the process's start: pytest catches what is written to it while a test runs."""
    return os.dup(2)


_words: Connection | None = None


def write_last_words_to(pipe: Connection) -> None:
    """What ends this process says there where judged code was, for the process that waits for it.

    That is a time limit, or a fault of native code.
    """
    global _words
    _words = pipe
    os.set_blocking(pipe.fileno(), False)  # nobody reads it before the process has ended
    faulthandler.enable(file=pipe.fileno())


def last_words_in(pipe: Connection) -> str:
    """What a process that has ended wrote to the other end of ``pipe``. Others may hold that end, too."""
    os.set_blocking(pipe.fileno(), False)
    try:
        return os.read(pipe.fileno(), 1 << 16).decode(errors="replace")
    except BlockingIOError:
        return ""


def _for_last_words() -> int:
    return _stderr() if _words is None else _words.fileno()


def take_gpu(number: int) -> None:
    """Restrict this process to one of its visible GPUs: ``number`` modulo their count.

    Call it before anything uses CUDA, which reads the environment once. Does nothing if there is one GPU or none.
    """
    count = torch.cuda.device_count()  # asks the driver's library, without initialising CUDA
    if count < 2:
        return
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(index) for index in range(count)]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[number % count]


def prepare_process(device: str) -> None:
    """Set how kernels run in this process, whatever its environment says. Call it before anything imports Triton."""
    _stderr()
    os.environ["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
    if device == "cpu":
        speed_up()
        accept_integer_masks()
        promises.install()
        bounds.install()
        from nsa_oracle.harness.interpreter import gluon  # late: it imports Triton

        gluon.install()
        from nsa_oracle.harness.compiled import tracing  # late: it imports Triton

        tracing.remember_language()
        launcher.install()
    torch.set_num_threads(1)  # tensors are tiny, and threads of several processes would compete for cores
