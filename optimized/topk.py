"""Which tokens a query token attends to: those with the best indexer scores. See ``reference.topk``."""

from __future__ import annotations

import torch

from nsa_oracle.optimized.kernels.topk import LINE, PAGED, POSITIONS, RAGGED, topk_filter_kernel, topk_kernel
from nsa_oracle.optimized.launch import Launcher, is_dense, is_wide
from nsa_oracle.optimized.library import register

# Tokens that one program selects from at once, and its number of warps. A program takes the smallest block that holds
# the whole width. Wider rows are filtered; the program then takes the small block, or the last one if that overflows.
BLOCKS = {1024: 4, 4096: 8, 8192: 8}
SMALL_BLOCK = 4096
FILTER_BLOCK = 4096  # tokens per step of a filtering program
FILTER_WARPS = 8
FILTER_PROGRAMS = 2 * 132  # filtering programs over all rows: two per multiprocessor
MAX_SHARES = 16  # filtering programs per row, at most
COPY_BLOCK = 1024  # indices stored per step for a row that selects all its tokens

_filter = Launcher(topk_filter_kernel, "logits_stride")
_topk = Launcher(topk_kernel, "logits_stride")


def topk_indices(logits: torch.Tensor, seqlens_expanded: torch.Tensor, index_topk: int) -> torch.Tensor:
    """Positions of the ``index_topk`` largest of each row's first seqlens_expanded logits: int32 [R, index_topk].

    Positions ascend, then -1. Ties go to the lower position, and 0.0 ties with -0.0. NaN counts as -inf. A row of at
    most ``index_topk`` tokens selects all of them, whatever their logits. Columns beyond are ignored.
    """
    return _select(logits, seqlens_expanded, index_topk, None, None)


def topk_transform_paged(
    logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor, index_topk: int
) -> torch.Tensor:
    """``topk_indices``, then the slot of each: page_table_1[row, position]. page_table_1 has a row per row."""
    return _select(logits, seqlens_expanded, index_topk, page_table_1, None)


def topk_transform_ragged(
    logits: torch.Tensor, seqlens_expanded: torch.Tensor, topk_indices_offset: torch.Tensor, index_topk: int
) -> torch.Tensor:
    """``topk_indices``, then the place of each in the batch's concatenated KV: position + topk_indices_offset[row]."""
    return _select(logits, seqlens_expanded, index_topk, None, topk_indices_offset)


def _select(
    logits: torch.Tensor,
    seqlens_expanded: torch.Tensor,
    index_topk: int,
    page_table_1: torch.Tensor | None,
    topk_indices_offset: torch.Tensor | None,
) -> torch.Tensor:
    out = torch.empty(logits.shape[0], index_topk, dtype=torch.int32, device=logits.device)
    rows, width = logits.shape
    likely = counts = None
    if width > max(BLOCKS):
        assert index_topk < max(BLOCKS), "index_topk is too large"
        # Depends on sizes that are fixed at capture, not on lengths. Results do not depend on it.
        shares = max(1, min(FILTER_PROGRAMS // max(1, rows), MAX_SHARES, -(-width // FILTER_BLOCK)))
        likely = torch.empty(rows, shares, max(BLOCKS), dtype=torch.int64, device=logits.device)
        counts = torch.empty(rows, shares, dtype=torch.int32, device=logits.device)
        topk_filter_op(likely, counts, logits, seqlens_expanded, index_topk)
    topk_op(out, logits, seqlens_expanded, page_table_1, topk_indices_offset, likely, counts)
    return out


def _launch_filter(
    likely: torch.Tensor,
    counts: torch.Tensor,
    logits: torch.Tensor,
    seqlens_expanded: torch.Tensor,
    index_topk: int,
) -> None:
    """See ``topk_filter_kernel``. logits [R, W] float32; rows may be strided."""
    rows, shares, capacity = likely.shape
    if rows == 0 or index_topk == 0:
        return
    assert is_dense(logits), "rows must be dense"
    logits_stride, lengths_stride = logits.stride(0), seqlens_expanded.stride(0)
    _filter(
        rows * shares,
        (capacity, seqlens_expanded.dtype, is_wide(logits_stride), is_wide(lengths_stride)),
        _filter.tensors(likely=likely, counts=counts, logits=logits, seqlens_expanded=seqlens_expanded),
        _filter.numbers(
            logits_stride=logits_stride,
            lengths_stride=lengths_stride,
            width=logits.shape[1],
            k=index_topk,
            num_shares=shares,
        ),
        _filter.constants(CAPACITY=capacity, BLOCK=FILTER_BLOCK, COLUMNS=min(FILTER_BLOCK, LINE.value * FILTER_WARPS)),
        num_warps=FILTER_WARPS,
    )


def _launch(
    out: torch.Tensor,
    logits: torch.Tensor,
    seqlens_expanded: torch.Tensor,
    page_table_1: torch.Tensor | None,
    topk_indices_offset: torch.Tensor | None,
    likely: torch.Tensor | None,
    counts: torch.Tensor | None,
) -> None:
    """Dense out [R, K] int32; logits [R, W] float32 and page_table_1 [R, W] int32, whose rows may be strided.

    seqlens_expanded [R], topk_indices_offset [R] int32 or int64, any stride. likely, counts: outputs of
    ``topk_filter_op`` if rows are wider than the largest block, else None.
    """
    (rows, index_topk), width = out.shape, logits.shape[1]
    if rows == 0 or index_topk == 0:
        return
    table = out if page_table_1 is None else page_table_1
    offsets = seqlens_expanded if topk_indices_offset is None else topk_indices_offset
    assert is_dense(logits, table), "rows must be dense"
    kind = POSITIONS if page_table_1 is None else PAGED
    transform = (kind if topk_indices_offset is None else RAGGED).value
    filtered = counts is not None
    block = max(BLOCKS) if filtered else min(block for block in BLOCKS if block >= width)
    warps = BLOCKS[block]
    logits_stride, lengths_stride = logits.stride(0), seqlens_expanded.stride(0)
    table_stride, offsets_stride = table.stride(0), offsets.stride(0)
    dtypes = (seqlens_expanded.dtype, table.dtype, offsets.dtype)
    wide = is_wide(logits_stride), is_wide(lengths_stride), is_wide(table_stride), is_wide(offsets_stride)
    _topk(
        rows,
        (transform, filtered, block, *dtypes, *wide),
        _topk.tensors(
            out=out,
            logits=logits,
            seqlens_expanded=seqlens_expanded,
            table=table,
            offsets=offsets,
            likely=likely if filtered else out,
            counts=counts if filtered else out,
        ),
        _topk.numbers(
            logits_stride=logits_stride,
            lengths_stride=lengths_stride,
            table_stride=table_stride,
            offsets_stride=offsets_stride,
            width=width,
            k=index_topk,
            num_shares=1 if counts is None else counts.shape[1],
        ),
        _topk.constants(
            TRANSFORM=transform,
            FILTERED=filtered,
            BLOCK=block,
            SMALL_BLOCK=min(SMALL_BLOCK, block),
            MAX_SHARES=MAX_SHARES,
            COLUMNS=min(block, LINE.value * warps),
            COPY_BLOCK=COPY_BLOCK,
        ),
        num_warps=warps,
    )


topk_filter_op = register(
    "topk_filter(Tensor(a!) likely, Tensor(b!) counts, Tensor logits, Tensor seqlens_expanded, int index_topk) -> ()",
    _launch_filter,
)
topk_op = register(
    "topk(Tensor(a!) out, Tensor logits, Tensor seqlens_expanded, Tensor? page_table_1, Tensor? topk_indices_offset, "
    "Tensor? likely, Tensor? counts) -> ()",
    _launch,
)
