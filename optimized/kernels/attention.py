"""Sparse multi-head latent attention: the heads of one row attend to the keys that its indices name.

The result of a row is the same, bit for bit, whatever the batch and however many programs share the row. Addition of
floats is not associative, so the order is fixed: the keys are divided into chunks of CHUNK indices, each chunk has a
partial softmax of its own (maximum, sum, unnormalised accumulator), and ``fold`` joins the partials from left to right.
With one program per row, the program folds as it goes. With one program per chunk, each leaves its partial to
``sparse_mla_combine_kernel``. Both run the same compiled chunk loop: the number of programs per row is a run-time
argument.

Exactness: scores are compared and subtracted before they are scaled, and weights are exp2 of the scaled difference.
Integer scores and sm_scale = ln 2 (hence a scale of exactly 1) then make weights powers of two. The only division is
that of the final accumulator, correctly rounded.
"""

# mypy: disable-error-code="untyped-decorator"
# (Triton ships no types for its decorator)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda, libdevice

from nsa_oracle.optimized.kernels.fp8 import INTERPRETED, from_e4m3_bits

NUM_QUANT_TILES = tl.constexpr(4)  # scales per token in the FP8 cache
CHUNKS_AT_ONCE = tl.constexpr(4)  # partials that the combine kernel loads before it uses the first of them


@triton.jit
def to_bf16(x: tl.tensor) -> tl.tensor:
    """float32 to bf16, rounded to nearest even. The interpreter's own cast truncates."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """The product a @ b + acc of bf16 operands. The interpreter would multiply the operands' bit patterns."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def weight(score: tl.tensor, max_score: tl.tensor, scale_log2: tl.tensor) -> tl.tensor:
    """exp2((score - max_score) * scale_log2), 0 for a score of -inf, also where the maximum is -inf."""
    return tl.exp2((score - tl.where(max_score == float("-inf"), 0.0, max_score)) * scale_log2)


@triton.jit
def fold(acc: tl.tensor, acc_weight: tl.tensor, chunk_acc: tl.tensor, chunk_weight: tl.tensor) -> tl.tensor:
    """Join partials: acc * acc_weight + chunk_acc * chunk_weight, rounded the same wherever it is compiled.

    Joining empty partials, any number of them, can change the sign of a zero, but no other bit.
    """
    return tl.fma(acc, acc_weight, chunk_acc * chunk_weight)


@triton.constexpr_function
def padded(heads: int) -> int:
    """Rows of a stored partial: ``heads`` rounded up to whole blocks of 8."""
    return (heads + 7) // 8 * 8


@triton.jit
def place_in_blocks(row: tl.tensor, column: tl.tensor, COLUMNS: tl.constexpr) -> tl.tensor:
    """Offset of an element of a partial: a matrix of COLUMNS columns, stored in blocks of 8 x 8, one after another.

    In the output of the matrix units a warp holds a block, two elements per thread. In this order it stores and loads
    a block as whole cache lines.
    """
    return row // 8 * (8 * COLUMNS) + column // 8 * 64 + row % 8 * 8 + column % 8


@triton.jit
def divide(x: tl.tensor, divisor: tl.tensor) -> tl.tensor:
    """The quotient x / divisor, correctly rounded unless it underflows. One divisor has many x, hence the reciprocal.

    With a correctly rounded reciprocal, one step makes the quotient faithful and a second one correct (Markstein). The
    interpreter divides instead, because its fma rounds twice.
    """
    if INTERPRETED:
        return tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
    reciprocal = tl.div_rn(divisor * 0.0 + 1.0, divisor)
    quotient = x * reciprocal
    quotient = tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)
    return tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)


@triton.jit
def natural_log(x: tl.tensor) -> tl.tensor:
    """Accurate to about an ulp; Triton's own is an approximation. The interpreter does not have libdevice."""
    if INTERPRETED:
        return tl.log(x)
    return libdevice.log(x)


@triton.jit
def load_keys(
    kv: tl.tensor,
    slots: tl.tensor,
    kv_stride: tl.tensor,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    FP8: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Latent [n, RANK] and RoPE part [n, ROPE] of the keys at ``slots`` [n], bf16. Negative slots: 0, nothing read."""
    lanes = tl.arange(0, RANK)
    rope_lanes = tl.arange(0, ROPE)
    token = kv + slots.to(tl.int64) * kv_stride
    if ALIGNED:  # tokens move as 16-byte vectors
        token = tl.multiple_of(token, [16])
    valid = slots[:, None] >= 0
    if FP8:
        scale_lanes = tl.arange(0, NUM_QUANT_TILES)
        values = tl.load(token[:, None] + lanes[None, :], mask=valid, other=0)
        scales = (token + RANK).to(tl.pointer_type(tl.float32))
        scales = tl.load(scales[:, None] + scale_lanes[None, :], mask=valid, other=0.0)
        tiles = tl.reshape(
            from_e4m3_bits(values, tl.float32), (slots.shape[0], NUM_QUANT_TILES, RANK // NUM_QUANT_TILES)
        )
        latent = to_bf16(tl.reshape(tiles * scales[:, :, None], (slots.shape[0], RANK)))
        rope = (token + RANK + 4 * NUM_QUANT_TILES).to(tl.pointer_type(tl.bfloat16))
    else:
        latent = tl.load(token[:, None] + lanes[None, :], mask=valid, other=0.0)
        rope = token + RANK
    return latent, tl.load(rope[:, None] + rope_lanes[None, :], mask=valid, other=0.0)


SCALARS = [
    "q_row_stride", "q_head_stride", "kv_stride", "indices_stride", "num_keys", "programs_per_row", "scale",
    "scale_log2",
]  # fmt: skip
POINTERS = ["out", "lse", "accs", "stats", "q", "kv", "indices"]


@triton.jit(do_not_specialize=SCALARS, do_not_specialize_on_alignment=POINTERS)
def sparse_mla_kernel(
    out: tl.tensor,
    lse: tl.tensor,
    accs: tl.tensor,
    stats: tl.tensor,
    q: tl.tensor,
    kv: tl.tensor,
    indices: tl.tensor,
    q_row_stride: tl.tensor,
    q_head_stride: tl.tensor,
    kv_stride: tl.tensor,
    indices_stride: tl.tensor,
    num_keys: tl.tensor,
    programs_per_row: tl.tensor,
    scale: tl.tensor,
    scale_log2: tl.tensor,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    FP8: tl.constexpr,
    ALIGNED: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SCAN: tl.constexpr,
) -> None:
    """HEAD_BLOCK heads of one row. Grid: rows * programs_per_row * head blocks; head blocks vary fastest.

    programs_per_row is 1: the program folds all chunks (``accs`` [R, heads, RANK] holds the total while a chunk's
    accumulator needs the registers) and writes ``out`` and ``lse``. Or it is num_chunks: each program writes one
    chunk's partial to ``accs`` [R, num_chunks, heads, RANK] and ``stats`` [R, num_chunks, HEADS, 2] (maximum, sum). A
    chunk without a key leaves its part of ``accs`` unchanged. In ``accs`` the number of heads is a multiple of 8, and
    elements are stored in blocks: see ``place_in_blocks``.
    ALIGNED: every row of q, every slot and ``accs`` start on 16 bytes. SCAN: indices read per step of the search for
    the last valid one.
    """
    head_blocks: tl.constexpr = (HEADS + HEAD_BLOCK - 1) // HEAD_BLOCK
    pid = tl.program_id(0)
    row = (pid // head_blocks // programs_per_row).to(tl.int64)
    part = pid // head_blocks % programs_per_row
    heads = pid % head_blocks * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    lanes = tl.arange(0, RANK)
    row_indices = indices + row * indices_stride

    # Nothing is computed beyond the row's last valid index, whether one program has the row or several.
    last = tl.zeros([SCAN], tl.int32)
    for scan_begin in range(0, num_keys, SCAN):
        keys = scan_begin + tl.arange(0, SCAN)
        valid = tl.load(row_indices + keys, mask=keys < num_keys, other=-1) >= 0
        last = tl.maximum(last, tl.where(valid, keys + 1, 0))
    keys_end = tl.max(last, 0)
    begin = part * CHUNK
    end = keys_end
    if programs_per_row > 1:
        end = tl.minimum(begin + CHUNK, keys_end)

    q_rows = q + (row * q_row_stride + heads * q_head_stride.to(tl.int64))
    if ALIGNED:
        q_rows = tl.multiple_of(q_rows, [16])
    q_rows = q_rows[:, None]
    live = heads[:, None] < HEADS
    q_latent = tl.load(q_rows + lanes[None, :], mask=live, other=0.0)
    q_rope = tl.load(q_rows + RANK + tl.arange(0, ROPE)[None, :], mask=live, other=0.0)

    head_rows = (row * programs_per_row + part) * HEADS + heads
    part_rows = (row * programs_per_row + part) * padded(HEADS) + heads
    total_cells = accs + place_in_blocks(part_rows[:, None], lanes[None, :], RANK)
    if ALIGNED:
        total_cells = tl.max_contiguous(tl.multiple_of(total_cells, [4, 16]), [1, 8])
    total_max = tl.full([HEAD_BLOCK], float("-inf"), tl.float32)
    total_sum = tl.zeros([HEAD_BLOCK], tl.float32)
    for chunk_begin in range(begin, tl.maximum(end, begin + 1), CHUNK):  # a row without a key gets a result too
        # 1. The chunk's partial.
        max_score = tl.full([HEAD_BLOCK], float("-inf"), tl.float32)
        weight_sum = tl.zeros([HEAD_BLOCK], tl.float32)
        acc = tl.zeros([HEAD_BLOCK, RANK], tl.float32)
        chunk_end = tl.minimum(chunk_begin + CHUNK, end)
        for key_begin in range(chunk_begin, chunk_end, KEY_BLOCK):
            keys = key_begin + tl.arange(0, KEY_BLOCK)
            slots = tl.load(row_indices + keys, mask=keys < chunk_end, other=-1)
            latent, rope = load_keys(kv, slots, kv_stride, RANK, ROPE, FP8, ALIGNED)
            scores = dot(q_latent, tl.trans(latent), tl.zeros([HEAD_BLOCK, KEY_BLOCK], tl.float32))
            scores = dot(q_rope, tl.trans(rope), scores)
            scores = tl.where(slots[None, :] >= 0, scores, float("-inf"))
            new_max = tl.maximum(max_score, tl.max(scores, 1))
            rescale = weight(max_score, new_max, scale_log2)
            weights = weight(scores, new_max[:, None], scale_log2)
            weight_sum = tl.fma(weight_sum, rescale, tl.sum(weights, 1))
            acc = dot(to_bf16(weights), latent, acc * rescale[:, None])
            max_score = new_max

        # 2. Join it to the chunks before it. Their total is kept in memory: registers hold only one accumulator.
        new_max = tl.maximum(total_max, max_score)
        total_weight = weight(total_max, new_max, scale_log2)
        chunk_weight = weight(max_score, new_max, scale_log2)
        total_sum = fold(total_sum, total_weight, weight_sum, chunk_weight)
        total_max = new_max
        tl.debug_barrier()  # a thread may load what another one stored
        heads_with_total = tl.where(chunk_begin > begin, HEADS, 0)
        total = tl.load(total_cells, mask=heads[:, None] < heads_with_total, other=0.0)
        total = fold(total, total_weight[:, None], acc, chunk_weight[:, None])

        # 3. Store it for the caller, the next chunk, or the combine kernel.
        if (programs_per_row == 1) & (chunk_begin + CHUNK >= end):
            write_result(out, lse, head_rows, heads < HEADS, total, total_max, total_sum, scale, RANK)
        elif end > begin:
            tl.store(total_cells, total, mask=live)
    if programs_per_row > 1:
        tl.store(stats + head_rows * 2, total_max, mask=heads < HEADS)
        tl.store(stats + head_rows * 2 + 1, total_sum, mask=heads < HEADS)


@triton.jit
def write_result(
    out: tl.tensor,
    lse: tl.tensor,
    head_rows: tl.tensor,
    live: tl.tensor,
    acc: tl.tensor,
    max_score: tl.tensor,
    weight_sum: tl.tensor,
    scale: tl.tensor,
    RANK: tl.constexpr,
) -> None:
    """Store the accumulator divided by the sum of weights, and the natural log of that sum. Without a key: 0, -inf."""
    divisor = tl.where(weight_sum == 0.0, 1.0, weight_sum)
    result = to_bf16(divide(acc + 0.0, divisor[:, None]))  # + 0.0 gives all zeros one sign: see ``fold``
    tl.store(out + head_rows[:, None] * RANK + tl.arange(0, RANK)[None, :], result, mask=live[:, None])
    logarithm = tl.fma(max_score, tl.zeros_like(max_score) + scale, natural_log(divisor))
    tl.store(lse + head_rows, logarithm, mask=live)


@triton.jit(do_not_specialize=["num_chunks", "scale", "scale_log2"], do_not_specialize_on_alignment=POINTERS[:4])
def sparse_mla_combine_kernel(
    out: tl.tensor,
    lse: tl.tensor,
    accs: tl.tensor,
    stats: tl.tensor,
    num_chunks: tl.tensor,
    scale: tl.tensor,
    scale_log2: tl.tensor,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Folds the partials of one head of one row, in the order of a program that has the whole row. Grid: rows * heads.

    EARLY: the launch may begin while the kernel before it still runs (CUDA's programmatic dependent launch). Each
    program then waits for the end of that kernel, which writes the partials.
    """
    head_row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    lanes = tl.arange(0, RANK)[None, :]
    row = head_row // HEADS
    head = head_row % HEADS
    total_max = tl.full([1], float("-inf"), tl.float32)
    total_sum = tl.zeros([1], tl.float32)
    total = tl.zeros([1, RANK], tl.float32)
    if EARLY:
        cuda.gdc_wait()
    for chunk in tl.range(num_chunks, loop_unroll_factor=CHUNKS_AT_ONCE):
        part = row * num_chunks + chunk
        chunk_max = tl.load(stats + (part * HEADS + head) * 2)
        chunk_sum = tl.load(stats + (part * HEADS + head) * 2 + 1)
        cells = accs + place_in_blocks((part * padded(HEADS) + head)[:, None], lanes, RANK)
        acc = tl.load(cells, mask=chunk_sum[:, None] > 0.0, other=0.0)
        new_max = tl.maximum(total_max, chunk_max)
        total_weight = weight(total_max, new_max, scale_log2)
        chunk_weight = weight(chunk_max, new_max, scale_log2)
        total = fold(total, total_weight[:, None], acc, chunk_weight[:, None])
        total_sum = fold(total_sum, total_weight, chunk_sum, chunk_weight)
        total_max = new_max
    write_result(out, lse, head_row, head_row >= 0, total, total_max, total_sum, scale, RANK)
