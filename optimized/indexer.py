"""The lightning indexer: how relevant each cached token is to each query token. See ``reference.indexer``."""

from __future__ import annotations

import math

import torch

from nsa_oracle.optimized import kernels
from nsa_oracle.optimized.kernels.indexer import indexer_logits_kernel
from nsa_oracle.optimized.kv_cache import lanes, page_size_of
from nsa_oracle.optimized.launch import Launcher, is_dense, is_wide
from nsa_oracle.optimized.library import register
from nsa_oracle.reference.types import AttentionConfig

BLOCK = 64  # tokens that meet all heads in one tile
FILL_BLOCK = 1024  # columns beyond the row that are set to -inf at once
PROGRAMS = 16 * 132  # over all rows: several per multiprocessor, so that rows of unequal length even out
NUM_WARPS = 4
NUM_STAGES = 4
VECTOR_BYTES = 16  # the widest load
MIN_LANES = 16  # the smallest side of a tile that Triton multiplies

assert kernels  # imported first: it decides how Triton runs

_indexer_logits = Launcher(indexer_logits_kernel)


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
    real_page_table [R, ceil(max_seq_len_k / page_size)] int32: a row per query token; dead pages are not looked at.
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
    """See ``indexer_logits``. Rows and pages may lie apart, what is within them is dense. Pages: a power of two."""
    num_rows, width = logits.shape
    if num_rows == 0 or width == 0:
        return
    _, num_heads, head_dim = index_q.shape
    page_size = page_size_of(index_k_cache, head_dim)
    assert is_dense(logits, index_q, index_weights, index_k_cache, real_page_table), "rows must be dense"
    q_alignment = math.gcd(index_q.data_ptr(), index_q.stride(0), index_q.stride(1), VECTOR_BYTES)
    page_alignment = math.gcd(index_k_cache.data_ptr(), index_k_cache.stride(0), VECTOR_BYTES)
    assert page_alignment % 4 == 0, "scales must be aligned"
    programs = max(1, min(-(-PROGRAMS // num_rows), -(-width // BLOCK)))
    sizes = (page_size, num_heads, head_dim, max(MIN_LANES, lanes(num_heads)), max(MIN_LANES, lanes(head_dim)))
    flags = (*sizes, q_alignment, page_alignment)
    strides = (
        logits.stride(0),
        index_q.stride(0),
        index_q.stride(1),
        index_weights.stride(0),
        index_k_cache.stride(0),
        real_page_table.stride(0),
        seqlens_expanded.stride(0),
    )
    _indexer_logits(
        num_rows * programs,
        (*flags, seqlens_expanded.dtype, real_page_table.dtype, *(is_wide(stride) for stride in strides)),
        logits,
        index_q.view(torch.uint8),
        index_weights,
        index_k_cache,
        real_page_table,
        seqlens_expanded,
        *strides,
        width,
        programs,
        *flags,
        BLOCK,
        FILL_BLOCK,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )


indexer_logits_op = register(
    "indexer_logits(Tensor(a!) logits, Tensor index_q, Tensor index_weights, Tensor index_k_cache, "
    "Tensor real_page_table, Tensor seqlens_expanded) -> ()",
    _launch,
)
