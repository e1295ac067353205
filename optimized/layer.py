"""One sparse attention layer in Triton: its stages, and all of them in order as a captured graph runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from nsa_oracle.optimized import attention, indexer, kv_cache, topk
from nsa_oracle.reference.types import (
    AttentionCaches,
    AttentionConfig,
    AttentionInputs,
    AttentionOutputs,
    BackendConfig,
    Metadata,
)


class SparseAttention:
    """A layer of given sizes. It keeps no state: every launch takes lengths and addresses from its arguments.

    The graph of ``forward`` therefore serves any lengths, and a row's result depends only on its own inputs: not on the
    rest of the batch, the number of multiprocessors that shared its work, or anything served before.
    """

    # Sizes that attention supports: powers of two, as Triton's ranges are.
    sizes: ClassVar[Mapping[str, Sequence[int]]] = {
        "kv_lora_rank": (64, 128, 256, 512),
        "qk_rope_head_dim": (16, 32, 64),
    }

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        self.config = config
        self.attention = attention

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        kv_cache.store_cache(self.attention, caches, inputs)

    def indexer_logits(
        self,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        index_k_cache: torch.Tensor,
        real_page_table: torch.Tensor,
        seqlens_expanded: torch.Tensor,
        max_seq_len_k: int,
    ) -> torch.Tensor:
        return indexer.indexer_logits(
            self.attention, index_q, index_weights, index_k_cache, real_page_table, seqlens_expanded, max_seq_len_k
        )

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        return topk.topk_indices(logits, seqlens_expanded, self.config.index_topk)

    def topk_transform_paged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor
    ) -> torch.Tensor:
        return topk.topk_transform_paged(logits, seqlens_expanded, page_table_1, self.config.index_topk)

    def topk_transform_ragged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, topk_indices_offset: torch.Tensor
    ) -> torch.Tensor:
        return topk.topk_transform_ragged(logits, seqlens_expanded, topk_indices_offset, self.config.index_topk)

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return attention.sparse_mla(self.attention, q, kv_cache, indices)

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        """One forward pass of the layer for the R rows that ``metadata`` describes; writes to ``caches``.

        The inputs may have further rows behind these R, which select nothing.
        """
        self.store_cache(caches, inputs)
        page_table_1, real_page_table = metadata.page_table_1, metadata.real_page_table
        if metadata.token_to_batch_idx is not None:  # EXTEND keeps one row of the tables per request
            requests = metadata.token_to_batch_idx
            page_table_1 = page_table_1.index_select(0, requests)
            real_page_table = real_page_table.index_select(0, requests)
        lengths = metadata.seqlens_expanded
        num_rows, num_extra = lengths.shape[0], inputs.q.shape[0] - lengths.shape[0]
        logits = self.indexer_logits(
            inputs.index_q[:num_rows],
            inputs.index_weights[:num_rows],
            caches.index_k,
            real_page_table,
            lengths,
            metadata.max_seq_len_k,
        )
        indices = self.topk_transform_paged(logits, lengths, page_table_1)
        if num_extra:
            indices = torch.nn.functional.pad(indices, (0, 0, 0, num_extra), value=-1)
        out, lse = self.sparse_mla(inputs.q, caches.kv, indices)
        return AttentionOutputs(logits, indices, out, lse)
