"""What the reference says of a batch: its metadata, and each stage of the layer given the stage before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness.engine.passes import Pass, map_tensors
from nsa_oracle.harness.scenarios.world import Batch
from nsa_oracle.reference import layer
from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.types import (
    AttentionCaches,
    AttentionConfig,
    AttentionInputs,
    BackendConfig,
    ForwardBatch,
    Metadata,
    SpecInfo,
    StepSemantics,
)


def expected_metadata(
    config: BackendConfig, req_to_token: NDArray[np.int32], batch: Batch, in_graph: bool
) -> list[Metadata]:
    """Metadata of each step. Computed on the host from the batch's own numbers."""
    forward_batch = _as_forward_batch(batch)
    pool = torch.from_numpy(req_to_token)
    distinct = 1 if config.step_semantics is StepSemantics.SHARED else config.speculative_num_steps
    steps = [compute_metadata(config, pool, forward_batch, step, in_graph) for step in range(distinct)]
    return steps if len(steps) == config.speculative_num_steps else steps * config.speculative_num_steps


def _as_forward_batch(batch: Batch) -> ForwardBatch:
    def as_tensor(numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64)

    extend_lens = batch.extend_lens or (0,) * batch.size
    return ForwardBatch(
        forward_mode=batch.mode,
        batch_size=batch.size,
        req_pool_indices=as_tensor(batch.pool_rows),
        seq_lens=as_tensor(batch.seq_lens),
        spec_info=SpecInfo(as_tensor(batch.accept_lengths)),
        extend_seq_lens=as_tensor(extend_lens),
        extend_prefix_lens=as_tensor([s - e for s, e in zip(batch.seq_lens, extend_lens, strict=True)]),
    )


@dataclass(frozen=True)
class LayerRows:
    """What one forward pass of the layer works on, for rows that are compared: all tensors on one device.

    inputs: as the pass has them. seqlens_expanded [R] int32; page_table_1 [R, W] and real_page_table [R, ceil(W / P)]
    int32, a row per query token. caches: with this pass's own keys already written.
    """

    inputs: AttentionInputs
    seqlens_expanded: torch.Tensor
    page_table_1: torch.Tensor
    real_page_table: torch.Tensor
    topk_indices_offset: torch.Tensor | None
    caches: AttentionCaches


class ExpectedLayer:
    """The reference's layer on the first rows of a pass, each stage a function of the stage before."""

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        self.reference = layer.SparseAttention(config, attention)

    def rows(self, a_pass: Pass, metadata: Metadata, caches: AttentionCaches) -> LayerRows:
        """Write the keys of ``a_pass`` to ``caches`` and gather what its rows see. Padding is left out."""
        device = caches.kv.device
        inputs = map_tensors(a_pass.inputs, lambda tensor: tensor.to(device))
        self.reference.store_cache(caches, inputs)
        page_table_1, real_page_table = metadata.page_table_1, metadata.real_page_table
        if metadata.token_to_batch_idx is not None:
            requests = metadata.token_to_batch_idx.to(torch.int64)
            page_table_1, real_page_table = page_table_1[requests], real_page_table[requests]
        offset = metadata.topk_indices_offset
        return LayerRows(
            inputs,
            metadata.seqlens_expanded[: a_pass.rows].to(device),
            page_table_1[: a_pass.rows].to(device),
            real_page_table[: a_pass.rows].to(device),
            None if offset is None else offset.to(device),
            caches,
        )

    def logits(self, rows: LayerRows) -> torch.Tensor:
        """[R, W] float32."""
        inputs = rows.inputs
        return self.reference.indexer_logits(
            inputs.index_q,
            inputs.index_weights,
            rows.caches.index_k,
            rows.real_page_table,
            rows.seqlens_expanded,
            rows.page_table_1.shape[1],
        )

    def positions(self, rows: LayerRows, logits: torch.Tensor) -> torch.Tensor:
        """[R, K] int32."""
        return self.reference.topk_indices(logits, rows.seqlens_expanded)

    def indices(self, rows: LayerRows, logits: torch.Tensor) -> torch.Tensor:
        """[R, K] int32, slots."""
        return self.reference.topk_transform_paged(logits, rows.seqlens_expanded, rows.page_table_1)

    def ragged(self, rows: LayerRows, logits: torch.Tensor) -> torch.Tensor:
        """[R, K] int32, places in the concatenated KV."""
        assert rows.topk_indices_offset is not None
        return self.reference.topk_transform_ragged(logits, rows.seqlens_expanded, rows.topk_indices_offset)

    def indices_with_holes(self, rows: LayerRows, logits: torch.Tensor) -> torch.Tensor:
        """What attention by itself is given: every fourth entry is -1, for nothing says that those come last."""
        indices = self.indices(rows, logits)
        row, entry = (torch.arange(size, device=indices.device) for size in indices.shape)
        return torch.where((row[:, None] + entry) % 4 == 1, -1, indices)

    def attention(self, rows: LayerRows, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Out [R, H, rank] bf16 and lse [R, H] float32."""
        return self.reference.sparse_mla(rows.inputs.q, rows.caches.kv, indices)
