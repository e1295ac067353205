"""Arguments for the operators of ``optimized/`` that fill metadata."""

from __future__ import annotations

import torch

from nsa_oracle.optimized import buffers, lengths
from nsa_oracle.optimized.buffers import Layout, StepBuffers
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, SpecInfo

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = BackendConfig(16, 64, 32, 2, 2, paged_mqa_num_sms=3, flashmla_num_sm_parts=2)
REQ_TO_TOKEN = torch.arange(128, dtype=torch.int32, device=DEVICE).view(2, 64)


def step_buffers(mode: ForwardMode, num_rows: int, width: int, flattened: int | None = None) -> StepBuffers:
    made = buffers.allocate(CONFIG, Layout.of(CONFIG, mode, 2, num_rows), [width, width], DEVICE, flattened)
    for tensor in (made.packed, made.page_table_1, made.real_page_table, made.flattened):
        if tensor is not None:
            tensor.zero_()  # opcheck compares runs: cells that nobody writes must agree
    return made


def batch(mode: ForwardMode) -> ForwardBatch:
    ones = torch.ones(2, dtype=torch.int64, device=DEVICE)
    return ForwardBatch(
        mode, 2, ones, 9 * ones, spec_info=SpecInfo(ones), extend_seq_lens=ones, extend_prefix_lens=8 * ones
    )


def fill_arguments(mode: ForwardMode, target: StepBuffers) -> tuple[object, ...]:
    forward_batch, layout = batch(mode), target.layout
    return (
        target.packed, target.page_table_1, target.real_page_table, target.flattened, REQ_TO_TOKEN,
        forward_batch.req_pool_indices, forward_batch.seq_lens, lengths.query_lens(forward_batch), layout.bs,
        layout.num_rows, CONFIG.rows_per_request(mode), 0, lengths.row_layout(mode), False, CONFIG.index_topk,
        CONFIG.page_size, layout.paged_mqa_num_sms, layout.flashmla_num_sm_parts,
    )  # fmt: skip
