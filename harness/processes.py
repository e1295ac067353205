"""A process to judge in that may be lost: a kernel that faults leaves the GPU unusable for the process that ran it.

What is called in a child, its arguments and its result travel by pickle. A child that dies, or takes too long, is
replaced by a fresh one at the next call.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from nsa_oracle.harness.interpreter import promises
from nsa_oracle.harness.interpreter.speed import speed_up

_T = TypeVar("_T")
SECONDS_TO_END = 3


class ChildDied(Exception):
    """The process ended, or was ended, before it had an answer. One line says how."""


class Child:
    """A process of its own in which kernels run on ``device``; started by the first call.

    number: of those that work side by side; on several GPUs it says which is used.
    """

    def __init__(self, device: str, number: int = 0) -> None:
        self.device = device
        self.number = number
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def call(self, function: Callable[..., _T], *arguments: object, timeout: float | None = None) -> _T:
        """What ``function`` returns there. Raises what it raises, and ChildDied if there is no answer in ``timeout``.

        Whatever an Exception is not (such as a KeyboardInterrupt) ends the child.
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
        """End the process at once, whatever it does; a thread that waits for its answer gets ChildDied."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> int | None:
        """End the process, if there is one, and return its exit code."""
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None
        if process is None or pipe is None:
            return None
        pipe.close()  # a child that waits for work ends at this
        process.join(timeout=SECONDS_TO_END)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.device, self.number), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is seen as one


def _serve(pipe: Connection, device: str, number: int) -> None:
    """Answer calls until the other end is gone."""
    take_gpu(number)
    prepare_process(device)
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
        pipe.send((answer, error))


def take_gpu(number: int) -> None:
    """Of the GPUs that this process sees, leave it number ``number``, counted round.

    Before anything uses CUDA, which looks once. Nothing changes where there is one GPU or none.
    """
    count = torch.cuda.device_count()  # asks the driver's library, and starts no CUDA
    if count < 2:
        return
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(index) for index in range(count)]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[number % count]


def prepare_process(device: str) -> None:
    """Before anything imports Triton: fix how kernels run in this process, whatever its environment says."""
    os.environ["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
    if device == "cpu":
        speed_up()
        promises.install()
        from nsa_oracle.harness.interpreter import gluon  # late: it imports Triton

        gluon.install()
    torch.set_num_threads(1)  # tensors are tiny; threads of several processes would only get in each other's way
