"""Layers that write to what they are given."""

from __future__ import annotations

import torch

from nsa_oracle.reference.layer import SparseAttention
from nsa_oracle.reference.types import AttentionCaches, AttentionInputs, AttentionOutputs, Metadata
from tests.support.layers.attention import Attention
from tests.support.layers.indexer import Indexer
from tests.support.layers.store import Store
from tests.support.layers.topk import Select


class ScalesKeysInPlace(Store):
    """Keys are scaled where they lie, and left so."""

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        super().store_cache(caches, inputs)
        inputs.k.mul_(2)


class ClearsIndexKeys(Indexer):
    """What no token has is taken out of the cache for good."""

    def keys(self, cache: torch.Tensor, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = super().keys(cache, pages, length)
        cache[0] = 0
        return found


class MasksLogitsInPlace(Select):
    """Columns beyond the row are made -inf in the caller's memory."""

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        for row, length in enumerate(seqlens_expanded.tolist()):
            logits[row, length:] = -torch.inf
        return super().topk_indices(logits, seqlens_expanded)


class MasksTableInPlace(Select):
    """Dead cells of the page table are made -1 in the caller's memory."""

    def topk_transform_paged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor
    ) -> torch.Tensor:
        for row, length in enumerate(seqlens_expanded.tolist()):
            page_table_1[row, length:] = -1
        return super().topk_transform_paged(logits, seqlens_expanded, page_table_1)


class ShiftsOffsetsInPlace(Select):
    """The offsets of rows are used as a workspace."""

    def ragged(self, positions: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        places = super().ragged(positions, offsets)
        offsets.zero_()
        return places


class ClampsIndicesInPlace(Attention):
    """A -1 becomes a 0 once it has been seen."""

    def slots(self, indices: torch.Tensor) -> torch.Tensor:
        slots = super().slots(indices)
        indices.clamp_(min=0)
        return slots


class ScalesQueriesInPlace(Attention):
    """Queries are scaled where they lie."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = super().sparse_mla(q, kv_cache, indices)
        q.mul_(0.5)
        return found


class CleansCache(Attention):
    """NaN in the cache is replaced before it can do harm."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = super().sparse_mla(q, kv_cache, indices)
        kv_cache[0] = 0
        return found


class ClipsMetadata(SparseAttention):
    """What other layers of the model will read is clipped to K."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        metadata.seqlens_expanded.clamp_(max=self.config.index_topk)
        return outputs


class ReplacesMetadata(SparseAttention):
    """What other layers of the model will read is another tensor."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        metadata.real_page_table = metadata.real_page_table + 1
        return outputs


class NarrowsMetadata(SparseAttention):
    """The next layer is reported that tables are narrower."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        metadata.max_seq_len_k -= 1
        return outputs


class ZeroesIndexQueries(SparseAttention):
    """Index queries are a workspace of the layer as a whole."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        inputs.index_weights.zero_()
        return outputs
