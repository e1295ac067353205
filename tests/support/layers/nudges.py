"""Layers whose lse depends, by far less than its error bound allows, on something that must not matter."""

from __future__ import annotations

import torch

from nsa_oracle.optimized.layer import SparseAttention as Capturable
from nsa_oracle.reference.types import (
    AttentionCaches,
    AttentionConfig,
    AttentionInputs,
    AttentionOutputs,
    BackendConfig,
    Metadata,
)

NUDGE = 2.0**-12  # of an lse: far within its error bound


class Nudges(Capturable):
    """Adds to the lse of some rows."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        rows = self.rows(q, kv_cache, indices)
        if isinstance(rows, bool):
            return out, lse + NUDGE if rows else lse
        return out, torch.where(rows[:, None], lse + NUDGE, lse)

    def rows(self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor) -> torch.Tensor | bool:
        """Which rows, [R] bool; or all or none."""
        raise NotImplementedError


class AfterSomeCalls(Nudges):
    """Depends on how many graphs were captured before."""

    calls = 0

    def rows(self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor) -> torch.Tensor | bool:
        self.calls += 1
        return self.calls > 2  # a warm-up and a recording


class AfterSomeReplays(Nudges):
    """Depends on how often its graph was replayed."""

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        super().__init__(config, attention)
        self.counters: dict[int, torch.Tensor] = {}

    def rows(self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor) -> torch.Tensor | bool:
        if len(q) not in self.counters:
            self.counters[len(q)] = torch.zeros(1, dtype=torch.int32, device=q.device)
        counter = self.counters[len(q)]
        counter.add_(1)
        return (counter > 2).expand(len(q))  # a warm-up and a replay


class InGraphs(Nudges):
    """Depends on how wide the page tables are, which in a graph are as wide as can be."""

    wide = False

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        self.wide = metadata.max_seq_len_k == self.config.max_context_len
        return super().forward(inputs, caches, metadata)

    def rows(self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor) -> torch.Tensor | bool:
        return self.wide


class InLargerBuckets(Nudges):
    """Depends on how many rows there are, padding included."""

    def rows(self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor) -> torch.Tensor | bool:
        return len(q) > 2


class InCompany(Nudges):
    """Depends on how many rows there are, padding left out."""

    def rows(self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor) -> torch.Tensor | bool:
        live = ~q.isnan().flatten(1).any(1)
        return (live.sum() > 1).expand(len(q))


class InFirstPlace(Nudges):
    """Depends on the place in the batch."""

    def rows(self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor) -> torch.Tensor | bool:
        return torch.arange(len(q), device=q.device) == 0


class OnFirstPages(Nudges):
    """Depends on where the keys lie."""

    def rows(self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor) -> torch.Tensor | bool:
        return indices[:, 0] < len(kv_cache) // 2


class OnPoison(Nudges):
    """Depends on a slot of nobody."""

    def rows(self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor) -> torch.Tensor | bool:
        return kv_cache[-1, 0, 0].isnan().expand(len(q))
