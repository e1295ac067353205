"""The operators say truthfully what they mutate, and trace with fake tensors."""

from __future__ import annotations

import pytest
import torch

from nsa_oracle.optimized import indexer, kv_cache, lengths, metadata, schedules, topk
from nsa_oracle.reference.types import ForwardMode
from tests.support.launches import CONFIG, DEVICE, REQ_TO_TOKEN, batch, fill_arguments, step_buffers


@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.DRAFT_EXTEND])
def test_fill_metadata(mode: ForwardMode) -> None:
    target = step_buffers(mode, 2 * CONFIG.rows_per_request(mode), 64)
    torch.library.opcheck(metadata.fill_metadata, fill_arguments(mode, target))


def test_fill_metadata_of_a_prefill() -> None:
    target = step_buffers(ForwardMode.EXTEND, 2, 9, flattened=18)
    torch.library.opcheck(metadata.fill_metadata, fill_arguments(ForwardMode.EXTEND, target))


def test_expand_seqlens() -> None:
    target, forward_batch = step_buffers(ForwardMode.DRAFT_EXTEND, 4, 64), batch(ForwardMode.DRAFT_EXTEND)
    q_lens = lengths.query_lens(forward_batch)
    arguments = (target.packed, forward_batch.seq_lens, q_lens, 2, 4, 2, 0, 1, False, 32)
    torch.library.opcheck(lengths.expand_seqlens_op, arguments)


def test_copy_steps() -> None:
    target, source = step_buffers(ForwardMode.DECODE, 2, 64), step_buffers(ForwardMode.DECODE, 2, 64).step(0)
    arguments = (
        target.packed, target.page_table_1, target.real_page_table, None, source.packed, source.page_table_1, None, 2,
        2, False, 16,
    )  # fmt: skip
    torch.library.opcheck(metadata.copy_steps, arguments)


def test_schedules() -> None:
    context_lens = torch.tensor([[300, 0, 700]], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(schedules.paged_mqa_schedule, (context_lens, context_lens.new_zeros(1, 8), 3))
    parts, num_splits = context_lens.new_zeros(1, 16), context_lens.new_zeros(1, 4)
    torch.library.opcheck(schedules.flashmla_schedule, (context_lens, parts, num_splits, 2))


@pytest.mark.parametrize("is_fp8", [False, True])
def test_store_cache(is_fp8: bool) -> None:
    kv = torch.zeros(32, 1, 80 if is_fp8 else 40, dtype=torch.uint8 if is_fp8 else torch.bfloat16, device=DEVICE)
    k, index_k = (torch.ones(2, width, dtype=torch.bfloat16, device=DEVICE) for width in (40, 16))
    slots = torch.tensor([17, 3], device=DEVICE)
    index_k_cache = torch.zeros(2, 16 * 20, dtype=torch.uint8, device=DEVICE)
    torch.library.opcheck(kv_cache.store_cache_op, (kv, index_k_cache, k, index_k, slots, 32, 16, is_fp8))


def test_indexer_logits() -> None:
    logits = torch.zeros(2, 9, device=DEVICE)
    index_q = torch.ones(2, 4, 16, device=DEVICE, dtype=torch.uint8)  # bits: opcheck cannot multiply e4m3
    index_k_cache = torch.zeros(2, 16 * 20, dtype=torch.uint8, device=DEVICE)
    table = torch.ones(2, 1, dtype=torch.int32, device=DEVICE)
    seqlens = torch.tensor([9, 3], dtype=torch.int32, device=DEVICE)
    arguments = (logits, index_q, torch.ones(2, 4, device=DEVICE), index_k_cache, table, seqlens)
    torch.library.opcheck(indexer.indexer_logits_op, arguments)


def test_topk() -> None:
    out = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    logits = torch.arange(18.0, device=DEVICE).view(2, 9)
    seqlens = torch.tensor([9, 3], dtype=torch.int32, device=DEVICE)
    scratch = (None, None)
    torch.library.opcheck(topk.topk_op, (out, logits, seqlens, None, None, *scratch))
    torch.library.opcheck(topk.topk_op, (out, logits, seqlens, REQ_TO_TOKEN[:, :9], None, *scratch))
    torch.library.opcheck(topk.topk_op, (out, logits, seqlens, None, seqlens, *scratch))


def test_topk_of_wide_rows() -> None:
    capacity = max(topk.BLOCKS)
    logits = torch.arange(2 * (capacity + 1), dtype=torch.float32, device=DEVICE).view(2, -1)
    seqlens = torch.tensor([capacity + 1, 3], dtype=torch.int32, device=DEVICE)
    likely = torch.zeros(2, 1, capacity, dtype=torch.int64, device=DEVICE)
    scratch = (likely, torch.zeros(2, 1, dtype=torch.int32, device=DEVICE))
    torch.library.opcheck(topk.topk_filter_op, (*scratch, logits, seqlens, 4))
    out = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(topk.topk_op, (out, logits, seqlens, None, None, *scratch))
