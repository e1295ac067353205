"""The reference's results for a batch: the metadata, and each stage of the layer from the stage before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness.engine.passes import Pass, map_tensors
from nsa_oracle.harness.scenarios.batch import Batch
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
    config: BackendConfig,
    req_to_token: NDArray[np.int32],
    batch: Batch,
    in_graph: bool,
    num_steps: int | None = None,
) -> list[Metadata]:
    """The metadata of each of the first ``num_steps`` steps, computed on the host from the numbers of ``batch``.

    num_steps: None for all.
    """
    num_steps = config.speculative_num_steps if num_steps is None else num_steps
    forward_batch = _as_forward_batch(batch)
    pool = torch.from_numpy(req_to_token)
    distinct = 1 if config.step_semantics is StepSemantics.SHARED else num_steps
    steps = [compute_metadata(config, pool, forward_batch, step, in_graph) for step in range(distinct)]
    return steps if len(steps) == num_steps else steps * num_steps


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
    """The inputs of one forward pass of the layer, for the rows that are compared. All tensors are on one device.

    inputs: those of the pass. seqlens_expanded: [R] int32. page_table_1: [R, W] int32, and real_page_table:
    [R, ceil(W / P)] int32, with one row per query token. topk_indices_offset: [R] int32, or None. caches: with the keys
    of this pass already written.
    """

    inputs: AttentionInputs
    seqlens_expanded: torch.Tensor
    page_table_1: torch.Tensor
    real_page_table: torch.Tensor
    topk_indices_offset: torch.Tensor | None
    caches: AttentionCaches

    def at(self, numbers: torch.Tensor) -> LayerRows:
        """The rows with these ``numbers``, [n] int64 on their device, in this order; any may come again."""
        return LayerRows(
            map_tensors(self.inputs, lambda tensor: tensor[numbers]),
            self.seqlens_expanded[numbers],
            self.page_table_1[numbers],
            self.real_page_table[numbers],
            None if self.topk_indices_offset is None else self.topk_indices_offset[numbers],
            self.caches,
        )


class ExpectedLayer:
    """The reference's layer on the rows of a pass, padding left out. Each stage is a function of the stage before."""

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        self.reference = layer.SparseAttention(config, attention)

    def rows(self, a_pass: Pass, metadata: Metadata, caches: AttentionCaches) -> LayerRows:
        """Write the keys of ``a_pass`` to ``caches`` and gather the inputs of its rows. Padding is left out."""
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
        """Index logits, [R, W] float32."""
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
        """Positions of the selected tokens, [R, K] int32."""
        return self.reference.topk_indices(logits, rows.seqlens_expanded)

    def indices(self, rows: LayerRows, logits: torch.Tensor) -> torch.Tensor:
        """Slots of the selected tokens, [R, K] int32."""
        return self.reference.topk_transform_paged(logits, rows.seqlens_expanded, rows.page_table_1)

    def ragged(self, rows: LayerRows, logits: torch.Tensor) -> torch.Tensor:
        """Places of the selected tokens in the concatenated KV, [R, K] int32."""
        assert rows.topk_indices_offset is not None
        return self.reference.topk_transform_ragged(logits, rows.seqlens_expanded, rows.topk_indices_offset)

    def indices_with_holes(self, rows: LayerRows, logits: torch.Tensor) -> torch.Tensor:
        """Indices for attention as an isolated stage, [R, K] int32: every fourth entry is replaced by -1.

        The contract allows -1 anywhere in a row, not only at its end.
        """
        indices = self.indices(rows, logits)
        row, entry = (torch.arange(size, device=indices.device) for size in indices.shape)
        return torch.where((row[:, None] + entry) % 4 == 1, -1, indices)

    def attention(self, rows: LayerRows, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns out [R, H, rank] bf16 and lse [R, H] float32."""
        return self.reference.sparse_mla(rows.inputs.q, rows.caches.kv, indices)
