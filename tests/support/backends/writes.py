"""Backends that write to inputs what those hold already, and some whose calls only look as if they did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nsa_oracle.reference.multi_step import MultiStepBackend
from nsa_oracle.reference.types import BackendConfig, ForwardBatch

Touch = Callable[[ForwardBatch, torch.Tensor], Any]
"""What is done to a batch and to ``req_to_token``."""


def touching(touch: Touch, where: str) -> type[MultiStepBackend]:
    """A backend that does ``touch`` in a call: "built", "eager", "capture", "replay", or "graph", which is captured."""

    class Touches(MultiStepBackend):
        def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
            super().__init__(config, req_to_token)
            self._pool = req_to_token
            if where == "built":
                req_to_token.add_(0)

        def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
            super().init_forward_metadata(forward_batch)
            self._touch("eager", forward_batch)

        def init_forward_metadata_capture_cuda_graph(self, forward_batch: ForwardBatch) -> None:
            super().init_forward_metadata_capture_cuda_graph(forward_batch)
            self._touch("capture", forward_batch)

        def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
            self._touch("graph", forward_batch)

        def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
            super().init_forward_metadata_replay_cuda_graph(forward_batch, bs)
            self._touch("replay", forward_batch)

        def _touch(self, here: str, batch: ForwardBatch) -> None:
            if here == where:
                touch(batch, self._pool)

    return Touches


def adds_nothing(batch: ForwardBatch, pool: torch.Tensor) -> None:
    batch.seq_lens.add_(0)


def copies_a_copy(batch: ForwardBatch, pool: torch.Tensor) -> None:
    batch.seq_lens.copy_(batch.seq_lens.clone())


def clamps_into(batch: ForwardBatch, pool: torch.Tensor) -> None:
    torch.clamp(batch.req_pool_indices, min=0, out=batch.req_pool_indices)


def writes_a_row_of_the_pool(batch: ForwardBatch, pool: torch.Tensor) -> None:
    row = pool[batch.req_pool_indices[:1].long()]
    pool.index_copy_(0, batch.req_pool_indices[:1].long(), row)


def writes_the_mirror(batch: ForwardBatch, pool: torch.Tensor) -> None:
    assert batch.seq_lens_cpu is not None
    batch.seq_lens_cpu.clamp_(min=0)


def sets_an_item(batch: ForwardBatch, pool: torch.Tensor) -> None:
    batch.seq_lens[0] = batch.seq_lens[0].clone()


WRITES: dict[Touch, tuple[str, str]] = {
    adds_nothing: ("seq_lens", "add_"),
    copies_a_copy: ("seq_lens", "copy_"),
    clamps_into: ("req_pool_indices", "clamp"),
    writes_a_row_of_the_pool: ("req_to_token", "index_copy_"),
    sets_an_item: ("seq_lens", "copy_"),
}
"""The input that each writes to, and the operator."""


def copies_onto_itself(batch: ForwardBatch, pool: torch.Tensor) -> None:
    """Nothing, as a backend does that has a view of an input as a field and copies the input to it."""
    batch.seq_lens.view(-1).copy_(batch.seq_lens)


def writes_no_cell(batch: ForwardBatch, pool: torch.Tensor) -> None:
    batch.seq_lens[:0].fill_(7)
    pool[:, :0].zero_()


def reshapes_a_view(batch: ForwardBatch, pool: torch.Tensor) -> None:
    batch.seq_lens.unsqueeze_(0).squeeze_(0)
    batch.seq_lens.requires_grad_(False)


def writes_its_own(batch: ForwardBatch, pool: torch.Tensor) -> None:
    batch.seq_lens.clone().add_(1)
    torch.add(batch.seq_lens, 1, out=torch.empty_like(batch.seq_lens))


HARMLESS: tuple[Touch, ...] = (copies_onto_itself, writes_no_cell, reshapes_a_view, writes_its_own)
