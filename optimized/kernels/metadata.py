"""The single launch that computes every field of every step of a batch, directly from the engine's tensors."""

# mypy: disable-error-code="untyped-decorator"
# (Triton ships no types for its decorator)

from __future__ import annotations

import triton
import triton.language as tl

from nsa_oracle.optimized.kernels.fields import (
    EXTEND,
    FLASHMLA_NUM_SPLITS,
    NSA_CACHE_SEQLENS,
    NUM_GRAPH_FIELDS,
    RAGGED,
    SEQLENS_EXPANDED,
    UNIFORM,
)
from nsa_oracle.optimized.kernels.lengths import sums_before, write_extend_rows, write_lengths
from nsa_oracle.optimized.kernels.page_table import write_table_rows
from nsa_oracle.optimized.kernels.schedules import write_flashmla_schedule, write_paged_mqa_schedule

# Nothing that changes from batch to batch, bucket to bucket or allocation to allocation may select a variant.
_RUNTIME = [
    "packed", "table", "pages", "flattened", "req_to_token", "req_pool_indices", "seq_lens", "query_lens",
    "packed_stride", "pitch", "table_step_stride", "table_row_stride", "pages_step_stride", "pages_row_stride",
    "flattened_stride", "req_to_token_stride", "pool_stride", "seq_stride", "query_stride", "num_steps", "bs",
    "num_rows", "rows_per_request", "width", "extra", "index_topk", "num_sms", "num_sm_parts", "programs_per_request",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_RUNTIME)
def fill_metadata_kernel(
    packed: tl.tensor,
    table: tl.tensor,
    pages: tl.tensor,
    flattened: tl.tensor,
    req_to_token: tl.tensor,
    req_pool_indices: tl.tensor,
    seq_lens: tl.tensor,
    query_lens: tl.tensor,
    packed_stride: tl.tensor,
    pitch: tl.tensor,
    table_step_stride: tl.tensor,
    table_row_stride: tl.tensor,
    pages_step_stride: tl.tensor,
    pages_row_stride: tl.tensor,
    flattened_stride: tl.tensor,
    req_to_token_stride: tl.tensor,
    pool_stride: tl.tensor,
    seq_stride: tl.tensor,
    query_stride: tl.tensor,
    num_steps: tl.tensor,
    bs: tl.tensor,
    num_rows: tl.tensor,
    rows_per_request: tl.tensor,
    width: tl.tensor,
    extra: tl.tensor,
    index_topk: tl.tensor,
    num_sms: tl.tensor,
    num_sm_parts: tl.tensor,
    programs_per_request: tl.tensor,
    ROW_LAYOUT: tl.constexpr,
    ADVANCING: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    HAS_PAGED_MQA: tl.constexpr,
    HAS_FLASHMLA: tl.constexpr,
    HAS_FLATTENED: tl.constexpr,
    SOURCE_ALIGNED: tl.constexpr,
    LENGTH_BLOCK: tl.constexpr,
    SM_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    FLASHMLA_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Programs by id, longest latency first so that nothing waits for it at the end:

    1. length fields, one program per distinct step (one in all when the steps are equal: it stores to each of them);
    2. schedules, one program per distinct step and schedule. Each needs the rows in order, so it first writes the
       length fields itself: the same values that programs of 1 write, which costs less than waiting for them;
    3. page tables (and other fields that have an entry per token), ``programs_per_request`` programs per request.

    No program waits for another, and the grid follows from the bucket alone.
    """
    pid = tl.program_id(0)
    stride = packed_stride.to(tl.int64)
    distinct = num_steps if ADVANCING else 1
    small_kinds: tl.constexpr = 1 + HAS_PAGED_MQA + HAS_FLASHMLA
    if pid < distinct * small_kinds:
        kind = pid // distinct
        step = pid - kind * distinct
        step_end = step + 1 if ADVANCING else num_steps
        write_lengths(
            packed, stride, pitch, step, step_end, seq_lens, seq_stride, query_lens, query_stride, bs, num_rows,
            rows_per_request, extra + step, index_topk, ROW_LAYOUT, LENGTH_BLOCK,
        )  # fmt: skip
        if small_kinds > 1:
            tl.debug_barrier()  # the stores above are this program's own loads below
            own = packed + step * stride
            paged_mqa = packed + pitch * NUM_GRAPH_FIELDS
            if HAS_PAGED_MQA:  # noqa: SIM102
                if kind == 1:
                    write_paged_mqa_schedule(
                        own + pitch * SEQLENS_EXPANDED, num_rows, paged_mqa, stride, step, step_end, num_sms, SM_BLOCK,
                        ROW_BLOCK,
                    )  # fmt: skip
            if HAS_FLASHMLA:  # noqa: SIM102
                if kind == small_kinds - 1:
                    flashmla = paged_mqa
                    if HAS_PAGED_MQA:
                        flashmla += tl.cdiv(2 * (num_sms + 1), 4) * 4
                    write_flashmla_schedule(
                        own + pitch * NSA_CACHE_SEQLENS, num_rows, flashmla, packed + pitch * FLASHMLA_NUM_SPLITS,
                        stride, stride, step, step_end, num_sm_parts, FLASHMLA_BLOCK,
                    )  # fmt: skip
    else:
        task = pid - distinct * small_kinds
        request = task // programs_per_request
        first = task - request * programs_per_request
        kv_len = tl.load(seq_lens + request * seq_stride).to(tl.int32) + extra
        pool_row = tl.load(req_pool_indices + request * pool_stride).to(tl.int64)
        source = req_to_token + pool_row * req_to_token_stride

        # Rows of this request. Prefill has one table row per request, and separate fields for its tokens.
        row_begin = request * rows_per_request
        row_end = row_begin + rows_per_request
        if ROW_LAYOUT != UNIFORM:
            q_len = tl.load(query_lens + request * query_stride).to(tl.int32)
            kv_begin, row_begin, nsa_begin = sums_before(
                request, seq_lens, seq_stride, query_lens, query_stride, rows_per_request, extra, index_topk,
                ROW_LAYOUT, LENGTH_BLOCK,
            )  # fmt: skip
            row_end = row_begin + q_len
        if ROW_LAYOUT == EXTEND:
            write_extend_rows(
                packed, stride, pitch, num_steps, request, kv_begin, row_begin, nsa_begin, kv_len, q_len, num_rows,
                index_topk, first, programs_per_request, LENGTH_BLOCK,
            )  # fmt: skip
            if HAS_FLATTENED:
                for chunk in range(first, tl.cdiv(kv_len, CHUNK), programs_per_request):
                    columns = chunk * CHUNK + tl.arange(0, CHUNK)
                    slots = tl.load(source + columns, mask=columns < kv_len, other=0)
                    for step in range(num_steps):
                        target = flattened + step * flattened_stride.to(tl.int64) + kv_begin + columns
                        tl.store(target, slots, mask=columns < kv_len)
            row_begin = request
            row_end = request + 1
        if ROW_LAYOUT == RAGGED:
            row_end = tl.minimum(row_end, num_rows)

        # The last step sees the most tokens; the cells of other steps beyond their own length are dead.
        length = kv_len
        if ADVANCING:
            length += num_steps - 1
        length = tl.where(row_begin < row_end, tl.minimum(length, width), 0)
        write_table_rows(
            source, length, table, table_step_stride.to(tl.int64), table_row_stride.to(tl.int64), pages,
            pages_step_stride.to(tl.int64), pages_row_stride.to(tl.int64), num_steps, row_begin, row_end, first,
            programs_per_request, PAGE_SIZE, PAGE_LANES, SOURCE_ALIGNED, CHUNK,
        )  # fmt: skip
