"""Clean backends: the reference, and some that use a freedom the contract leaves them."""

from __future__ import annotations

import torch

from nsa_oracle.reference.multi_step import MultiStepBackend
from nsa_oracle.reference.types import ForwardBatch, ForwardMode, Metadata
from tests.support.backends.seams import Step, all_but, backend_of

Clean = MultiStepBackend


@backend_of
class FillsDeadCells(Step):
    """Leaves anything in cells beyond a row's length."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if batch.forward_mode is ForwardMode.EXTEND:
            return
        lengths = metadata.seqlens_expanded[:, None]  # [R, 1]
        page_size = self.config.page_size
        for table, live in (
            (metadata.page_table_1, lengths),
            (metadata.real_page_table, (lengths + page_size - 1) // page_size),
        ):
            columns = torch.arange(table.shape[1], device=table.device)
            table.masked_fill_(columns >= live, -1)


@backend_of
class LeavesScheduleColumn(Step):
    """Leaves the padding column of FlashMLA's schedule as it was."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if metadata.flashmla_metadata is not None:
            metadata.flashmla_metadata[:, 7] = 77


WritesArangeAtCapture = all_but("cu_seqlens_q", "nsa_cu_seqlens_q")
"""What never changes is written once: ``arange`` of all rows."""


@backend_of
class AliasesFields(Step):
    """One tensor behind several names, where their contents agree: SGLang's habit."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if batch.forward_mode.is_decode_or_idle:
            metadata.seqlens_expanded = metadata.cache_seqlens_int32
        if batch.forward_mode is not ForwardMode.EXTEND:
            metadata.nsa_cu_seqlens_q = metadata.cu_seqlens_q
        if self.config.page_size == 1:
            metadata.real_page_table = metadata.page_table_1


@backend_of
class RecomputesTwice(Step):
    """Prepares the same replay twice."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        super().refresh(buffers, batch)
