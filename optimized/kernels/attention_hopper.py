"""Sparse multi-head latent attention on a Hopper GPU: ``sparse_mla_kernel`` for production's 512 + 64 values per key.

Arguments, chunks and joining order are those of ``optimized.kernels.attention``, whose combine kernel serves both. This
kernel is written in Gluon, Triton's lower-level language, for two reasons.

- The product that gives the scores feeds the product with the values. Of two chained products Triton distributes the
  first over heads only: with 64 heads per program both groups of four warps would compute the same scores. Here each
  group computes the scores of half of the keys, and then the outputs of half of the values: nothing is computed twice.
- Four more warps only fetch keys, two tiles of 64 ahead. Warps that multiply must order their own writes to shared
  memory before the matrix units read it; if they also copied keys, this would make them wait for their copies. The
  fetching warps also dequantise the keys of an FP8 cache, while the others multiply.

One program has 64 heads of one row. Shared memory holds q, two tiles of keys, and the weights of one tile: 225 of the
227 KiB that a multiprocessor has.
"""

# mypy: disable-error-code="untyped-decorator"
# (Triton ships no types for its decorator)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra import cuda

from nsa_oracle.optimized.kernels.attention import (
    NUM_QUANT_TILES,
    POINTERS,
    SCALARS,
    divide,
    fold,
    natural_log,
    padded,
    place_in_blocks,
    weight,
)
from nsa_oracle.optimized.kernels.gluon_names import async_load, barrier

CAN_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

HEAD_BLOCK = gl.constexpr(64)
KEY_BLOCK = gl.constexpr(64)
NUM_WARPS = 8  # that multiply: two groups of four, as the layouts below assume
FETCH_WARPS = gl.constexpr(4)
FETCH_THREADS = gl.constexpr(128)
FETCH_REGISTERS = gl.constexpr(72)  # per thread that fetches; threads that multiply get the rest
FETCH_REGISTERS_FP8 = gl.constexpr(96)
FEW_PROGRAMS = gl.constexpr(32)  # with more, the combine kernel would be crowded on the few idle multiprocessors

# Each group of warps has all heads, for half of the keys (scores) or half of the values (output).
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
SHARED_WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
# 16 bytes per thread, in an order in which the eight threads that are served together access different banks.
QUERIES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
KEYS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # of bf16
WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))  # of four e4m3
ROPES = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))  # of bf16; a thread has its rows of WORDS
LINES = gl.constexpr(gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0]))  # of 128 bytes; and its rows of WORDS
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0]))


@gluon.jit
def load_slots(row_indices: gl.tensor, begin: gl.tensor, end: gl.tensor, LAYOUT: gl.constexpr) -> gl.tensor:
    """Slots of the tile of keys from ``begin`` [KEY_BLOCK]; -1 from ``end`` on."""
    keys = begin + gl.arange(0, KEY_BLOCK, LAYOUT)
    return gl.load(row_indices + keys, mask=keys < end, other=-1)


@gluon.jit
def end_of_keys(row_indices: gl.tensor, begin: gl.tensor, bound: gl.tensor, SCAN: gl.constexpr) -> gl.tensor:
    """One more than the position of the last valid index from ``begin`` to ``bound``; 0 if there is none.

    Nothing is computed beyond it.
    """
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    last = gl.zeros([SCAN], gl.int32, layout)
    for scan_begin in range(begin, bound, SCAN):
        keys = scan_begin + gl.arange(0, SCAN, layout)
        valid = gl.load(row_indices + keys, mask=keys < bound, other=-1) >= 0
        last = gl.maximum(last, gl.where(valid, keys + 1, 0))
    return gl.max(last, 0)


@gluon.jit
def copy_columns(
    tile: gl.shared_memory_descriptor,
    cells: gl.tensor,
    slots: gl.tensor,
    slot_stride: gl.tensor,
    LAYOUT: gl.constexpr,
) -> None:
    """Start copying n bf16 per slot, from ``cells`` + slot * ``slot_stride`` on, to ``tile`` [KEY_BLOCK, n].

    Negative slots: zeros, and nothing is read.
    """
    lanes = gl.arange(0, tile.shape[1], gl.SliceLayout(0, LAYOUT))[None, :]
    token = gl.multiple_of(cells + slots.to(gl.int64) * slot_stride, [16])
    async_load(tile, token[:, None] + lanes, mask=slots[:, None] >= 0)


@gluon.jit
def fetch_keys(
    latents: gl.shared_memory_descriptor,
    ropes: gl.shared_memory_descriptor,
    arrived: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    kv: gl.tensor,
    row_indices: gl.tensor,
    begin: gl.tensor,
    bound: gl.tensor,
    kv_stride: gl.tensor,
    SCAN: gl.constexpr,
) -> None:
    """Copy the keys of a bf16 cache, tile by tile."""
    end = end_of_keys(row_indices, begin, bound, SCAN)
    for key_begin in range(begin, end, KEY_BLOCK):
        tile = (key_begin - begin) // KEY_BLOCK
        slots = load_slots(row_indices, key_begin, end, gl.SliceLayout(1, KEYS))
        mbarrier.wait(free.index(tile & 1), tile >> 1 & 1 ^ 1)
        latent = latents.index(tile & 1)
        copy_columns(latent, kv, slots, kv_stride, KEYS)
        copy_columns(ropes.index(tile & 1), kv + latent.shape[1], slots, kv_stride, KEYS)
        async_copy.mbarrier_arrive(arrived.index(tile & 1), increment_count=False)


@gluon.jit
def load_words(
    kv: gl.tensor,
    slots: gl.tensor,
    kv_stride: gl.tensor,
    QUARTER: gl.constexpr,
    RANK: gl.constexpr,
) -> gl.tuple:
    """A quarter of the latent parts at ``slots``, in words of four e4m3 [KEY_BLOCK, RANK / 16], and its scales.

    Words, because loaded bytes would take a register each. Negative slots: zeros, and nothing is read.
    """
    count: gl.constexpr = RANK // 4 // NUM_QUANT_TILES
    token = gl.multiple_of(kv + slots.to(gl.int64) * kv_stride, [16])
    words = token.to(gl.pointer_type(gl.int32), bitcast=True)
    scale = token.to(gl.pointer_type(gl.float32), bitcast=True) + RANK // 4 + QUARTER
    lanes = gl.arange(0, count, gl.SliceLayout(0, WORDS))[None, :]
    valid = slots >= 0
    quarter = gl.load(words[:, None] + QUARTER * count + lanes, mask=valid[:, None], other=0)
    return quarter, gl.load(scale, mask=valid, other=0.0)


@gluon.jit
def dequantise(words: gl.tensor, scales: gl.tensor) -> gl.tensor:
    """``words`` of four e4m3 [n, m] times the row's scale [n], in float32, rounded to bf16: words of two [n, 2 m]."""
    words, scales = gl.broadcast(words, scales[:, None])
    low, high = gl.inline_asm_elementwise(
        """
        {
            .reg .b16 bytes<2>, halves<4>;
            .reg .b32 pairs<2>;
            .reg .f32 x<4>;
            mov.b32 {bytes0, bytes1}, $2;
            cvt.rn.f16x2.e4m3x2 pairs0, bytes0;
            cvt.rn.f16x2.e4m3x2 pairs1, bytes1;
            mov.b32 {halves0, halves1}, pairs0;
            mov.b32 {halves2, halves3}, pairs1;
            cvt.f32.f16 x0, halves0;
            cvt.f32.f16 x1, halves1;
            cvt.f32.f16 x2, halves2;
            cvt.f32.f16 x3, halves3;
            mul.rn.f32 x0, x0, $3;
            mul.rn.f32 x1, x1, $3;
            mul.rn.f32 x2, x2, $3;
            mul.rn.f32 x3, x3, $3;
            cvt.rn.bf16x2.f32 $0, x1, x0;
            cvt.rn.bf16x2.f32 $1, x3, x2;
        }
        """,
        "=r,=r,r,f",
        [words, scales],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    return gl.reshape(gl.join(low, high), [words.shape[0], 2 * words.shape[1]])


@gluon.jit
def as_words(tile: gl.shared_memory_descriptor) -> gl.shared_memory_descriptor:
    """The bf16 ``tile`` [n, m] as words of two [n, m / 2]."""
    shape: gl.constexpr = [tile.shape[0], tile.shape[1] // 2]
    if CAN_REINTERPRET:
        words = tile.reinterpret(gl.int32, shape, SHARED_WORDS)
    else:
        words = tile._reinterpret(gl.int32, shape, SHARED_WORDS)
    return words


@gluon.jit
def announce(
    kv: gl.tensor,
    slots: gl.tensor,
    kv_stride: gl.tensor,
    TOKEN_BYTES: gl.constexpr,
) -> None:
    """Prefetch the keys at ``slots`` [KEY_BLOCK] to the L2 cache, in lines of 128 bytes, without waiting for them.

    For keys that are loaded into registers: there are too few registers to load them earlier. Asynchronous copies take
    no registers and gain nothing from a prefetch.
    """
    offsets = gl.minimum(gl.arange(0, 8, gl.SliceLayout(0, LINES)) * 128, TOKEN_BYTES - 1)[None, :]
    slots = gl.convert_layout(slots, gl.SliceLayout(1, LINES))
    token = (kv + slots.to(gl.int64) * kv_stride).to(gl.int64, bitcast=True)[:, None]
    valid = (slots[:, None] >= 0) & (offsets < TOKEN_BYTES - 1)
    lines, valid = gl.broadcast(token + offsets, valid.to(gl.int32))
    gl.inline_asm_elementwise(
        """
        {
            .reg .pred valid;
            setp.ne.s32 valid, $2, 0;
            @valid prefetch.global.L2 [$1];
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [lines, valid],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def fetch_quantised_keys(
    latents: gl.shared_memory_descriptor,
    ropes: gl.shared_memory_descriptor,
    arrived: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    kv: gl.tensor,
    row_indices: gl.tensor,
    begin: gl.tensor,
    bound: gl.tensor,
    kv_stride: gl.tensor,
    SCAN: gl.constexpr,
) -> None:
    """Load the keys of an FP8 cache, two quarters of a tile ahead, and store them as bf16, tile by tile.

    The slots of a tile are loaded once, three tiles ahead, so that nothing waits for them: a warp that waits for one
    load also waits for its other loads in flight.
    """
    rank: gl.constexpr = latents.shape[2]
    quarter_words: gl.constexpr = rank // 2 // NUM_QUANT_TILES  # of two bf16
    token_bytes: gl.constexpr = rank + 4 * NUM_QUANT_TILES + 2 * ropes.shape[2]
    by_row: gl.constexpr = gl.SliceLayout(1, WORDS)
    slots = load_slots(row_indices, begin, bound, by_row)
    slots_1_ahead = load_slots(row_indices, begin + KEY_BLOCK, bound, by_row)
    slots_2_ahead = load_slots(row_indices, begin + 2 * KEY_BLOCK, bound, by_row)
    words, scales = load_words(kv, slots, kv_stride, 0, rank)
    next_words, next_scales = load_words(kv, slots, kv_stride, 1, rank)
    announce(kv, slots, kv_stride, token_bytes)
    announce(kv, slots_1_ahead, kv_stride, token_bytes)
    announce(kv, slots_2_ahead, kv_stride, token_bytes)
    end = end_of_keys(row_indices, begin, bound, SCAN)
    for key_begin in range(begin, end, KEY_BLOCK):
        tile = (key_begin - begin) // KEY_BLOCK
        mbarrier.wait(free.index(tile & 1), tile >> 1 & 1 ^ 1)
        slots_3_ahead = load_slots(row_indices, key_begin + 3 * KEY_BLOCK, bound, by_row)
        rope = (kv + rank + 4 * NUM_QUANT_TILES).to(gl.pointer_type(gl.bfloat16), bitcast=True)
        slots_of_rope = gl.convert_layout(slots, gl.SliceLayout(1, ROPES))
        copy_columns(ropes.index(tile & 1), rope, slots_of_rope, kv_stride // 2, ROPES)
        target = as_words(latents.index(tile & 1))
        for quarter in gl.static_range(NUM_QUANT_TILES):
            target.slice(quarter * quarter_words, quarter_words, 1).store(dequantise(words, scales))
            words, scales = next_words, next_scales
            if quarter == 2:
                slots = slots_1_ahead
            next_words, next_scales = load_words(kv, slots, kv_stride, (quarter + 2) % NUM_QUANT_TILES, rank)
        announce(kv, slots_3_ahead, kv_stride, token_bytes)
        slots_1_ahead, slots_2_ahead = slots_2_ahead, slots_3_ahead
        async_copy.commit_group()  # what is in no group is not waited for
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        mbarrier.arrive(arrived.index(tile & 1), count=1)


@gluon.jit
def max_of_rows(scores: gl.tensor, shared: gl.shared_memory_descriptor) -> gl.tensor:
    """The largest of each row of ``scores`` [HEAD_BLOCK, KEY_BLOCK]: the groups exchange theirs through ``shared``.

    This takes one barrier, where a plain reduction takes two. Another barrier must precede the next exchange.
    """
    halves = gl.max(gl.reshape(scores, [HEAD_BLOCK, 2, KEY_BLOCK // 2]), 2)
    shared.store(halves)
    barrier()
    layout: gl.constexpr = gl.SliceLayout(1, SCORES)
    first = gl.reshape(shared.slice(0, 1, 1).load(SCORES), [HEAD_BLOCK])
    second = gl.reshape(shared.slice(1, 1, 1).load(SCORES), [HEAD_BLOCK])
    return gl.convert_layout(gl.maximum(first, second), layout)


@gluon.jit
def sums_in_threads(weights: gl.tensor) -> gl.tensor:
    """Sums of each row of ``weights`` [HEAD_BLOCK, KEY_BLOCK] over the elements of a thread: [HEAD_BLOCK, 2, 8]."""
    return gl.sum(gl.reshape(weights, [HEAD_BLOCK, 2, KEY_BLOCK // 16, 8]), 2)


@gluon.jit
def attend(
    latents: gl.shared_memory_descriptor,
    ropes: gl.shared_memory_descriptor,
    arrived: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    q_latent: gl.shared_memory_descriptor,
    q_rope: gl.shared_memory_descriptor,
    tile_weights: gl.shared_memory_descriptor,
    tile_max: gl.shared_memory_descriptor,
    out: gl.tensor,
    lse: gl.tensor,
    accs: gl.tensor,
    stats: gl.tensor,
    q: gl.tensor,
    row_indices: gl.tensor,
    row: gl.tensor,
    part: gl.tensor,
    first_head: gl.tensor,
    begin: gl.tensor,
    bound: gl.tensor,
    q_row_stride: gl.tensor,
    q_head_stride: gl.tensor,
    programs_per_row: gl.tensor,
    scale: gl.tensor,
    scale_log2: gl.tensor,
    HEADS: gl.constexpr,
    CHUNK: gl.constexpr,
    SCAN: gl.constexpr,
) -> None:
    """The work of the warps that multiply: everything except fetching keys."""
    rank: gl.constexpr = latents.shape[2]

    # 1. Queries, and where the row's last valid index is.
    heads = first_head + gl.arange(0, HEAD_BLOCK, gl.SliceLayout(1, QUERIES))
    q_rows = gl.multiple_of(q + (row * q_row_stride + heads * q_head_stride.to(gl.int64)), [16])[:, None]
    lanes = gl.arange(0, rank, gl.SliceLayout(0, QUERIES))[None, :]
    rope_lanes = rank + gl.arange(0, ropes.shape[2], gl.SliceLayout(0, QUERIES))[None, :]
    q_latent.store(gl.load(q_rows + lanes, mask=heads[:, None] < HEADS, other=0.0))
    q_rope.store(gl.load(q_rows + rope_lanes, mask=heads[:, None] < HEADS, other=0.0))
    end = end_of_keys(row_indices, begin, bound, SCAN)
    fence_async_shared()  # what threads have stored becomes visible to the matrix units
    barrier()

    out_heads = first_head + gl.arange(0, HEAD_BLOCK, gl.SliceLayout(1, OUTPUT))
    out_lanes = gl.arange(0, rank, gl.SliceLayout(0, OUTPUT))[None, :]
    head_rows = (row * programs_per_row + part) * HEADS + out_heads
    live = out_heads < HEADS
    part_rows = (row * programs_per_row + part) * padded(HEADS) + out_heads
    total_cells = accs + place_in_blocks(part_rows[:, None], out_lanes, rank)
    total_cells = gl.max_contiguous(gl.multiple_of(total_cells, [4, 16]), [1, 8])
    total_max = gl.full([HEAD_BLOCK], float("-inf"), gl.float32, gl.SliceLayout(1, OUTPUT))
    total_sum = gl.zeros([HEAD_BLOCK], gl.float32, gl.SliceLayout(1, OUTPUT))
    total = gl.zeros([HEAD_BLOCK, rank], gl.float32, OUTPUT)

    for chunk_begin in range(begin, end, CHUNK):
        # 2. The chunk's partial, tile by tile.
        max_score = gl.full([HEAD_BLOCK], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        weight_sums = sums_in_threads(gl.zeros([HEAD_BLOCK, KEY_BLOCK], gl.float32, SCORES))
        acc = gl.zeros([HEAD_BLOCK, rank], gl.float32, OUTPUT)
        chunk_end = gl.minimum(chunk_begin + CHUNK, end)
        slots = load_slots(row_indices, chunk_begin, end, gl.SliceLayout(0, SCORES))  # later ones one tile ahead
        for key_begin in range(chunk_begin, chunk_end, KEY_BLOCK):
            tile = (key_begin - begin) // KEY_BLOCK
            latent = latents.index(tile & 1)
            mbarrier.wait(arrived.index(tile & 1), tile >> 1 & 1)
            fence_async_shared()  # what has been copied becomes visible to the matrix units
            scores = gl.zeros([HEAD_BLOCK, KEY_BLOCK], gl.float32, SCORES)
            scores = warpgroup_mma(q_latent, latent.permute((1, 0)), scores, use_acc=False, is_async=True)
            scores = warpgroup_mma(q_rope, ropes.index(tile & 1).permute((1, 0)), scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))

            scores = gl.where(slots[None, :] >= 0, scores, float("-inf"))
            new_max = gl.maximum(max_score, max_of_rows(scores, tile_max))
            rescale = weight(max_score, new_max, scale_log2)
            weights = weight(scores, new_max[:, None], scale_log2)
            max_score = new_max
            tile_weights.store(weights.to(gl.bfloat16))
            sums = sums_in_threads(weights)
            rescale_sums = gl.convert_layout(rescale, gl.SliceLayout(1, gl.SliceLayout(2, sums.type.layout)))
            weight_sums = gl.fma(weight_sums, rescale_sums[:, None, None] + gl.zeros_like(sums), sums)
            acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUTPUT))[:, None]
            fence_async_shared()
            barrier()
            slots = load_slots(row_indices, key_begin + KEY_BLOCK, end, gl.SliceLayout(0, SCORES))
            acc = warpgroup_mma(tile_weights, latent, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            barrier()
            mbarrier.arrive(free.index(tile & 1), count=1)

        # 3. Join it to the chunks before it. Their total is kept in memory; a thread loads only what it stored itself.
        chunk_max = gl.convert_layout(max_score, gl.SliceLayout(1, OUTPUT))
        chunk_sum = gl.convert_layout(gl.sum(gl.sum(weight_sums, 2), 1), gl.SliceLayout(1, OUTPUT))
        joined_max = gl.maximum(total_max, chunk_max)
        total_weight = weight(total_max, joined_max, scale_log2)
        chunk_weight = weight(chunk_max, joined_max, scale_log2)
        total_sum = fold(total_sum, total_weight, chunk_sum, chunk_weight)
        total_max = joined_max
        heads_with_total = gl.where(chunk_begin > begin, HEADS, 0)
        total = gl.load(total_cells, mask=out_heads[:, None] < heads_with_total, other=0.0)
        total = fold(total, total_weight[:, None], acc, chunk_weight[:, None])
        if (programs_per_row > 1) | (chunk_begin + CHUNK < end):
            gl.store(total_cells, total, mask=live[:, None])

    # 4. Store for the caller, or for the combine kernel.
    if programs_per_row > 1:
        gl.store(stats + head_rows * 2, total_max, mask=live)
        gl.store(stats + head_rows * 2 + 1, total_sum, mask=live)
    else:
        divisor = gl.where(total_sum == 0.0, 1.0, total_sum)
        result = divide(total + 0.0, divisor[:, None]).to(gl.bfloat16)  # + 0.0 gives all zeros one sign: see ``fold``
        q_latent.store(result)  # in place of the queries, so that whole lines are written
        barrier()
        out_rows = (row * HEADS + heads) * rank
        out_cells = gl.multiple_of(out + out_rows, [16])[:, None] + lanes
        gl.store(out_cells, q_latent.load(QUERIES), mask=heads[:, None] < HEADS)
        logarithm = gl.fma(total_max, gl.zeros_like(total_max) + scale, natural_log(divisor))
        gl.store(lse + head_rows, logarithm, mask=live)


@gluon.jit(do_not_specialize=SCALARS, do_not_specialize_on_alignment=POINTERS)
def sparse_mla_hopper_kernel(
    out: gl.tensor,
    lse: gl.tensor,
    accs: gl.tensor,
    stats: gl.tensor,
    q: gl.tensor,
    kv: gl.tensor,
    indices: gl.tensor,
    q_row_stride: gl.tensor,
    q_head_stride: gl.tensor,
    kv_stride: gl.tensor,
    indices_stride: gl.tensor,
    num_keys: gl.tensor,
    programs_per_row: gl.tensor,
    scale: gl.tensor,
    scale_log2: gl.tensor,
    HEADS: gl.constexpr,
    RANK: gl.constexpr,
    ROPE: gl.constexpr,
    FP8: gl.constexpr,
    CHUNK: gl.constexpr,
    SCAN: gl.constexpr,
) -> None:
    """See ``sparse_mla_kernel``. Every row of q, every slot, ``accs`` and ``out`` start on 16 bytes."""
    head_blocks: gl.constexpr = (HEADS + HEAD_BLOCK - 1) // HEAD_BLOCK
    pid = gl.program_id(0)
    row = (pid // head_blocks // programs_per_row).to(gl.int64)
    part = pid // head_blocks % programs_per_row
    first_head = pid % head_blocks * HEAD_BLOCK
    row_indices = indices + row * indices_stride
    begin = part * CHUNK
    bound = num_keys
    if programs_per_row > 1:
        bound = gl.minimum(begin + CHUNK, num_keys)

    latents = gl.allocate_shared_memory(gl.bfloat16, [2, KEY_BLOCK, RANK], SHARED)
    ropes = gl.allocate_shared_memory(gl.bfloat16, [2, KEY_BLOCK, ROPE], SHARED)
    q_latent = gl.allocate_shared_memory(gl.bfloat16, [HEAD_BLOCK, RANK], SHARED)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [HEAD_BLOCK, ROPE], SHARED)
    tile_weights = gl.allocate_shared_memory(gl.bfloat16, [HEAD_BLOCK, KEY_BLOCK], SHARED)
    tile_max = gl.allocate_shared_memory(gl.float32, [HEAD_BLOCK, 2], PLAIN)
    arrived = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(2):
        mbarrier.init(arrived.index(buffer), count=1 if FP8 else FETCH_THREADS)  # each thread that copies arrives
        mbarrier.init(free.index(buffer), count=1)
    barrier()
    if gl.num_programs(0) <= FEW_PROGRAMS:
        cuda.gdc_launch_dependents()  # the combine kernel may start, and wait on the idle multiprocessors
    gl.warp_specialize(
        [
            (
                attend,
                (
                    latents, ropes, arrived, free, q_latent, q_rope, tile_weights, tile_max, out, lse, accs, stats, q,
                    row_indices, row, part, first_head, begin, bound, q_row_stride, q_head_stride,
                    programs_per_row, scale, scale_log2, HEADS, CHUNK, SCAN,
                ),
            ),
            (
                fetch_quantised_keys if FP8 else fetch_keys,
                (latents, ropes, arrived, free, kv, row_indices, begin, bound, kv_stride, SCAN),
            ),
        ],
        [FETCH_WARPS],
        [FETCH_REGISTERS_FP8 if FP8 else FETCH_REGISTERS],
    )  # fmt: skip
