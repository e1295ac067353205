"""Layers of one method each: top-k, right and wrong in the ways in which it cannot even be used."""

from __future__ import annotations

import torch

from nsa_oracle.reference.topk import topk_transform_ragged
from nsa_oracle.reference.types import AttentionConfig, BackendConfig


class Right:
    """Top-k by torch's operators, without a loop over the rows: it can be captured."""

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        self.topk = config.index_topk

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        rows, width = logits.shape
        columns, lengths = torch.arange(width, device=logits.device), seqlens_expanded[:, None]
        scores = torch.where(logits.isnan() | (columns >= lengths), -torch.inf, logits) + 0.0
        best = scores.sort(descending=True, stable=True).indices[:, : self.topk]
        positions = torch.where(best < lengths, best, width).sort().values
        found = torch.full((rows, self.topk), -1, dtype=torch.int32, device=logits.device)
        found[:, : positions.shape[1]] = torch.where(positions < width, positions, -1)
        return found


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


class Synchronises(Right):
    """Right, but reads a value of the device on the host."""

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        assert int(seqlens_expanded.sum()) >= 0
        return super().topk_indices(logits, seqlens_expanded)


class WrongRagged:
    """Its places in the concatenated KV forget where each request begins."""

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        self.topk = config.index_topk

    def topk_transform_ragged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, topk_indices_offset: torch.Tensor
    ) -> torch.Tensor:
        return topk_transform_ragged(logits, seqlens_expanded, torch.zeros_like(topk_indices_offset), self.topk)
