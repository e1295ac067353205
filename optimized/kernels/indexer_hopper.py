"""The lightning indexer's logits on a Hopper GPU: ``indexer_logits_kernel`` for production's 64 heads of 128.

Arguments, and which program computes what, are those of ``optimized.kernels.indexer``. This kernel is written in Gluon,
Triton's lower-level language, because of how keys travel from memory to the matrix units:

- Keys are copied to shared memory asynchronously, one step ahead, in whole tiles, without a mask.
- A thread reads 16 bytes of a key at once, converts them in registers, and hands them on from there. In the layout of
  the matrix units it would have them in pairs. So dimensions are in another order (``in_order_of_reads``), that of the
  queries as well: which dimensions a step of the product adds is changed, what it adds is not.
- What is negative becomes zero by ``x + |x|``, which is exact, with halved weights: one instruction. Comparing and
  selecting are two, at half the rate.

A step has one or two tiles of 64 tokens: two share the cost of waiting, one leaves less idle where there is little to
do. Either way a token's logit has the same bits.
"""

# mypy: disable-error-code="untyped-decorator"
# (Triton ships no types for its decorator)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from nsa_oracle.optimized.kernels.fp8 import from_e4m3_bits
from nsa_oracle.optimized.kernels.gluon_names import async_load, barrier
from nsa_oracle.optimized.kernels.indexer import RUNTIME

TILE = gl.constexpr(64)  # tokens of one product
HEADS = gl.constexpr(64)
DIM = gl.constexpr(128)

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
KEYS = gl.constexpr(gl.DotOperandLayout(0, SCORES, 2))
QUERIES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
# Layouts of four warps. READS: where each bit of the number of a register, a lane and a warp leads: [token, dimension].
# Four neighbouring lanes read 64 bytes of one key; the halves of every second key change places (RING), so that eight
# lanes access different banks.
READS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [8, 0], [0, 64]],
        [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 128],
    )
)
RING = gl.constexpr(gl.SwizzledSharedLayout(vec=64, per_phase=1, max_phase=2, order=[1, 0]))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0]))
BYTES = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
NUMBERS = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))


@gluon.jit
def in_order_of_reads(x: gl.tensor) -> gl.tensor:
    """``x`` [n, DIM] with its dimensions in the order in which the product takes those that ``READS`` has read."""
    x = gl.permute(gl.reshape(x, [x.shape[0], 2, 4, 4, 2, 2]), (0, 1, 3, 4, 2, 5))
    return gl.reshape(x, [x.shape[0], DIM])


@gluon.jit
def page_of(pages: gl.tensor, token: gl.tensor, length: gl.tensor, PAGE_SIZE: gl.constexpr) -> gl.tensor:
    """The page of a token, or of the row's last one if that comes earlier: later entries are dead."""
    return gl.load(pages + gl.minimum(token, length - 1) // PAGE_SIZE).to(gl.int64)


@gluon.jit
def copy_step(
    keys: gl.shared_memory_descriptor,
    scales: gl.shared_memory_descriptor,
    index_k_cache: gl.tensor,
    first_page: gl.tensor,
    second_page: gl.tensor,
    page_stride: gl.tensor,
    token: gl.tensor,
    length: gl.tensor,
    PAGE_SIZE: gl.constexpr,
) -> None:
    """Start copying the keys [n, DIM] and scales [n] from ``token`` on: its tiles that have a token, if any."""
    rows = gl.arange(0, TILE, gl.SliceLayout(1, BYTES))[:, None] * DIM
    cells = rows + gl.arange(0, DIM, gl.SliceLayout(0, BYTES))[None, :]
    for tile in gl.static_range(keys.shape[0] // TILE):
        begin = token + tile * TILE
        if begin < length:
            page = index_k_cache + (first_page if tile == 0 else second_page) * page_stride
            offset = begin % PAGE_SIZE
            async_load(keys.slice(tile * TILE, TILE), gl.multiple_of(page + offset * DIM, 16) + cells)
            scale_cells = (page + (PAGE_SIZE * DIM + offset * 4)).to(gl.pointer_type(gl.float32), bitcast=True)
            scale_cells = gl.multiple_of(scale_cells, 16) + gl.arange(0, TILE, NUMBERS)
            async_load(scales.slice(tile * TILE, TILE), scale_cells)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=RUNTIME)
def indexer_logits_hopper_kernel(
    logits: gl.tensor,
    q: gl.tensor,
    weights: gl.tensor,
    index_k_cache: gl.tensor,
    page_table: gl.tensor,
    seqlens_expanded: gl.tensor,
    logits_stride: gl.tensor,
    q_stride: gl.tensor,
    q_head_stride: gl.tensor,
    weights_stride: gl.tensor,
    page_stride: gl.tensor,
    table_stride: gl.tensor,
    lengths_stride: gl.tensor,
    width: gl.tensor,
    programs_per_row: gl.tensor,
    PAGE_SIZE: gl.constexpr,
    TILES: gl.constexpr,
    FILL_BLOCK: gl.constexpr,
) -> None:
    """See ``indexer_logits_kernel``. Each head of each query, and each page, start on 16 bytes.

    PAGE_SIZE: a multiple of TILE. TILES: of one step, 1 or 2. Cells of a page behind the row's last token are read, and
    what they give is not stored.
    """
    step_tokens: gl.constexpr = TILES * TILE
    pid = gl.program_id(0)
    row = (pid // programs_per_row).to(gl.int64)
    first = pid % programs_per_row
    length = gl.load(seqlens_expanded + row * lengths_stride)
    length = gl.minimum(gl.maximum(length, 0), width).to(gl.int32)
    target = logits + row * logits_stride
    num_steps = (length + step_tokens - 1) // step_tokens

    if first < num_steps:
        queries = gl.allocate_shared_memory(gl.float16, [HEADS, DIM], QUERIES)
        keys = gl.allocate_shared_memory(gl.uint8, [2, step_tokens, DIM], RING)
        scales = gl.allocate_shared_memory(gl.float32, [2, step_tokens], PLAIN)

        # 1. The first step's copy begins. Numbers of pages are loaded one step before they are needed.
        pages = page_table + row * table_stride
        stride = programs_per_row * step_tokens
        ahead = first * step_tokens  # first token of the next step to copy
        first_page = page_of(pages, ahead, length, PAGE_SIZE)
        second_page = page_of(pages, ahead + TILE, length, PAGE_SIZE)
        copy_step(
            keys.index(0), scales.index(0), index_k_cache, first_page, second_page, page_stride,
            ahead, length, PAGE_SIZE,
        )  # fmt: skip
        ahead += stride
        first_page = page_of(pages, ahead, length, PAGE_SIZE)
        second_page = page_of(pages, ahead + TILE, length, PAGE_SIZE)

        # 2. The row's queries and weights.
        q_heads = q + row * q_stride + gl.arange(0, HEADS, gl.SliceLayout(1, BYTES)) * q_head_stride
        q_cells = gl.multiple_of(q_heads, [16])[:, None] + gl.arange(0, DIM, gl.SliceLayout(0, BYTES))[None, :]
        queries.store(in_order_of_reads(from_e4m3_bits(gl.load(q_cells), gl.float16)))
        heads = gl.arange(0, HEADS, gl.SliceLayout(0, SCORES))
        half_weights = gl.load(weights + row * weights_stride + heads) * 0.5
        fence_async_shared()  # the queries become visible to the matrix units
        barrier()

        # 3. Step by step, while the next step is copied.
        in_tile = gl.arange(0, TILE, gl.SliceLayout(1, SCORES))
        slot = 0
        for step in range(first, num_steps, programs_per_row):
            async_copy.wait_group(0)
            barrier()
            copy_step(
                keys.index(slot ^ 1), scales.index(slot ^ 1), index_k_cache, first_page, second_page, page_stride,
                ahead, length, PAGE_SIZE,
            )  # fmt: skip
            ahead += stride
            first_page = page_of(pages, ahead, length, PAGE_SIZE)
            second_page = page_of(pages, ahead + TILE, length, PAGE_SIZE)
            for tile in gl.static_range(TILES):
                bits = keys.index(slot).slice(tile * TILE, TILE).load(READS)
                operand = in_order_of_reads(from_e4m3_bits(bits, gl.float16))
                operand = gl.convert_layout(operand, KEYS, assert_trivial=True)
                scores = gl.zeros([TILE, HEADS], gl.float32, SCORES)
                scores = warpgroup_mma(operand, queries.permute((1, 0)), scores, use_acc=False)
                sums = gl.sum((scores + gl.abs(scores)) * half_weights[None, :], 1)
                result = scales.index(slot).slice(tile * TILE, TILE).load(gl.SliceLayout(1, SCORES)) * sums
                begin = step * step_tokens + tile * TILE
                result = gl.where(in_tile < length - begin, result, float("-inf"))
                gl.store(target + begin + in_tile, result, mask=in_tile < width - begin)
            slot ^= 1

    # 4. Beyond the row's last step. Before the first one these stores would delay its copies.
    for begin in range(num_steps * step_tokens + first * FILL_BLOCK, width, programs_per_row * FILL_BLOCK):
        columns = begin + gl.arange(0, FILL_BLOCK, NUMBERS)
        gl.store(target + columns, gl.full([FILL_BLOCK], float("-inf"), gl.float32, NUMBERS), mask=columns < width)
