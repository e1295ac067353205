"""The protocol of graph runners and captured graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from nsa_oracle.harness.graphs.audit import Audit
from nsa_oracle.harness.graphs.host_values import NodeValues


class CapturedGraph(Protocol):
    """A capture that can be replayed. On CUDA the caller must synchronise after `replay`."""

    def replay(self) -> None: ...

    def released(self) -> str | None:
        """The memory that existed before the capture and that only this object keeps alive now, in words, or None.

        A server's graph keeps nothing alive: there such memory would be free, and the next allocation could get it.
        """

    def audit(self) -> Audit:
        """The audit of the graph's nodes, made right after the capture; empty for a simulated graph."""

    def host_values(self) -> Sequence[NodeValues]:
        """The host values that the capture passed to the nodes, for comparison with another capture."""

    def spoil(self, value: int) -> None:
        """Overwrite free memory, and this graph's own scratch between two replays, with the int32 ``value``."""


class GraphRunner(Protocol):
    """Captures bodies.

    `host_tensors` are the CPU tensors of the host (mirrors such as `seq_lens_cpu`) that the body can reach. The
    simulated runner cannot distinguish them from device tensors otherwise; the CUDA runner can, and ignores them.
    """

    def capture(self, body: Callable[[], None], host_tensors: Sequence[torch.Tensor] = ()) -> CapturedGraph: ...
