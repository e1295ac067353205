"""Clean backends: the reference, and some that use a freedom the contract leaves them."""

from __future__ import annotations

import torch

from nsa_oracle.reference.multi_step import MultiStepBackend
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata
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


class InInferenceMode(MultiStepBackend):
    """Its tensors are inference tensors, as those of serving engines are: nobody else may write to them in place."""

    @torch.inference_mode()
    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        super().__init__(config, req_to_token)

    @torch.inference_mode()
    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)

    @torch.inference_mode()
    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens)

    @torch.inference_mode()
    def init_forward_metadata_capture_cuda_graph(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata_capture_cuda_graph(forward_batch)

    @torch.inference_mode()
    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        super().init_forward_metadata_replay_cuda_graph(forward_batch, bs)


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
