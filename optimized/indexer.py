"""The lightning indexer: how relevant each cached token is to each query token. See ``reference.indexer``."""

from __future__ import annotations

import math

import torch

from nsa_oracle.optimized.kernels.indexer import indexer_logits_kernel
from nsa_oracle.optimized.kernels.indexer_hopper import DIM, HEADS, TILE, indexer_logits_hopper_kernel
from nsa_oracle.optimized.kv_cache import lanes, page_size_of
from nsa_oracle.optimized.launch import Launcher, is_dense, is_wide, runs_gluon
from nsa_oracle.optimized.library import register
from nsa_oracle.reference.types import AttentionConfig

BLOCK = 64  # tokens per tile; a tile covers all heads
FILL_BLOCK = 1024  # columns beyond the row's length that are set to -inf per step
PROGRAMS = 16 * 132  # programs over all rows: several per multiprocessor, which balances rows of unequal length
NUM_WARPS = 4
NUM_STAGES = 4
HOPPER_PROGRAMS = 4 * 132  # as many as run at the same time
HOPPER_REGISTERS = 128  # per thread: all that four programs of a multiprocessor leave each other
MANY_TILES = 8 * HOPPER_PROGRAMS  # over all rows: from here on, steps of two tiles are faster than steps of one
VECTOR_BYTES = 16  # of the widest load
MIN_LANES = 16  # smallest side of a tile in a matrix product of Triton

_indexer_logits = Launcher(indexer_logits_kernel, "logits_stride")
_indexer_logits_on_hopper = Launcher(indexer_logits_hopper_kernel, "logits_stride")


def indexer_logits(
    config: AttentionConfig,
    index_q: torch.Tensor,
    index_weights: torch.Tensor,
    index_k_cache: torch.Tensor,
    real_page_table: torch.Tensor,
    seqlens_expanded: torch.Tensor,
    max_seq_len_k: int,
) -> torch.Tensor:
    """Score of every cached token for every query token: float32 [R, max_seq_len_k], -inf beyond seqlens_expanded.

    index_q [R, index_n_heads, index_head_dim] float8_e4m3fn, index_weights [R, index_n_heads] float32.
    real_page_table [R, ceil(max_seq_len_k / page_size)] int32: a row per query token; dead pages are not read.
    """
    logits = torch.empty(index_q.shape[0], max_seq_len_k, dtype=torch.float32, device=index_q.device)
    indexer_logits_op(logits, index_q, index_weights, index_k_cache, real_page_table, seqlens_expanded)
    return logits


def _launch(
    logits: torch.Tensor,
    index_q: torch.Tensor,
    index_weights: torch.Tensor,
    index_k_cache: torch.Tensor,
    real_page_table: torch.Tensor,
    seqlens_expanded: torch.Tensor,
) -> None:
    """See ``indexer_logits``. Rows and pages may be strided; their contents are dense. Page size: a power of two."""
    num_rows, width = logits.shape
    if num_rows == 0 or width == 0:
        return
    _, num_heads, head_dim = index_q.shape
    page_size = page_size_of(index_k_cache, head_dim)
    assert is_dense(logits, index_q, index_weights, index_k_cache, real_page_table), "rows must be dense"
    q_alignment = math.gcd(index_q.data_ptr(), index_q.stride(0), index_q.stride(1), VECTOR_BYTES)
    page_alignment = math.gcd(index_k_cache.data_ptr(), index_k_cache.stride(0), VECTOR_BYTES)
    assert page_alignment % 4 == 0, "scales must be aligned"
    logits_stride, q_stride, q_head_stride = logits.stride(0), index_q.stride(0), index_q.stride(1)
    weights_stride, page_stride = index_weights.stride(0), index_k_cache.stride(0)
    table_stride, lengths_stride = real_page_table.stride(0), seqlens_expanded.stride(0)
    wide = (
        is_wide(logits_stride), is_wide(q_stride), is_wide(q_head_stride), is_wide(weights_stride),
        is_wide(page_stride), is_wide(table_stride), is_wide(lengths_stride),
    )  # fmt: skip
    dtypes = seqlens_expanded.dtype, real_page_table.dtype
    on_hopper = (
        (num_heads, head_dim) == (HEADS.value, DIM.value)
        and page_size % TILE.value == 0
        and q_alignment == page_alignment == VECTOR_BYTES
        and runs_gluon(indexer_logits_hopper_kernel)
    )
    if on_hopper:
        tiles = -(-width // TILE.value)
        tiles_per_step = 2 if num_rows * tiles >= MANY_TILES else 1
        programs = max(1, min(HOPPER_PROGRAMS // num_rows, -(-tiles // tiles_per_step)))
        launcher, options = _indexer_logits_on_hopper, {"num_warps": NUM_WARPS, "maxnreg": HOPPER_REGISTERS}
        constants = launcher.constants(PAGE_SIZE=page_size, TILES=tiles_per_step, FILL_BLOCK=FILL_BLOCK)
    else:
        programs = min(-(-PROGRAMS // num_rows), -(-width // BLOCK))
        launcher, options = _indexer_logits, {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES}
        constants = launcher.constants(
            PAGE_SIZE=page_size,
            HEADS=num_heads,
            DIM=head_dim,
            HEAD_LANES=max(MIN_LANES, lanes(num_heads)),
            DIM_LANES=max(MIN_LANES, lanes(head_dim)),
            Q_ALIGNMENT=q_alignment,
            PAGE_ALIGNMENT=page_alignment,
            BLOCK=BLOCK,
            FILL_BLOCK=FILL_BLOCK,
        )
    # Both kernels have the same tensors and numbers.
    tensors = _indexer_logits.tensors(
        logits=logits,
        q=index_q.view(torch.uint8),
        weights=index_weights,
        index_k_cache=index_k_cache,
        page_table=real_page_table,
        seqlens_expanded=seqlens_expanded,
    )
    numbers = _indexer_logits.numbers(
        logits_stride=logits_stride,
        q_stride=q_stride,
        q_head_stride=q_head_stride,
        weights_stride=weights_stride,
        page_stride=page_stride,
        table_stride=table_stride,
        lengths_stride=lengths_stride,
        width=width,
        programs_per_row=programs,
    )
    launcher(num_rows * programs, (*constants, *dtypes, *wide), tensors, numbers, constants, **options)


indexer_logits_op = register(
    "indexer_logits(Tensor(a!) logits, Tensor index_q, Tensor index_weights, Tensor index_k_cache, "
    "Tensor real_page_table, Tensor seqlens_expanded) -> ()",
    _launch,
)
