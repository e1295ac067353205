"""One sparse attention layer: its stages, under the names by which kernels are judged, and all of them in order."""

from __future__ import annotations

import torch

from nsa_oracle.reference import attention, indexer, kv_cache, topk
from nsa_oracle.reference.types import (
    AttentionCaches,
    AttentionConfig,
    AttentionInputs,
    AttentionOutputs,
    BackendConfig,
    Metadata,
)


class SparseAttention:
    """A layer of given sizes. It keeps no state: caches belong to the engine, metadata to the backend."""

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

        The inputs may have further rows behind these R, which stand for no token.
        """
        # 1. Store the rows' own keys before anything is read: a token sees itself.
        self.store_cache(caches, inputs)

        # 2. Page tables with a row per query token. EXTEND keeps one per request.
        page_table_1 = metadata.page_table_1
        real_page_table = metadata.real_page_table
        if metadata.token_to_batch_idx is not None:
            requests = metadata.token_to_batch_idx.to(torch.int64)  # [R]
            page_table_1, real_page_table = page_table_1[requests], real_page_table[requests]  # [R, W], [R, pages]

        # 3. Score every visible token, keep the best, and attend to them. Rows behind those of the metadata have none.
        lengths = metadata.seqlens_expanded  # [R]
        num_rows, num_extra = lengths.shape[0], inputs.q.shape[0] - lengths.shape[0]
        logits = self.indexer_logits(
            inputs.index_q[:num_rows],
            inputs.index_weights[:num_rows],
            caches.index_k,
            real_page_table,
            lengths,
            metadata.max_seq_len_k,
        )  # [R, W]
        indices = self.topk_transform_paged(logits, lengths, page_table_1)  # [R, K]
        if num_extra:
            indices = torch.cat([indices, indices.new_full((num_extra, indices.shape[1]), -1)])  # [R + E, K]
        out, lse = self.sparse_mla(inputs.q, caches.kv, indices)  # [R + E, H, rank], [R + E, H]
        return AttentionOutputs(logits, indices, out, lse)
