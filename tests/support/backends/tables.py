"""Backends that are wrong about page tables."""

from __future__ import annotations

import dataclasses

import torch

from nsa_oracle.reference.types import ForwardBatch, Metadata
from tests.support.backends.seams import Step, backend_of, copy_all_but


@backend_of
class NarrowTable(Step):
    """The table lacks the columns that drafts overshoot into."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        width = self.config.max_context_len - self.config.speculative_num_draft_tokens
        metadata.page_table_1 = metadata.page_table_1[:, :width].contiguous()


@backend_of
class NarrowFill(Step):
    """The table is wide enough, but only its committed columns are written."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        values = self._compute_in_graph(batch)
        copy_all_but(("page_table_1",), buffers, values)
        width = self.config.max_context_len - self.config.speculative_num_draft_tokens
        buffers.page_table_1[:, :width] = values.page_table_1[:, :width]


@backend_of
class SortsPages(Step):
    """Takes pages for ordered by number."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        for row, kv_len in zip(metadata.real_page_table, metadata.seqlens_expanded.tolist(), strict=True):
            live = row[: -(-kv_len // self.config.page_size)]
            live.copy_(live.sort().values)


@backend_of
class ReadsRawPoolRow(Step):
    """Uses a request's place in the batch as its row of the pool."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        place = torch.arange(batch.batch_size, device=batch.req_pool_indices.device)
        super().refresh(buffers, dataclasses.replace(batch, req_pool_indices=place))
