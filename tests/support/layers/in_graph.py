"""Layers that are wrong in a captured graph only. They derive from ``optimized/``, which can be captured."""

from __future__ import annotations

import dataclasses

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


class FreezesPlan(Capturable):
    """The largest length is looked up when a batch size comes for the first time, and kept."""

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        super().__init__(config, attention)
        self.plans: dict[int, int] = {}

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        lengths = metadata.seqlens_expanded
        if len(lengths) not in self.plans:
            self.plans[len(lengths)] = int(lengths.max())
        planned = lengths.clamp(max=self.plans[len(lengths)])
        return super().forward(inputs, caches, dataclasses.replace(metadata, seqlens_expanded=planned))


class KeepsFirst(Capturable):
    """A layer that can keep a tensor of each name and size from its first call on."""

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        super().__init__(config, attention)
        self.first: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def keep(self, name: str, values: torch.Tensor) -> torch.Tensor:
        if (name, values.shape) not in self.first:
            self.first[name, values.shape] = values.clone()
        return self.first[name, values.shape]


class ReturnsWarmUp(KeepsFirst):
    """The lse that is handed out was made outside the graph, which does not write it."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        return out, self.keep("lse", lse)


class ReadsOldCache(KeepsFirst):
    """Index keys are read from a copy that was made at the first call."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        old = self.keep("index_k", caches.index_k)
        outputs = super().forward(inputs, caches, metadata)
        logits = self.indexer_logits(
            inputs.index_q,
            inputs.index_weights,
            old,
            metadata.real_page_table,
            metadata.seqlens_expanded,
            metadata.max_seq_len_k,
        )
        return dataclasses.replace(outputs, logits=logits)


class AddsToWorkspace(KeepsFirst):
    """Attention adds its result to a workspace that nothing empties before the next replay."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        workspace = self.keep("out", torch.zeros_like(out))
        return workspace.add_(out.nan_to_num()).clone(), lse


class AttendsToLastReplay(KeepsFirst):
    """Attention sees the slots that the replay before selected."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        last = self.keep("indices", outputs.indices)
        out, lse = self.sparse_mla(inputs.q, caches.kv, last)
        last.copy_(outputs.indices)
        return AttentionOutputs(outputs.logits, outputs.indices, out, lse)


class LooksAtLengths(Capturable):
    """The host wants to know the largest length in every call."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        assert int(metadata.seqlens_expanded.max()) >= 0
        return super().forward(inputs, caches, metadata)


class UsesQueriesAsWorkspace(Capturable):
    """Queries are overwritten once they have been used."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        inputs.q.zero_()
        return outputs


class ClipsMetadataInGraph(Capturable):
    """What other layers of the model will read is clipped to K."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        metadata.seqlens_expanded.clamp_(max=self.config.index_topk)
        return outputs


class FirstStepStoresZeros(Capturable):
    """The first of several passes that write the same slots writes zeros, which the last writes over."""

    calls = 0

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        first = self.calls % self.config.speculative_num_steps == 0
        self.calls += 1
        super().store_cache(caches, dataclasses.replace(inputs, index_k=inputs.index_k * 0) if first else inputs)


class PaddingWritesToSlotOne(Capturable):
    """Rows of padding write to slot 1 instead of slot 0."""

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        slots = inputs.out_cache_loc.clamp(min=1)
        super().store_cache(caches, dataclasses.replace(inputs, out_cache_loc=slots))


class ScalesByWholeBatch(Capturable):
    """A factor that should be 1 is computed from the queries of all rows, those of padding included."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        largest = q.abs().amax()
        return super().sparse_mla(q * (largest / largest), kv_cache, indices)


class LeavesUnusedRows(Capturable):
    """The lse of a row without a key is 0."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        return out, lse.masked_fill(lse == -torch.inf, 0)
