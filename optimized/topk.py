"""Which tokens a query token attends to: the best by the indexer. See ``reference.topk``."""

from __future__ import annotations

import torch

from optimized import kernels
from optimized.kernels.topk import PAGED, POSITIONS, RAGGED, topk_kernel
from optimized.launch import Launcher, is_dense, is_wide
from optimized.library import register

# Blocks that a row may be selected in, and warps for each. The smallest that holds a whole row of logits is taken, or
# the last, through which a longer row passes in pieces.
BLOCKS = {1024: 4, 8192: 32, 32768: 32}
EMIT_BLOCK = 4096  # tokens among which the selected are stored at once
COPY_BLOCK = 1024  # indices of a row that selects all its tokens, stored at once

assert kernels  # imported first: it decides how Triton runs

_topk = Launcher(topk_kernel)


def topk_indices(logits: torch.Tensor, seqlens_expanded: torch.Tensor, index_topk: int) -> torch.Tensor:
    """Positions of the ``index_topk`` largest of each row's first seqlens_expanded logits: int32 [R, index_topk].

    Positions ascend, then -1. Ties go to the lower position, and 0.0 ties with -0.0. NaN counts as -inf. A row of at
    most ``index_topk`` tokens selects all of them, whatever their logits. Columns beyond are not looked at.
    """
    out = _output(logits, index_topk)
    topk_op(out, logits, seqlens_expanded, None, None)
    return out


def topk_transform_paged(
    logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor, index_topk: int
) -> torch.Tensor:
    """``topk_indices``, then the slot of each: page_table_1[row, position]. page_table_1 has a row per row."""
    out = _output(logits, index_topk)
    topk_op(out, logits, seqlens_expanded, page_table_1, None)
    return out


def topk_transform_ragged(
    logits: torch.Tensor, seqlens_expanded: torch.Tensor, topk_indices_offset: torch.Tensor, index_topk: int
) -> torch.Tensor:
    """``topk_indices``, then the place of each in the batch's concatenated KV: position + topk_indices_offset[row]."""
    out = _output(logits, index_topk)
    topk_op(out, logits, seqlens_expanded, None, topk_indices_offset)
    return out


def _output(logits: torch.Tensor, index_topk: int) -> torch.Tensor:
    return torch.empty(logits.shape[0], index_topk, dtype=torch.int32, device=logits.device)


def _block(width: int, index_topk: int) -> int:
    """The smallest block that holds a row, or the largest; in any case one that new tokens fit into."""
    fitting = [block for block in BLOCKS if block >= min(width, max(BLOCKS)) and block >= 2 * index_topk]
    assert fitting, "index_topk is too large"
    return min(fitting)


def _launch(
    out: torch.Tensor,
    logits: torch.Tensor,
    seqlens_expanded: torch.Tensor,
    page_table_1: torch.Tensor | None,
    topk_indices_offset: torch.Tensor | None,
) -> None:
    """Dense out [R, K] int32; logits [R, W] float32 and page_table_1 [R, W] int32, whose rows may lie apart.

    seqlens_expanded [R], topk_indices_offset [R] int32 or int64, any stride.
    """
    num_rows, index_topk = out.shape
    if num_rows == 0 or index_topk == 0:
        return
    table = out if page_table_1 is None else page_table_1
    offsets = seqlens_expanded if topk_indices_offset is None else topk_indices_offset
    assert is_dense(logits, table), "rows must be dense"
    kind = POSITIONS if page_table_1 is None else PAGED
    transform = (kind if topk_indices_offset is None else RAGGED).value
    block = _block(logits.shape[1], index_topk)
    short_block = min(block, *(size for size in BLOCKS if size > index_topk and BLOCKS[size] == BLOCKS[block]))
    strides = (logits.stride(0), seqlens_expanded.stride(0), table.stride(0), offsets.stride(0))
    dtypes = (seqlens_expanded.dtype, table.dtype, offsets.dtype)
    _topk(
        num_rows,
        (transform, block, short_block, *dtypes, *(is_wide(stride) for stride in strides)),
        out,
        logits,
        seqlens_expanded,
        table,
        offsets,
        *strides,
        logits.shape[1],
        index_topk,
        transform,
        block,
        short_block,
        min(EMIT_BLOCK, block),
        COPY_BLOCK,
        num_warps=BLOCKS[block],
    )


topk_op = register(
    "topk(Tensor(a!) out, Tensor logits, Tensor seqlens_expanded, Tensor? page_table_1, Tensor? topk_indices_offset) "
    "-> ()",
    _launch,
)
