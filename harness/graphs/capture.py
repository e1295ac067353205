"""What every graph runner provides, and the error of a capture that is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from nsa_oracle.harness.graphs.audit import Audit
from nsa_oracle.harness.graphs.host_values import NodeValues


class CaptureError(Exception):
    """A body did something that a graph cannot hold.

    `operation` names the call, `where` reads "file.py:123 in function", `reason` is one clause.
    """

    def __init__(self, operation: str, where: str, reason: str) -> None:
        super().__init__(operation, where, reason)
        self.operation = operation
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.operation} at {self.where}: {self.reason}"


class CapturedGraph(Protocol):
    """A capture that can be replayed. On CUDA, synchronising after `replay` is the caller's job."""

    def replay(self) -> None: ...

    def dangling_bytes(self) -> int:
        """Size of the memory that was there before the capture and that now nobody but this object keeps alive.

        A server's graph keeps nothing alive: to it such memory is free, and the next allocation may get it.
        """

    def audit(self) -> Audit:
        """What its nodes read and write, as it was right after the capture; nothing where there are no nodes."""

    def host_values(self) -> Sequence[NodeValues]:
        """The host values that the capture gave to its nodes, for a comparison with another capture."""

    def spoil(self, value: int) -> None:
        """Write ``value`` over free memory: what nobody holds, and scratch of this graph's own between two replays."""


class GraphRunner(Protocol):
    """Captures bodies.

    `host_tensors` are the host's own CPU tensors (mirrors such as `seq_lens_cpu`) that the body can reach. The
    simulated runner cannot tell them from device tensors otherwise; the CUDA runner needs no telling.
    """

    def capture(self, body: Callable[[], None], host_tensors: Sequence[torch.Tensor] = ()) -> CapturedGraph: ...
