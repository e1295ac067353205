"""The best tokens of each row, in ascending order of position: one program selects for one row."""

# mypy: disable-error-code="untyped-decorator"
# (Triton ships no types for its decorator)

from __future__ import annotations

import triton
import triton.language as tl

from optimized.kernels.fp8 import FLOAT32_ABS, FLOAT32_INF

# What a selected position becomes.
POSITIONS = tl.constexpr(0)  # itself
PAGED = tl.constexpr(1)  # the slot that the row's page table has there
RAGGED = tl.constexpr(2)  # its place in the concatenated KV of the batch

NO_KEY = tl.constexpr(-0x80000000)  # below the key of every number
NEGATIVE_INF_BITS = tl.constexpr(-0x00800000)
COUNT_BITS = tl.constexpr(16)  # of the lower of two counts in one int32
LINE = tl.constexpr(32)  # lanes of a warp
COUNT_MASK = tl.constexpr(0xFFFF)


@triton.jit
def order_key(x: tl.tensor) -> tl.tensor:
    """float32 as int32 in the same order: -0.0 equals 0.0, NaN equals -inf."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & FLOAT32_ABS
    bits = tl.where(magnitude > FLOAT32_INF, NEGATIVE_INF_BITS, bits)
    bits = tl.where(magnitude == 0, 0, bits)
    return bits ^ ((bits >> 31) & FLOAT32_ABS)


@triton.jit
def kth_largest(keys: tl.tensor, valid: tl.tensor, count: tl.tensor, k: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """A threshold for the ``k`` largest of the ``count`` ``valid`` keys (more than ``k``), and how many ties to take.

    Every key above the threshold is selected, and of those equal to it the first ``ties``. By bisection: a step counts
    keys in registers, which is one comparison each. It ends as soon as a threshold is met by exactly ``k`` keys, which
    for numbers without ties takes half of the 32 steps that it can take at most.
    """
    low = tl.min(tl.where(valid, keys, FLOAT32_ABS), 0)  # met by all
    high = tl.max(keys, 0) + 1  # met by none; no key is the largest int32
    at_low = count
    at_high = count * 0
    middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, which int32 has a place for
    while (middle > low) & (at_low > k):
        at_middle = tl.sum((keys >= middle).to(tl.int32), 0)
        enough = at_middle >= k
        low = tl.where(enough, middle, low)
        at_low = tl.where(enough, at_middle, at_low)
        high = tl.where(enough, high, middle)
        at_high = tl.where(enough, at_high, at_middle)
        middle = (low & high) + ((low ^ high) >> 1)
    return low, tl.where(at_low == k, k, k - at_high)


@triton.jit
def transform(
    positions: tl.tensor,
    selected: tl.tensor,
    table: tl.tensor,
    offset: tl.tensor,
    TRANSFORM: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """What is stored for ``positions``, where they are ``selected``."""
    if TRANSFORM == PAGED:
        return tl.load(table + positions, mask=selected, other=-1)
    if TRANSFORM == RAGGED:
        return positions + offset
    return positions


@triton.jit
def load_keys(
    row_logits: tl.tensor,
    out: tl.tensor,
    lanes: tl.tensor,
    begin: tl.tensor,
    kept: tl.tensor,
    count: tl.tensor,
    HAS_KEPT: tl.constexpr,  # noqa: N803
) -> tuple[tl.tensor, tl.tensor]:
    """Keys and positions of ``lanes``: first the ``kept`` positions in ``out``, then those from ``begin``."""
    positions = begin - kept + lanes
    if HAS_KEPT:
        positions = tl.where(lanes < kept, tl.load(out + lanes, mask=lanes < kept, other=0), positions)
    keys = order_key(tl.load(row_logits + positions, mask=lanes < count, other=0.0))
    return tl.where(lanes < count, keys, NO_KEY), positions


@triton.jit
def select_block(
    row_logits: tl.tensor,
    out: tl.tensor,
    begin: tl.tensor,
    length: tl.tensor,
    k: tl.tensor,
    table: tl.tensor,
    offset: tl.tensor,
    HAS_KEPT: tl.constexpr,  # noqa: N803
    TRANSFORM: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    EMIT_BLOCK: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """The best ``k`` among the best so far and the tokens from ``begin`` that fit with them; returns where they end.

    HAS_KEPT: ``out`` holds the ``k`` positions selected before ``begin``, else ``begin`` is 0. They come first, so that
    lanes are in the order of positions. There must be more than ``k`` tokens.
    """
    kept = begin * 0
    if HAS_KEPT:
        kept += k
    end = tl.minimum(begin + BLOCK - kept, length)
    count = kept + end - begin
    lanes = tl.arange(0, BLOCK)
    keys, _ = load_keys(row_logits, out, lanes, begin, kept, count, HAS_KEPT)
    threshold, ties = kth_largest(keys, lanes < count, count, k)

    # Store what is selected. The keys are loaded again, piece by piece: they are in the cache, and the search needed
    # the registers. A piece overwrites nothing in ``out`` that a later one reads: no lane moves up.
    before = count * 0  # selected so far, in the two counts below
    for start in range(0, count, EMIT_BLOCK):
        piece = start + tl.arange(0, EMIT_BLOCK)
        piece_keys, positions = load_keys(row_logits, out, piece, begin, kept, count, HAS_KEPT)
        # Both counts that decide a lane's place in one scan: larger keys above, ties below.
        larger = piece_keys > threshold
        tied = piece_keys == threshold
        counted = (larger.to(tl.int32) << COUNT_BITS) | tied.to(tl.int32)
        # A line is what a warp scans by shuffles; a scan along a piece would cost each warp a look at all others.
        lines = tl.reshape(counted, [EMIT_BLOCK // LINE, LINE])
        line_totals = tl.sum(lines, 1)
        before_line = before + tl.cumsum(line_totals, 0) - line_totals
        counts = tl.reshape(before_line[:, None] + tl.cumsum(lines, 1) - lines, [EMIT_BLOCK])
        ties_before = counts & COUNT_MASK
        selected = larger | (tied & (ties_before < ties))
        places = (counts >> COUNT_BITS) + tl.minimum(ties_before, ties)
        values = positions
        if TRANSFORM != POSITIONS:
            final = piece < tl.where(end == length, count, 0)  # what the last block selects is what is selected
            values = tl.where(final, transform(positions, selected & final, table, offset, TRANSFORM), positions)
        tl.store(out + places, values, mask=selected)
        before += tl.sum(line_totals, 0)
    return end


_RUNTIME = [
    "out", "logits", "seqlens_expanded", "table", "offsets", "logits_stride", "lengths_stride", "table_stride",
    "offsets_stride", "width", "k",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_RUNTIME)
def topk_kernel(
    out: tl.tensor,
    logits: tl.tensor,
    seqlens_expanded: tl.tensor,
    table: tl.tensor,
    offsets: tl.tensor,
    logits_stride: tl.tensor,
    lengths_stride: tl.tensor,
    table_stride: tl.tensor,
    offsets_stride: tl.tensor,
    width: tl.tensor,
    k: tl.tensor,
    TRANSFORM: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    SHORT_BLOCK: tl.constexpr,  # noqa: N803
    EMIT_BLOCK: tl.constexpr,  # noqa: N803
    COPY_BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """One program per row; ``out`` [rows, k] is dense. BLOCK and SHORT_BLOCK exceed ``k``.

    1. A row of at most ``k`` tokens selects all of them: no logit is read.
    2. A row that fits into a block is selected in registers, where each step of the search is cheap. A table is as
       wide as the context and most rows are much shorter, so there is a block for those as well.
    3. Of a longer row, the best so far meet the next tokens, a block at a time. ``out`` keeps them in between.
    """
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(seqlens_expanded + row * lengths_stride)
    length = tl.minimum(tl.maximum(length, 0), width).to(tl.int32)
    row_out = out + row * k
    row_logits = logits + row * logits_stride
    row_table = table + row * table_stride
    offset = length * 0
    if TRANSFORM == RAGGED:
        offset = tl.load(offsets + row * offsets_stride).to(tl.int32)

    if length <= k:
        for start in range(0, k, COPY_BLOCK):
            positions = start + tl.arange(0, COPY_BLOCK)
            live = positions < length
            values = tl.where(live, transform(positions, live, row_table, offset, TRANSFORM), -1)
            tl.store(row_out + positions, values, mask=positions < k)
    elif length <= SHORT_BLOCK:
        select_block(
            row_logits, row_out, length * 0, length, k, row_table, offset, False, TRANSFORM, SHORT_BLOCK, EMIT_BLOCK
        )  # fmt: skip
    else:
        begin = select_block(
            row_logits, row_out, length * 0, length, k, row_table, offset, False, TRANSFORM, BLOCK, EMIT_BLOCK
        )  # fmt: skip
        while begin < length:
            tl.debug_barrier()  # what the last block stored, this one loads
            begin = select_block(
                row_logits, row_out, begin, length, k, row_table, offset, True, TRANSFORM, BLOCK, EMIT_BLOCK
            )  # fmt: skip
