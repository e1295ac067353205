"""Writes the keys of a forward pass into the caches of a layer. See ``reference.kv_cache`` for the layout."""

from __future__ import annotations

import torch

from nsa_oracle.optimized.kernels.kv_cache import store_cache_kernel
from nsa_oracle.optimized.launch import Launcher, is_dense, is_wide
from nsa_oracle.optimized.library import register
from nsa_oracle.reference.types import NUM_QUANT_TILES, AttentionCaches, AttentionConfig, AttentionInputs, KVCacheDtype

_store_cache = Launcher(store_cache_kernel, "slot_stride")


def store_cache(config: AttentionConfig, caches: AttentionCaches, inputs: AttentionInputs) -> None:
    """Write the rows' own keys and index keys to both caches, in one launch.

    A row writes only the bytes of its slot, and nothing if that is -1. Rows with the same slot write in no particular
    order.
    """
    store_cache_op(
        caches.kv,
        caches.index_k,
        inputs.k,
        inputs.index_k,
        inputs.out_cache_loc,
        config.kv_lora_rank,
        config.index_head_dim,
        config.kv_cache_dtype is KVCacheDtype.FP8,
    )


def page_size_of(index_k_cache: torch.Tensor, index_head_dim: int) -> int:
    """Tokens per page of the index-K cache. Each has a key (e4m3) and a scale (float32)."""
    return index_k_cache.shape[1] // (index_head_dim + 4)


def lanes(size: int) -> int:
    """``size`` rounded up to a power of two: Triton's ranges have such lengths only."""
    return 1 << (size - 1).bit_length()


def _launch(
    kv: torch.Tensor,
    index_k_cache: torch.Tensor,
    k: torch.Tensor,
    index_k: torch.Tensor,
    out_cache_loc: torch.Tensor,
    kv_lora_rank: int,
    index_head_dim: int,
    is_fp8: bool,
) -> None:
    """Caches kv [slots, 1, ...] bf16 or uint8 and index_k_cache [pages, bytes] uint8; keys [R, ...] bf16.

    Slots, pages and rows may be strided; their contents are dense. out_cache_loc [R] int32 or int64, any stride.
    """
    num_rows, head_dim = k.shape
    if num_rows == 0:
        return
    assert is_dense(kv, index_k_cache, k, index_k), "rows must be dense"
    page_size = page_size_of(index_k_cache, index_head_dim)
    rope = head_dim - kv_lora_rank
    sizes = (page_size, is_fp8, kv_lora_rank, rope, index_head_dim)
    slot_stride, page_stride = kv.stride(0), index_k_cache.stride(0)
    k_stride, index_k_stride, loc_stride = k.stride(0), index_k.stride(0), out_cache_loc.stride(0)
    wide = (
        is_wide(slot_stride), is_wide(page_stride), is_wide(k_stride), is_wide(index_k_stride), is_wide(loc_stride),
    )  # fmt: skip
    _store_cache(
        2 * num_rows,
        (*sizes, out_cache_loc.dtype, *wide),
        _store_cache.tensors(kv=kv, index_k_cache=index_k_cache, k=k, index_k=index_k, out_cache_loc=out_cache_loc),
        _store_cache.numbers(
            slot_stride=slot_stride,
            page_stride=page_stride,
            k_stride=k_stride,
            index_k_stride=index_k_stride,
            loc_stride=loc_stride,
            num_rows=num_rows,
        ),
        _store_cache.constants(
            PAGE_SIZE=page_size,
            IS_FP8=is_fp8,
            LATENT=kv_lora_rank,
            ROPE=rope,
            TILES=NUM_QUANT_TILES,
            INDEX_DIM=index_head_dim,
            TILE_LANES=lanes(kv_lora_rank // NUM_QUANT_TILES),
            ROPE_LANES=lanes(rope),
            INDEX_LANES=lanes(index_head_dim),
        ),
    )


store_cache_op = register(
    "store_cache(Tensor(a!) kv, Tensor(b!) index_k_cache, Tensor k, Tensor index_k, Tensor out_cache_loc, "
    "int kv_lora_rank, int index_head_dim, bool is_fp8) -> ()",
    _launch,
)
