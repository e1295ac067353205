"""Layout of keys in the two caches of a layer: writing the keys of a forward pass, and reading them back.

A cache may be a view with a large stride between slots or pages, so a whole cache is only indexed, never viewed as
another dtype: bytes are gathered (or produced) first and viewed as another dtype afterwards.
"""

from __future__ import annotations

import torch

from nsa_oracle.reference.types import (
    FP8_MAX,
    NUM_QUANT_TILES,
    AttentionCaches,
    AttentionConfig,
    AttentionInputs,
    KVCacheDtype,
)

SCALE_BYTES = 4  # of a float32


def quantize(x: torch.Tensor, tile_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [..., n] in e4m3 with one scale per ``tile_size`` values.

    scale = amax / 448 in float32, 1.0 where amax is 0; value = e4m3(x / scale), round to nearest even, saturating. A
    NaN makes its whole tile NaN.

    Returns values float8_e4m3fn [..., n] and scales float32 [..., n / tile_size].
    """
    tiles = _tiles(x, tile_size)  # [..., n / tile, tile]
    amax = tiles.abs().amax(dim=-1)  # [..., n / tile]
    # A tensor as divisor: CUDA turns division by a Python number into multiplication by a rounded reciprocal.
    scales = torch.where(amax == 0, 1.0, amax / torch.full_like(amax, FP8_MAX))  # [..., n / tile]
    # The cast alone saturates only in some versions of torch. Clamping keeps NaN.
    scaled = (tiles / scales.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX)  # [..., n / tile, tile]
    return scaled.flatten(-2).to(torch.float8_e4m3fn), scales


def dequantize(values: torch.Tensor, scales: torch.Tensor, tile_size: int) -> torch.Tensor:
    """bf16(value * scale), the product in float32: what enters the attention's matrix products.

    values [..., n] float8_e4m3fn, scales [..., n / tile_size] float32. Returns [..., n] bf16.
    """
    scaled = _tiles(values, tile_size) * scales.unsqueeze(-1)  # [..., n / tile, tile]
    return scaled.flatten(-2).to(torch.bfloat16)


def store_kv(config: AttentionConfig, kv_cache: torch.Tensor, k: torch.Tensor, out_cache_loc: torch.Tensor) -> None:
    """Write the keys ``k`` [R, qk_head_dim] bf16 to the slots ``out_cache_loc`` [R] of ``kv_cache``, in place.

    A row whose slot is -1 changes nothing.
    BF16: the key as it is. FP8, kv_token_bytes a token: the latent in e4m3, a float32 scale of each quant_tile of it,
    then the RoPE part in bf16. Source: FlashMLA's FP8 sparse decode format.
    """
    slots = out_cache_loc.to(torch.int64).clamp(min=0)  # [R]
    before = kv_cache[slots, 0]  # [R, ...]: what a row of slot -1 writes, to slot 0; a graph cannot leave out rows
    is_padding = (out_cache_loc < 0).unsqueeze(-1)  # [R, 1]
    if config.kv_cache_dtype is KVCacheDtype.BF16:
        kv_cache[slots, 0] = torch.where(is_padding, before, k)
        return
    values, scales = quantize(k[:, : config.kv_lora_rank], config.quant_tile)  # [R, rank], [R, 4]
    parts = (_to_bytes(values), _to_bytes(scales), _to_bytes(k[:, config.kv_lora_rank :]))
    kv_cache[slots, 0] = torch.where(is_padding, before, torch.cat(parts, dim=-1))  # [R, kv_token_bytes]


def load_kv(config: AttentionConfig, kv_cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Keys at ``slots`` [...], dequantised if the cache is FP8: bf16 [..., qk_head_dim]. No other slot is read."""
    tokens = kv_cache[slots.to(torch.int64), 0]  # [..., qk_head_dim] or [..., kv_token_bytes]
    if config.kv_cache_dtype is KVCacheDtype.BF16:
        return tokens
    scales_begin = config.kv_lora_rank
    rope_begin = scales_begin + NUM_QUANT_TILES * SCALE_BYTES
    values = _from_bytes(tokens[..., :scales_begin], torch.float8_e4m3fn)  # [..., rank]
    scales = _from_bytes(tokens[..., scales_begin:rope_begin], torch.float32)  # [..., 4]
    rope = _from_bytes(tokens[..., rope_begin:], torch.bfloat16)  # [..., rope]
    return torch.cat([dequantize(values, scales, config.quant_tile), rope], dim=-1)  # [..., qk_head_dim]


def store_index_k(
    config: AttentionConfig, index_k_cache: torch.Tensor, index_k: torch.Tensor, out_cache_loc: torch.Tensor
) -> None:
    """Write the index keys ``index_k`` [R, index_head_dim] bf16 to the slots ``out_cache_loc`` [R], in place.

    A row whose slot is -1 changes nothing.
    index_k_cache [num_pages, index_page_bytes] uint8: each page has the e4m3 keys of all its tokens, then a float32
    scale of each. Source: DeepGEMM's paged MQA logits, which read the two planes separately.
    """
    pages, key_bytes, scale_bytes = index_k_bytes(config, index_k_cache, out_cache_loc.clamp(min=0))
    is_padding = (out_cache_loc < 0).unsqueeze(-1)  # [R, 1]; such a row writes what is there, as in store_kv
    values, scales = quantize(index_k, config.index_head_dim)  # [R, index_head_dim], [R, 1]
    for where, stored in ((key_bytes, _to_bytes(values)), (scale_bytes, _to_bytes(scales))):
        index_k_cache[pages, where] = torch.where(is_padding, index_k_cache[pages, where], stored)


def load_index_k(
    config: AttentionConfig, index_k_cache: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index keys at ``slots`` [...], not yet scaled: float32 [..., index_head_dim]; their scales: float32 [...]."""
    pages, key_bytes, scale_bytes = index_k_bytes(config, index_k_cache, slots)
    values = _from_bytes(index_k_cache[pages, key_bytes], torch.float8_e4m3fn)  # [..., index_head_dim]
    scales = _from_bytes(index_k_cache[pages, scale_bytes], torch.float32)  # [..., 1]
    return values.to(torch.float32), scales.squeeze(-1)


def store_cache(config: AttentionConfig, caches: AttentionCaches, inputs: AttentionInputs) -> None:
    """Write the rows' own keys and index keys to both caches."""
    store_kv(config, caches.kv, inputs.k, inputs.out_cache_loc)
    store_index_k(config, caches.index_k, inputs.index_k, inputs.out_cache_loc)


def index_k_bytes(
    config: AttentionConfig, index_k_cache: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Location of index keys at slots [...]: page [..., 1], bytes of the key [..., head_dim], of the scale [..., 4]."""
    page_size = index_k_cache.shape[1] // config.index_page_bytes(1)
    slots = slots.to(torch.int64).unsqueeze(-1)  # [..., 1]
    pages, offsets = slots // page_size, slots % page_size  # [..., 1]
    key_byte = torch.arange(config.index_head_dim, device=slots.device)  # [index_head_dim]
    scale_byte = torch.arange(SCALE_BYTES, device=slots.device)  # [4]
    scales_begin = page_size * config.index_head_dim
    return pages, offsets * config.index_head_dim + key_byte, scales_begin + offsets * SCALE_BYTES + scale_byte


def _tiles(x: torch.Tensor, tile_size: int) -> torch.Tensor:
    """``x`` [..., n] as float32 [..., n / tile_size, tile_size]."""
    return x.to(torch.float32).reshape(*x.shape[:-1], x.shape[-1] // tile_size, tile_size)


def _to_bytes(x: torch.Tensor) -> torch.Tensor:
    """The bytes of ``x`` [..., n]: uint8 [..., n * itemsize]."""
    return _dense(x).view(torch.uint8)


def _from_bytes(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes ``x`` uint8 [..., n * itemsize] as ``dtype`` [..., n]."""
    return _dense(x).view(dtype)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, viewable as any dtype, which an unaligned slice or an empty result may not be."""
    return x.clone(memory_format=torch.contiguous_format)
