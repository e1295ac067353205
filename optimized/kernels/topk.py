"""The best tokens of each row, in ascending order of position.

One program selects from a row that fits into a block. Of a longer row, several programs first keep only the tokens that
are likely among the best, so that the selecting program has few left.
"""

# mypy: disable-error-code="untyped-decorator"
# (Triton ships no types for its decorator)

from __future__ import annotations

import triton
import triton.language as tl

from nsa_oracle.optimized.kernels.fp8 import FLOAT32_ABS, INTERPRETED

# What a selected position becomes.
POSITIONS = tl.constexpr(0)  # itself
PAGED = tl.constexpr(1)  # the slot that the row's page table has there
RAGGED = tl.constexpr(2)  # its place in the concatenated KV of the batch

NAN_BITS = tl.constexpr(0x7FC00000)
LARGEST_KEY = tl.constexpr(0x7F7FFFFF)  # order key of the largest number that is not infinite
LINE = tl.constexpr(32)  # lanes of a warp
COUNT_BITS = tl.constexpr(16)  # of the lower of two counts that are packed in one number
COUNT_UNIT = tl.constexpr(0x10000)  # of the upper one
FIELD_BITS = tl.constexpr(8)  # of each of four counts that are packed in one int32; none exceeds LINE
FIELD_MASK = tl.constexpr(0xFF)
SHARE_UNIT = tl.constexpr(128)  # tokens: shares are multiples of it, so that each starts on a cache line

# The sample that estimates which tokens are worth keeping.
MEMBERS = tl.constexpr(16)  # tokens per group, at most
RUN = tl.constexpr(8)  # neighbouring tokens that are read together: a sector of memory
MARGIN = tl.constexpr(4.0)  # standard deviations
SCATTER = tl.constexpr(40503)  # 2^16 divided by the golden ratio: its multiples are spread evenly
SCATTER_BITS = tl.constexpr(16)
SCATTER_MASK = tl.constexpr(0xFFFF)


@triton.jit
def number_or(x: tl.tensor, other: float) -> tl.tensor:
    """``x``, and ``other`` where it is NaN."""
    return tl.where(x == x, x, other)


@triton.jit
def score(logits: tl.tensor) -> tl.tensor:
    """The score of a logit: NaN counts as -inf."""
    return number_or(logits, float("-inf"))


@triton.jit
def skipped(scores: tl.tensor, other: float) -> tl.tensor:
    """``scores`` as operands of a minimum or maximum that ignores NaN; ``other`` is its neutral element.

    Compiled reductions ignore NaN anyway. The interpreter's warn if all operands are NaN.
    """
    return number_or(scores, other) if INTERPRETED else scores


@triton.jit
def order_key(bits: tl.tensor) -> tl.tensor:
    """Bits of a float32 to an int32 with the order of the float32, and back."""
    return bits ^ ((bits >> 31) & FLOAT32_ABS)


@triton.jit
def from_key(key: tl.tensor) -> tl.tensor:
    """The float32 whose order key this is."""
    return order_key(key).to(tl.float32, bitcast=True)


@triton.jit
def reaches(scores: tl.tensor, threshold: tl.tensor) -> tl.tensor:
    """1.0 where ``scores`` are at least ``threshold``, else 0.0; NaN never is.

    This is one instruction, on a pipe that the following sum leaves free. LLVM by itself makes five integer ones.
    """
    if INTERPRETED:
        return (scores >= threshold).to(tl.float32)
    return tl.inline_asm_elementwise(
        "set.ge.f32.f32 $0, $1, $2;", "=f,f,f", [scores, threshold], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def kth_largest(
    scores: tl.tensor,
    count: tl.tensor,
    k: tl.tensor,
    slack: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A threshold that at least ``k`` of the ``count`` scores reach, how many reach it, and how many exceed it.

    More than ``k + slack`` reach it only if many are equal to it. NaN is not a score. COLUMNS: threads of the program.

    Each step tries two thresholds: one interpolated from the counts so far, which is usually close, and the middle of
    the remaining order keys, which limits the search to 32 steps whatever the scores.
    """
    tile = tl.reshape(scores, [scores.shape[0] // COLUMNS, COLUMNS])
    smallest = number_or(tl.min(skipped(tile, float("inf")), 0), float("inf"))
    largest = number_or(tl.max(skipped(tile, float("-inf")), 0), float("-inf"))
    low = tl.min(order_key(smallest.to(tl.int32, bitcast=True)), 0)  # reached by all
    high = tl.max(order_key(largest.to(tl.int32, bitcast=True)), 0) + 1  # reached by none
    at_low = count
    at_high = count * 0
    while (high - low != 1) & (at_low > k + slack):
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        part = (at_low - k).to(tl.float32) / (at_low - at_high).to(tl.float32)
        least = from_key(tl.maximum(low, -LARGEST_KEY - 1))
        most = from_key(tl.minimum(high, LARGEST_KEY))
        guess = order_key((least * (1.0 - part) + most * part).to(tl.int32, bitcast=True))
        guess = tl.minimum(tl.maximum(guess, low + 1), high - 1)
        lower = tl.minimum(guess, middle)
        upper = tl.maximum(guess, middle)
        # Both counts of a thread are small enough to be packed in one float32.
        counts = tl.sum(reaches(tile, from_key(lower)), 0) + tl.sum(reaches(tile, from_key(upper)), 0) * COUNT_UNIT
        counts = tl.sum(counts.to(tl.int32), 0)
        at_lower = counts & (COUNT_UNIT - 1)
        at_upper = counts >> COUNT_BITS
        low = tl.where(at_upper >= k, upper, tl.where(at_lower >= k, lower, low))
        at_low = tl.where(at_upper >= k, at_upper, tl.where(at_lower >= k, at_lower, at_low))
        high = tl.where(at_lower < k, lower, tl.where(at_upper < k, upper, high))
        at_high = tl.where(at_lower < k, at_lower, tl.where(at_upper < k, at_upper, at_high))
    return from_key(low), at_low, at_high


@triton.jit
def ranks(selected: tl.tensor, COLUMNS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Number of ``selected`` lanes up to and including each lane, and in all. COLUMNS: threads of the program.

    A line is what a warp scans by shuffles. Four lines are scanned at once, in the fields of one int32. Then the sums
    of all lines are scanned.
    """
    N: tl.constexpr = selected.shape[0]
    FIELDS: tl.constexpr = min(4, N // COLUMNS)
    WORDS: tl.constexpr = N // COLUMNS // FIELDS
    LINES: tl.constexpr = COLUMNS // LINE
    shift = tl.arange(0, FIELDS) * FIELD_BITS
    words = tl.sum(tl.reshape(selected.to(tl.int32), [WORDS, FIELDS, COLUMNS]) << shift[None, :, None], 1)
    words = tl.reshape(words, [WORDS, LINES, LINE])
    sums = (tl.sum(words, 2)[:, None, :] >> shift[None, :, None]) & FIELD_MASK
    sums = tl.reshape(sums, [N // LINE])
    before_line = tl.reshape(tl.cumsum(sums, 0) - sums, [WORDS, FIELDS, LINES, 1])
    within_line = (tl.cumsum(words, 2)[:, None, :, :] >> shift[None, :, None, None]) & FIELD_MASK
    return tl.reshape(before_line + within_line, [N]), tl.sum(sums, 0)


@triton.jit
def transform(
    positions: tl.tensor,
    selected: tl.tensor,
    table: tl.tensor,
    offset: tl.tensor,
    TRANSFORM: tl.constexpr,
) -> tl.tensor:
    """The values to store for ``positions``; those that are not ``selected`` are undefined."""
    if TRANSFORM == PAGED:
        return tl.load(table + positions, mask=selected, other=-1)
    if TRANSFORM == RAGGED:
        return positions + offset
    return positions


@triton.jit
def select(
    out: tl.tensor,
    scores: tl.tensor,
    positions: tl.tensor,
    count: tl.tensor,
    k: tl.tensor,
    is_final: tl.tensor,
    table: tl.tensor,
    offset: tl.tensor,
    TRANSFORM: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Store the best ``k`` of ``count`` tokens (at least ``k``), whose ``positions`` ascend. NaN: a lane without token.

    is_final: whether these are the row's result. If not, positions are stored as they are.
    """
    threshold, at_threshold, above = kth_largest(scores, count, k, k * 0, COLUMNS)
    selected = scores >= threshold
    if at_threshold > k:
        tied = scores == threshold
        ties, _ = ranks(tied, COLUMNS)
        selected = selected & ((scores > threshold) | (ties <= k - above))
    places, _ = ranks(selected, COLUMNS)
    values = positions
    if is_final:
        values = transform(positions, selected, table, offset, TRANSFORM)
    tl.store(out - 1 + places, values, mask=selected)


@triton.jit
def likely_threshold(
    logits: tl.tensor,
    length: tl.tensor,
    k: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """A threshold that probably somewhat more than ``k`` of a row's ``length`` scores reach, the same in every program.

    NaN, which no score reaches, if too few scores exceed -inf. The row must have room for the sample: a length of at
    least MEMBERS * COLUMNS, or a ``k`` of at least COLUMNS.

    A sample of the row is divided into COLUMNS groups of ``length / k`` tokens (at most MEMBERS), so that most groups
    contain one or two of the ``k`` best. The share of groups whose best score reaches a threshold then tells how many
    tokens reach it. The members of a group are runs of neighbours from all parts of the row, at positions without a
    period.
    """
    members = tl.minimum(length // k, MEMBERS)
    runs = members * (COLUMNS // RUN)
    stride = length // runs
    lanes = tl.arange(0, MEMBERS * COLUMNS)
    member = lanes // COLUMNS
    shift = ((member * SCATTER) & SCATTER_MASK) * tl.maximum(stride - RUN + 1, 0) >> SCATTER_BITS
    positions = length - runs * stride + lanes // RUN * stride + shift + lanes % RUN
    sample = tl.load(logits + positions, mask=member < members, other=float("-inf"))
    best = score(tl.max(skipped(tl.reshape(sample, [MEMBERS, COLUMNS]), float("-inf")), 0))

    # Groups that have one of the k best, if these are spread at random, plus a margin that is hardly ever exceeded.
    miss = tl.exp2(members.to(tl.float32) * tl.log2(1.0 - k.to(tl.float32) / length.to(tl.float32)))
    expected = COLUMNS * (1.0 - miss)
    wanted = (expected + MARGIN * tl.sqrt(expected * miss)).to(tl.int32) + 3
    wanted = tl.minimum(wanted, COLUMNS)
    threshold, _, _ = kth_largest(best, wanted * 0 + COLUMNS, wanted, wanted // 16, COLUMNS)
    return tl.where(threshold > float("-inf"), threshold, float("nan"))


_FILTER_RUNTIME = [
    "likely", "counts", "logits", "seqlens_expanded", "logits_stride", "lengths_stride", "width", "k", "num_shares",
]  # fmt: skip


@triton.jit(do_not_specialize=_FILTER_RUNTIME, do_not_specialize_on_alignment=_FILTER_RUNTIME)
def topk_filter_kernel(
    likely: tl.tensor,
    counts: tl.tensor,
    logits: tl.tensor,
    seqlens_expanded: tl.tensor,
    logits_stride: tl.tensor,
    lengths_stride: tl.tensor,
    width: tl.tensor,
    k: tl.tensor,
    num_shares: tl.tensor,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Keep the tokens of each row that are likely among its best: ``num_shares`` programs per row, each for its share.

    Tokens that are kept go to dense likely [rows, num_shares, CAPACITY] int64, in ascending order of position: the bits
    of the score, then 32 bits of position. The last line is filled up with NaN. Their number goes to dense counts
    [rows, num_shares] int32. If it exceeds CAPACITY, not all tokens are stored. Of a row of at most CAPACITY tokens,
    none is kept. The caller must check that enough were kept, since the threshold is estimated from a sample.
    """
    program = tl.program_id(0)
    row = (program // num_shares).to(tl.int64)
    share = program % num_shares
    length = tl.load(seqlens_expanded + row * lengths_stride)
    length = tl.minimum(tl.maximum(length, 0), width).to(tl.int32)
    row_logits = logits + row * logits_stride
    kept = likely + program.to(tl.int64) * CAPACITY
    count = length * 0
    if length > CAPACITY:
        size = tl.cdiv(tl.cdiv(length, num_shares), SHARE_UNIT) * SHARE_UNIT
        begin = share * size
        end = tl.minimum(begin + size, length)
        lanes = tl.arange(0, BLOCK)
        following = tl.load(row_logits + begin + lanes, mask=lanes < end - begin, other=float("nan"))  # a block ahead
        threshold = likely_threshold(row_logits, length, k, COLUMNS)
        for start in range(begin, end, BLOCK):
            block_logits = following
            ahead = start + BLOCK
            following = tl.load(row_logits + ahead + lanes, mask=lanes < end - ahead, other=float("nan"))
            is_likely = block_logits >= threshold
            places, total = ranks(is_likely, COLUMNS)
            if count + total <= CAPACITY:
                entries = (block_logits.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (start + lanes)
                tl.store(kept + count - 1 + places, entries, mask=is_likely)
            count += total
        lines = tl.arange(0, LINE)
        nothing = tl.full([LINE], NAN_BITS, tl.int64) << 32
        tl.store(kept + count + lines, nothing, mask=lines < tl.minimum(-count & (LINE - 1), CAPACITY - count))
    tl.store(counts + program, count)


@triton.jit
def load_kept(
    kept: tl.tensor,
    first_lines: tl.tensor,
    num_lines: tl.tensor,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Scores and positions that were ``kept`` of a row, share after share, in whole lines; NaN in the other lanes.

    first_lines: number of lines before those of each share.
    """
    line = tl.arange(0, BLOCK // LINE)
    shares = tl.arange(0, first_lines.shape[0])
    # Compared with memory, a share's lines are moved down by the lines that the shares before it leave unused.
    moved = shares * (CAPACITY // LINE) - first_lines
    moved = tl.max(tl.where(first_lines[:, None] <= line[None, :], moved[:, None], 0), 0)
    live = tl.reshape(tl.broadcast_to((line < num_lines)[:, None], [BLOCK // LINE, LINE]), [BLOCK])
    places = tl.reshape(((line + moved) * LINE)[:, None] + tl.arange(0, LINE)[None, :], [BLOCK])
    entries = tl.load(kept + places, mask=live, other=NAN_BITS << 32)
    return (entries >> 32).to(tl.int32).to(tl.float32, bitcast=True), entries.to(tl.int32)


@triton.jit
def load_tokens(
    logits: tl.tensor,
    out: tl.tensor,
    begin: tl.tensor,
    best: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Scores and positions of ``count`` tokens: ``best`` of them in ``out``, then those from ``begin`` on; else NaN."""
    lanes = tl.arange(0, BLOCK)
    positions = tl.where(lanes < best, tl.load(out + lanes, mask=lanes < best, other=0), begin - best + lanes)
    scores = score(tl.load(logits + positions, mask=lanes < count, other=0.0))
    return tl.where(lanes < count, scores, float("nan")), positions


_RUNTIME = [
    "out", "logits", "seqlens_expanded", "table", "offsets", "likely", "counts", "logits_stride", "lengths_stride",
    "table_stride", "offsets_stride", "width", "k", "num_shares",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_RUNTIME)
def topk_kernel(
    out: tl.tensor,
    logits: tl.tensor,
    seqlens_expanded: tl.tensor,
    table: tl.tensor,
    offsets: tl.tensor,
    likely: tl.tensor,
    counts: tl.tensor,
    logits_stride: tl.tensor,
    lengths_stride: tl.tensor,
    table_stride: tl.tensor,
    offsets_stride: tl.tensor,
    width: tl.tensor,
    k: tl.tensor,
    num_shares: tl.tensor,
    TRANSFORM: tl.constexpr,
    FILTERED: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALL_BLOCK: tl.constexpr,
    MAX_SHARES: tl.constexpr,
    COLUMNS: tl.constexpr,
    COPY_BLOCK: tl.constexpr,
) -> None:
    """One program per row; ``out`` [rows, k] is dense. Without FILTERED no row is longer than BLOCK.

    1. A row of at most ``k`` tokens selects all of them.
    2. With FILTERED, a row selects from the tokens that ``topk_filter_kernel`` kept, if they are enough and fit.
    3. Otherwise it selects from all its tokens, in steps: from the best so far, which are kept in ``out``, and as many
       of the next tokens as fit. Such rows are rare (the filter's sample was misleading) or take a single step (short).
    """
    row = tl.program_id(0).to(tl.int64)
    row_out = out + row * k
    row_logits = logits + row * logits_stride
    row_table = table + row * table_stride
    lanes = tl.arange(0, BLOCK)
    if not FILTERED:  # the full width, before the row's length is known: this saves a wait
        scores = score(tl.load(row_logits + lanes, mask=lanes < width, other=0.0))
    length = tl.load(seqlens_expanded + row * lengths_stride)
    length = tl.minimum(tl.maximum(length, 0), width).to(tl.int32)
    offset = length * 0
    if TRANSFORM == RAGGED:
        offset = tl.load(offsets + row * offsets_stride).to(tl.int32)

    if length <= k:
        for start in range(0, k, COPY_BLOCK):
            tokens = start + tl.arange(0, COPY_BLOCK)
            live = tokens < length
            result = tl.where(live, transform(tokens, live, row_table, offset, TRANSFORM), -1)
            tl.store(row_out + tokens, result, mask=tokens < k)
    elif not FILTERED:
        scores = tl.where(lanes < length, scores, float("nan"))
        select(row_out, scores, lanes, length, k, length > 0, row_table, offset, TRANSFORM, COLUMNS)
    else:
        shares = tl.arange(0, MAX_SHARES)
        share_counts = tl.load(counts + row * num_shares + shares, mask=shares < num_shares, other=0)
        share_lines = tl.cdiv(share_counts, LINE)
        first_lines = tl.cumsum(share_lines, 0) - share_lines
        num_lines = tl.sum(share_lines, 0)
        count = tl.sum(share_counts, 0)
        kept = likely + row * num_shares * BLOCK
        if (count >= k) & (num_lines <= SMALL_BLOCK // LINE):
            scores, tokens = load_kept(kept, first_lines, num_lines, BLOCK, SMALL_BLOCK)
            select(row_out, scores, tokens, count, k, length > 0, row_table, offset, TRANSFORM, COLUMNS)
        elif (count >= k) & (num_lines <= BLOCK // LINE):
            scores, tokens = load_kept(kept, first_lines, num_lines, BLOCK, BLOCK)
            select(row_out, scores, tokens, count, k, length > 0, row_table, offset, TRANSFORM, COLUMNS)
        else:
            begin = length * 0
            best = length * 0  # number of tokens in ``out``
            while begin < length:
                tl.debug_barrier()  # the last step's stores are this step's loads
                end = tl.minimum(begin + BLOCK - best, length)
                count = best + end - begin
                scores, tokens = load_tokens(row_logits, row_out, begin, best, count, BLOCK)
                select(row_out, scores, tokens, count, k, end == length, row_table, offset, TRANSFORM, COLUMNS)
                begin = end
                best = length * 0 + k
