"""Backends that raise, take the process down, or are none."""

from __future__ import annotations

import os

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
        os._exit(9)


class LacksMethod:
    """Is no backend."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        self.attn_backends: list[SingleStepBackend] = []
