"""Layers of one method each: top-k, right and wrong in the ways in which it cannot even be used."""

from __future__ import annotations

import torch

from nsa_oracle.reference.topk import topk_indices, topk_transform_ragged
from nsa_oracle.reference.types import AttentionConfig, BackendConfig


class Right:
    """The reference's top-k, on the device of its inputs."""

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        self.topk = config.index_topk

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        return topk_indices(logits, seqlens_expanded, self.topk)


class ReturnsNone(Right):
    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        return None  # type: ignore[return-value]


class Int64(Right):
    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        return super().topk_indices(logits, seqlens_expanded).long()


class WrongShape(Right):
    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        return super().topk_indices(logits, seqlens_expanded)[:, 1:]


class WrongArguments(Right):
    def topk_indices(self, logits: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return logits


class Raises(Right):
    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class WritesItsInput(Right):
    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        found = super().topk_indices(logits, seqlens_expanded)
        logits.zero_()
        return found


class WrongPositions(Right):
    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        return super().topk_indices(-logits, seqlens_expanded)


class WrongRagged:
    """Its places in the concatenated KV forget where each request begins."""

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        self.topk = config.index_topk

    def topk_transform_ragged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, topk_indices_offset: torch.Tensor
    ) -> torch.Tensor:
        return topk_transform_ragged(logits, seqlens_expanded, torch.zeros_like(topk_indices_offset), self.topk)
