"""Child processes that run cases and may die: a kernel that faults leaves the GPU unusable for its process.

Functions called in a child, their arguments and their results are pickled. After a child has died, or has taken too
long, the next call starts a new one.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, TypeVar

import torch

from nsa_oracle.harness.errors import CaseTimeout
from nsa_oracle.harness.interpreter import promises
from nsa_oracle.harness.interpreter.speed import speed_up

_T = TypeVar("_T")
SECONDS_TO_END = 3


class ChildDied(Exception):
    """The process ended, or was killed, before it returned a result. The message is one line that says how."""


class Child:
    """A child process in which kernels run on ``device``. The first call starts it.

    number: of this child among those that run in parallel; it selects the GPU if there are several.
    """

    def __init__(self, device: str, number: int = 0) -> None:
        self.device = device
        self.number = number
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def call(self, function: Callable[..., _T], *arguments: object, timeout: float | None = None) -> _T:
        """Call ``function`` in the child and return its result.

        Raises what ``function`` raises, and ChildDied if there is no result within ``timeout`` seconds (None: no
        limit) or the child dies. A BaseException of ``function`` that is no Exception, such as a KeyboardInterrupt,
        ends the child.
        """
        if self._process is None:
            self._start()
        assert self._pipe is not None
        self._pipe.send((function, arguments))
        if not self._pipe.poll(timeout):
            self.close()
            raise ChildDied(f"it took longer than {timeout:.0f} seconds and was ended")
        try:
            answer, error = self._pipe.recv()
        except EOFError:
            code = self.close()
            raise ChildDied(f"its process ended with {code}") from None
        if error is not None:
            raise error
        result: _T = answer
        return result

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
        process.join(timeout=SECONDS_TO_END)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, childs_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(childs_end, self.device, self.number), daemon=True)
        self._process.start()
        childs_end.close()  # otherwise recv would not raise EOFError when the child dies


def _serve(pipe: Connection, device: str, number: int) -> None:
    """Execute calls until the other end of the pipe is closed, or the parent has died: its children die with it."""
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    take_gpu(number)
    prepare_process(device)
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        answer: Any = None
        error: Exception | None = None
        try:
            answer = function(*arguments)
        except Exception as raised:
            error = raised
        except KeyboardInterrupt:  # Ctrl-C reaches the parent too, which reports
            return
        pipe.send((answer, error))


def _die_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise CaseTimeout in the body once it has run for ``seconds``, and again if the body catches that.

    Code that never returns to Python, as a GPU's synchronisation behind a kernel without an end, cannot be interrupted:
    after three times the time the process prints its stacks and ends. Without a limit, or outside the main thread,
    where Python handles no signals, nothing happens.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise CaseTimeout(f"still running after {seconds:g} seconds")

    handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # not sooner: what cleans up must not be interrupted
    faulthandler.dump_traceback_later(3 * seconds, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


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
    os.environ["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
    if device == "cpu":
        speed_up()
        promises.install()
        from nsa_oracle.harness.interpreter import gluon  # late: it imports Triton

        gluon.install()
    torch.set_num_threads(1)  # tensors are tiny, and threads of several processes would compete for cores
