"""Backends that raise, take the process down, or are none."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from contextlib import suppress
from typing import ClassVar

import numpy as np
import pytest
import torch

from nsa_oracle.reference.multi_step import MultiStepBackend, SingleStepBackend
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, Metadata
from tests.support.backends.seams import Step, backend_of


class RaisesWhenBuilt(MultiStepBackend):
    """Cannot be built."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        raise RuntimeError("no such\n  device")


@backend_of
class RaisesAtReplay(Step):
    """Fails in the middle of a replay."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        raise IndexError("row 3 of 2")


@backend_of
class FaultsOnTheGpu(Step):
    """Looks up a row that is not there: an exception on a CPU, a fault that costs the process its GPU on a GPU."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        behind = torch.full((1,), self.req_to_token.shape[0], device=self.req_to_token.device)
        buffers.page_table_1[:1].copy_(self.req_to_token[behind])


@backend_of
class EndsTheProcess(Step):
    """Takes its process down, as a fault in native code does."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@backend_of
class Faults(Step):
    """Reads address 0, as native code does that is given a wrong pointer."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        ctypes.string_at(0)


@backend_of
class Aborts(Step):
    """Ends as native code does whose assertion fails."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        os.abort()


@backend_of
class Exits(Step):
    """Ends its process with success, and without a word."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        os._exit(0)


@backend_of
class ReallyExits(Step):
    """As ``Exits``, by a function of C that nothing can refuse."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        ctypes.CDLL(None)._exit(0)


@backend_of
class ReallyStopsItself(Step):
    """As ``process.StopsItself``, by a function of C that nothing can refuse."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        ctypes.CDLL(None).kill(os.getpid(), int(signal.SIGSTOP))
        super().refresh(buffers, batch)


@backend_of
class ExitsAndGoesOn(Step):
    """Swallows that it could not end its process."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        with suppress(BaseException):
            os._exit(0)
        super().refresh(buffers, batch)


@backend_of
class ForksAChild(Step):
    """Clean: a child of its own ends in the way that such children do."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        child = os.fork()
        if child == 0:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        super().refresh(buffers, batch)


@backend_of
class InterruptsItself(Step):
    """Raises what a user's Ctrl-C raises."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        raise KeyboardInterrupt


@backend_of
class IsInterrupted(Step):
    """Swallows that a user presses Ctrl-C."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        with suppress(BaseException):
            subprocess.run(["kill", "-INT", str(os.getpid())], check=True)
            time.sleep(60)
        super().refresh(buffers, batch)


@backend_of
class CannotBeInterrupted(Step):
    """Never ends, whatever is raised in it."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        while True:
            with suppress(BaseException):
                time.sleep(60)


@backend_of
class RemembersThePageSize(Step):
    """State between cases: prepares nothing unless the page size is that of the first case of its process."""

    first: ClassVar[int | None] = None

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        cls, page_size = type(self), self.config.page_size
        cls.first = cls.first or page_size
        if cls.first == page_size:
            super().refresh(buffers, batch)


class LacksMethod:
    """Is no backend."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        self.attn_backends: list[SingleStepBackend] = []


@backend_of
class EndsPytest(Step):
    """Ends the test run, from a frame of pytest."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        pytest.exit("no GPU here")


@backend_of
class FailsInNumpy(Step):
    """Raises in a frame of numpy."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        np.broadcast_to(np.zeros(2), (3,))
