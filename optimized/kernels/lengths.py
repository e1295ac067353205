"""Length fields: one program does all requests of a step.

Why one program: the fields are prefix sums over the batch, and a batch is small (hundreds of numbers). One program with
a block-wide scan finishes before a second launch, or a look-back between programs, would have started.
"""

# mypy: disable-error-code="untyped-decorator"
# (Triton ships no types for its decorator)

from __future__ import annotations

import triton
import triton.language as tl

from nsa_oracle.optimized.kernels.fields import (
    CACHE_SEQLENS,
    CU_SEQLENS_K,
    CU_SEQLENS_Q,
    EXTEND,
    INDEXER_K_END,
    INDEXER_K_START,
    NSA_CACHE_SEQLENS,
    NSA_CU_SEQLENS_K,
    NSA_CU_SEQLENS_Q,
    SEQLENS_EXPANDED,
    TOKEN_TO_BATCH_IDX,
    TOPK_INDICES_OFFSET,
    UNIFORM,
)


@triton.jit
def capped_sum(count: tl.tensor, cap: tl.tensor) -> tl.tensor:
    """Sum of min(t, cap) for t = 1..count (0 for count <= 0), int32.

    A request's query tokens see consecutive lengths, so the keys of any run of them are a difference of two of these:
    no program has to walk over tokens to know a token's place in ``nsa_cu_seqlens_k``.
    """
    positive = tl.maximum(count, 0).to(tl.int64)
    head = tl.minimum(positive, cap)
    return (((head * (head + 1)) >> 1) + (positive - head) * cap).to(tl.int32)


@triton.jit
def load_lengths(
    seq_lens: tl.tensor,
    seq_stride: tl.tensor,
    query_lens: tl.tensor,
    query_stride: tl.tensor,
    requests: tl.tensor,
    valid: tl.tensor,
    rows_per_request: tl.tensor,
    extra: tl.tensor,
    ROW_LAYOUT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """KV length and number of query tokens of ``requests``; both 0 where not ``valid``."""
    kv_lens = tl.load(seq_lens + requests * seq_stride, mask=valid, other=0).to(tl.int32) + extra
    if ROW_LAYOUT == UNIFORM:
        q_lens = tl.where(valid, rows_per_request, 0)
    else:
        q_lens = tl.load(query_lens + requests * query_stride, mask=valid, other=0).to(tl.int32)
    return tl.where(valid, kv_lens, 0), q_lens


@triton.jit
def write_lengths(
    packed: tl.tensor,
    step_stride: tl.tensor,
    pitch: tl.tensor,
    step_begin: tl.tensor,
    step_end: tl.tensor,
    seq_lens: tl.tensor,
    seq_stride: tl.tensor,
    query_lens: tl.tensor,
    query_stride: tl.tensor,
    bs: tl.tensor,
    num_rows: tl.tensor,
    rows_per_request: tl.tensor,
    extra: tl.tensor,
    index_topk: tl.tensor,
    ROW_LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Computes the length fields once and stores them to steps ``step_begin .. step_end - 1``.

    ``packed`` int32, ``step_stride`` int64. KV length = seq_lens + ``extra``. Rows beyond the live ones get length 0
    and repeat the last ``nsa_cu_seqlens_k``. In EXTEND the per-token fields are left to ``write_extend_rows``.
    """
    lanes = tl.arange(0, BLOCK)
    for step in range(step_begin, step_end):
        base = packed + step * step_stride
        tl.store(base + pitch * CU_SEQLENS_K, 0)
        tl.store(base + pitch * NSA_CU_SEQLENS_K, 0)
        tl.store(base + pitch * CU_SEQLENS_Q, 0)
        tl.store(base + pitch * NSA_CU_SEQLENS_Q, 0)

    # 1. Requests, a block at a time; the three totals carry the prefix sums over from the blocks before.
    kv_total = bs * 0
    row_total = bs * 0
    nsa_total = bs * 0
    for start in range(0, bs, BLOCK):
        requests = start + lanes
        valid = requests < bs
        kv_lens, q_lens = load_lengths(
            seq_lens, seq_stride, query_lens, query_stride, requests, valid, rows_per_request, extra, ROW_LAYOUT
        )
        kv_ends = kv_total + tl.cumsum(kv_lens, 0)
        row_ends = row_total + tl.cumsum(q_lens, 0)
        unseen = capped_sum(kv_lens - q_lens, index_topk)
        nsa_lens = capped_sum(kv_lens, index_topk) - unseen
        nsa_begins = nsa_total + tl.cumsum(nsa_lens, 0) - nsa_lens
        for step in range(step_begin, step_end):
            base = packed + step * step_stride
            tl.store(base + pitch * CACHE_SEQLENS + requests, kv_lens, mask=valid)
            tl.store(base + pitch * CU_SEQLENS_K + requests + 1, kv_ends, mask=valid)
            if ROW_LAYOUT == EXTEND:
                tl.store(base + pitch * CU_SEQLENS_Q + requests + 1, row_ends, mask=valid)

        # 2. Their query tokens: the j-th of all requests at once (j runs to a handful, requests to hundreds).
        if ROW_LAYOUT != EXTEND:
            for j in range(rows_per_request):
                rows = row_ends - q_lens + j
                live = valid & (j < q_lens) & (rows < num_rows)
                position = kv_lens - q_lens + 1 + j
                expanded = tl.maximum(position, 0)
                nsa_ends = nsa_begins + capped_sum(position, index_topk) - unseen
                for step in range(step_begin, step_end):
                    base = packed + step * step_stride + rows
                    tl.store(base + pitch * SEQLENS_EXPANDED, expanded, mask=live)
                    tl.store(base + pitch * NSA_CACHE_SEQLENS, tl.minimum(expanded, index_topk), mask=live)
                    tl.store(base + pitch * NSA_CU_SEQLENS_K + 1, nsa_ends, mask=live)
                    tl.store(base + pitch * CU_SEQLENS_Q + 1, rows + 1, mask=live)
                    tl.store(base + pitch * NSA_CU_SEQLENS_Q + 1, rows + 1, mask=live)
        kv_total += tl.sum(kv_lens, 0)
        row_total += tl.sum(q_lens, 0)
        nsa_total += tl.sum(nsa_lens, 0)

    # 3. The tail: rows that the graph reserves and this batch does not use.
    if ROW_LAYOUT != EXTEND:
        for start in range(row_total, num_rows, BLOCK):
            rows = start + lanes
            tail = rows < num_rows
            for step in range(step_begin, step_end):
                base = packed + step * step_stride + rows
                tl.store(base + pitch * SEQLENS_EXPANDED, 0, mask=tail)
                tl.store(base + pitch * NSA_CACHE_SEQLENS, 0, mask=tail)
                tl.store(base + pitch * NSA_CU_SEQLENS_K + 1, nsa_total, mask=tail)
                tl.store(base + pitch * CU_SEQLENS_Q + 1, rows + 1, mask=tail)
                tl.store(base + pitch * NSA_CU_SEQLENS_Q + 1, rows + 1, mask=tail)


@triton.jit
def sums_before(
    request: tl.tensor,
    seq_lens: tl.tensor,
    seq_stride: tl.tensor,
    query_lens: tl.tensor,
    query_stride: tl.tensor,
    rows_per_request: tl.tensor,
    extra: tl.tensor,
    index_topk: tl.tensor,
    ROW_LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Tokens of KV, rows, and selected keys of all requests before ``request``.

    A program that needs one request's place in a ragged batch sums the lengths before it itself: they are one cached
    vector load, which is cheaper than waiting for another program.
    """
    kv_sum = request * 0
    row_sum = request * 0
    nsa_sum = request * 0
    for start in range(0, request, BLOCK):
        requests = start + tl.arange(0, BLOCK)
        kv_lens, q_lens = load_lengths(
            seq_lens,
            seq_stride,
            query_lens,
            query_stride,
            requests,
            requests < request,
            rows_per_request,
            extra,
            ROW_LAYOUT,
        )
        kv_sum += tl.sum(kv_lens, 0)
        row_sum += tl.sum(q_lens, 0)
        nsa_sum += tl.sum(capped_sum(kv_lens, index_topk) - capped_sum(kv_lens - q_lens, index_topk), 0)
    return kv_sum, row_sum, nsa_sum


@triton.jit
def write_extend_rows(
    packed: tl.tensor,
    step_stride: tl.tensor,
    pitch: tl.tensor,
    num_steps: tl.tensor,
    request: tl.tensor,
    kv_begin: tl.tensor,
    row_begin: tl.tensor,
    nsa_begin: tl.tensor,
    kv_len: tl.tensor,
    q_len: tl.tensor,
    num_rows: tl.tensor,
    index_topk: tl.tensor,
    first: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Per-token fields of one request of a prefill, blocks ``first``, ``first + stride``, ... of its tokens.

    A request has thousands of tokens here, so its tokens are computed in parallel.
    """
    unseen = capped_sum(kv_len - q_len, index_topk)
    for block in range(first, tl.cdiv(q_len, BLOCK), stride):
        tokens = block * BLOCK + tl.arange(0, BLOCK)
        rows = row_begin + tokens
        live = (tokens < q_len) & (rows < num_rows)
        position = kv_len - q_len + 1 + tokens
        expanded = tl.maximum(position, 0)
        nsa_ends = nsa_begin + capped_sum(position, index_topk) - unseen
        for step in range(num_steps):
            base = packed + step * step_stride + rows
            tl.store(base + pitch * SEQLENS_EXPANDED, expanded, mask=live)
            tl.store(base + pitch * NSA_CACHE_SEQLENS, tl.minimum(expanded, index_topk), mask=live)
            tl.store(base + pitch * NSA_CU_SEQLENS_K + 1, nsa_ends, mask=live)
            tl.store(base + pitch * NSA_CU_SEQLENS_Q + 1, rows + 1, mask=live)
            tl.store(base + pitch * TOPK_INDICES_OFFSET, kv_begin, mask=live)
            tl.store(base + pitch * INDEXER_K_START, kv_begin, mask=live)
            tl.store(base + pitch * INDEXER_K_END, kv_begin + expanded, mask=live)
            tl.store(base + pitch * TOKEN_TO_BATCH_IDX, request, mask=live)


_EXPAND_SCALARS = [
    "packed", "seq_lens", "query_lens", "step_stride", "pitch", "num_steps", "seq_stride", "query_stride", "bs",
    "num_rows", "rows_per_request", "extra", "index_topk",
]  # fmt: skip


@triton.jit(do_not_specialize=_EXPAND_SCALARS, do_not_specialize_on_alignment=_EXPAND_SCALARS)
def expand_seqlens_kernel(
    packed: tl.tensor,
    seq_lens: tl.tensor,
    query_lens: tl.tensor,
    step_stride: tl.tensor,
    pitch: tl.tensor,
    num_steps: tl.tensor,
    seq_stride: tl.tensor,
    query_stride: tl.tensor,
    bs: tl.tensor,
    num_rows: tl.tensor,
    rows_per_request: tl.tensor,
    extra: tl.tensor,
    index_topk: tl.tensor,
    ROW_LAYOUT: tl.constexpr,
    ADVANCING: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """All length fields. Grid: one program per distinct step; then, in EXTEND, one per request for its tokens."""
    pid = tl.program_id(0)
    stride = step_stride.to(tl.int64)
    distinct = num_steps if ADVANCING else 1
    if pid < distinct:
        step_end = pid + 1 if ADVANCING else num_steps
        write_lengths(
            packed, stride, pitch, pid, step_end, seq_lens, seq_stride, query_lens, query_stride, bs, num_rows,
            rows_per_request, extra + pid, index_topk, ROW_LAYOUT, BLOCK,
        )  # fmt: skip
    elif ROW_LAYOUT == EXTEND:
        request = pid - distinct
        kv_begin, row_begin, nsa_begin = sums_before(
            request,
            seq_lens,
            seq_stride,
            query_lens,
            query_stride,
            rows_per_request,
            extra,
            index_topk,
            ROW_LAYOUT,
            BLOCK,
        )
        kv_len = tl.load(seq_lens + request * seq_stride).to(tl.int32) + extra
        q_len = tl.load(query_lens + request * query_stride).to(tl.int32)
        write_extend_rows(
            packed, stride, pitch, num_steps, request, kv_begin, row_begin, nsa_begin, kv_len, q_len, num_rows,
            index_topk, 0, 1, BLOCK,
        )  # fmt: skip
