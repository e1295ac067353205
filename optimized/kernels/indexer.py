"""The lightning indexer's logits, computed directly from the paged index-K cache."""

# mypy: disable-error-code="untyped-decorator"
# (Triton ships no types for its decorator)

from __future__ import annotations

import triton
import triton.language as tl

from nsa_oracle.optimized.kernels.fp8 import DOT_DTYPE, from_e4m3_bits

RUNTIME = [
    "logits", "q", "weights", "index_k_cache", "page_table", "seqlens_expanded", "logits_stride", "q_stride",
    "q_head_stride", "weights_stride", "page_stride", "table_stride", "lengths_stride", "width", "programs_per_row",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=RUNTIME)
def indexer_logits_kernel(
    logits: tl.tensor,
    q: tl.tensor,
    weights: tl.tensor,
    index_k_cache: tl.tensor,
    page_table: tl.tensor,
    seqlens_expanded: tl.tensor,
    logits_stride: tl.tensor,
    q_stride: tl.tensor,
    q_head_stride: tl.tensor,
    weights_stride: tl.tensor,
    page_stride: tl.tensor,
    table_stride: tl.tensor,
    lengths_stride: tl.tensor,
    width: tl.tensor,
    programs_per_row: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_LANES: tl.constexpr,
    DIM_LANES: tl.constexpr,
    Q_ALIGNMENT: tl.constexpr,
    PAGE_ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    FILL_BLOCK: tl.constexpr,
) -> None:
    """Logits of all rows, ``programs_per_row`` programs each; every program keeps its row's queries on chip.

    A program computes the tiles of BLOCK tokens ``first``, ``first + programs_per_row``, ..., so that a short row in a
    wide table still occupies all programs. Where the row has no token, they store -inf and read nothing.

    float16 represents every e4m3 exactly, and float32 every product of two of them, so only the sums round. The order
    of summation depends on DIM and HEADS alone: neither the batch, nor the tile, nor the width changes a bit.

    Q_ALIGNMENT, PAGE_ALIGNMENT: bytes that divide the address of each head of each query, and of each page. They are
    read as vectors of that size.
    """
    pid = tl.program_id(0)
    row = (pid // programs_per_row).to(tl.int64)
    first = pid % programs_per_row
    length = tl.load(seqlens_expanded + row * lengths_stride)
    length = tl.minimum(tl.maximum(length, 0), width).to(tl.int32)
    target = logits + row * logits_stride
    pages = page_table + row * table_stride
    num_tiles = tl.cdiv(length, BLOCK)

    if first < num_tiles:
        # 1. The row's queries and weights. Lanes beyond the heads have weight 0.
        heads = tl.arange(0, HEAD_LANES)
        dims = tl.arange(0, DIM_LANES)
        q_begins = tl.multiple_of(q + row * q_stride + heads * q_head_stride, Q_ALIGNMENT)  # [HEAD_LANES]
        q_cells = q_begins[:, None] + dims[None, :]
        q_bits = tl.load(q_cells, mask=(heads < HEADS)[:, None] & (dims < DIM)[None, :], other=0)
        queries = tl.trans(from_e4m3_bits(q_bits, DOT_DTYPE))  # [DIM_LANES, HEAD_LANES]
        head_weights = tl.load(weights + row * weights_stride + heads, mask=heads < HEADS, other=0.0)

        # 2. Tiles of tokens, on one or on several pages.
        for tile in range(first, num_tiles, programs_per_row):
            tokens = tile * BLOCK + tl.arange(0, BLOCK)
            live = tokens < length
            page_ids = tl.load(pages + tokens // PAGE_SIZE, mask=live, other=0).to(tl.int64)
            offsets = tokens % PAGE_SIZE
            page_begins = tl.multiple_of(index_k_cache + page_ids * page_stride, PAGE_ALIGNMENT)  # [BLOCK]
            key_cells = (page_begins + offsets * DIM)[:, None] + dims[None, :]  # [BLOCK, DIM_LANES]
            key_bits = tl.load(key_cells, mask=live[:, None] & (dims < DIM)[None, :], other=0)
            scale_cells = (page_begins + (PAGE_SIZE * DIM + offsets * 4)).to(tl.pointer_type(tl.float32))
            scales = tl.load(scale_cells, mask=live, other=0.0)

            keys = from_e4m3_bits(key_bits, DOT_DTYPE)  # [BLOCK, DIM_LANES]
            scores = tl.dot(keys, queries, input_precision="ieee")  # [BLOCK, HEAD_LANES]
            scores = tl.where(scores < 0, 0.0, scores)  # a maximum would lose NaN
            result = scales * tl.sum(scores * head_weights[None, :], axis=1)
            tl.store(target + tokens, tl.where(live, result, float("-inf")), mask=tokens < width)

    # 3. Beyond the row's last tile.
    filled = num_tiles * BLOCK
    for begin in range(filled + first * FILL_BLOCK, width, programs_per_row * FILL_BLOCK):
        columns = begin + tl.arange(0, FILL_BLOCK)
        tl.store(target + columns, tl.full([FILL_BLOCK], float("-inf"), tl.float32), mask=columns < width)
