"""Forward passes of the layer: their rows, keys and destination slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nsa_oracle.harness.memory.bits import as_bytes
from nsa_oracle.reference.types import AttentionInputs


@dataclass(frozen=True)
class Pass:
    """One forward pass of the layer: draft step ``step`` of one batch, with R rows in batch order, without padding.

    requests, tokens: request (index in the batch) and draft token of each row. seqlens: KV length that each row sees.
    It includes the row's own key, except in draft steps under ``shared`` step semantics. positions: position of the
    row's own key, below 0 for a row that stands for no token. inputs: on the host.
    """

    step: int
    requests: tuple[int, ...]
    tokens: tuple[int, ...]
    seqlens: tuple[int, ...]
    positions: tuple[int, ...]
    inputs: AttentionInputs

    @property
    def rows(self) -> int:
        return len(self.requests)

    def of_requests(self, order: Sequence[int]) -> Pass:
        """The pass of a batch of the requests in ``order`` alone, in that order."""
        rows = [row for request in order for row in range(self.rows) if self.requests[row] == request]
        place = {request: number for number, request in enumerate(order)}
        return Pass(
            self.step,
            requests=tuple(place[self.requests[row]] for row in rows),
            tokens=tuple(self.tokens[row] for row in rows),
            seqlens=tuple(self.seqlens[row] for row in rows),
            positions=tuple(self.positions[row] for row in rows),
            inputs=map_tensors(self.inputs, lambda tensor: tensor[rows]),
        )


def with_extra_rows(inputs: AttentionInputs, count: int, slot: int, poison: int) -> AttentionInputs:
    """``inputs`` with ``count`` rows behind them that stand for no token: bytes of ``poison``, and ``slot``."""

    def extended(tensor: torch.Tensor) -> torch.Tensor:
        extra = torch.empty(count, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
        if extra.is_floating_point():
            as_bytes(extra).fill_(poison)
        else:
            extra.fill_(slot)
        return torch.cat([tensor, extra])

    return map_tensors(inputs, extended) if count else inputs


def map_tensors(inputs: AttentionInputs, change: Callable[[torch.Tensor], torch.Tensor]) -> AttentionInputs:
    """``inputs`` with ``change`` applied to every tensor."""
    return AttentionInputs(**{name: change(tensor) for name, tensor in vars(inputs).items()})
