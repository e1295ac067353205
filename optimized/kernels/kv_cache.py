"""Quantises the rows' own keys and stores them in the caches, in one launch."""

# mypy: disable-error-code="untyped-decorator"
# (Triton ships no types for its decorator)

from __future__ import annotations

import triton
import triton.language as tl

from nsa_oracle.optimized.kernels.fp8 import E4M3_MAX, FLOAT32_ABS, to_e4m3_bits

SCALE_BYTES = tl.constexpr(4)  # of a float32
ROPE_BYTES = tl.constexpr(2)  # of a bf16


@triton.jit
def quantize(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Rows of ``x`` [n, m] bf16 as e4m3 bits, uint8 [n, m], and each row's scale, float32 [n, 1].

    The largest magnitude is found by its bits: bits of magnitudes have the order of their values, with NaN above all
    others, so that a NaN makes its whole row NaN. bf16 is the upper half of a float32, hence the shift; the
    interpreter's cast gets subnormals wrong.
    """
    bits = x.to(tl.uint16, bitcast=True).to(tl.int32) << 16
    x = bits.to(tl.float32, bitcast=True)
    magnitudes = bits & FLOAT32_ABS
    amax = tl.max(magnitudes, axis=1, keep_dims=True).to(tl.float32, bitcast=True)
    divisor = tl.full(amax.shape, E4M3_MAX, tl.float32)  # a tensor: a constant divisor may become a multiplication
    scales = tl.where(amax == 0, 1.0, tl.div_rn(amax, divisor))
    return to_e4m3_bits(tl.div_rn(x, tl.broadcast_to(scales, x.shape))), scales


@triton.jit
def store_scales(target: tl.tensor, scales: tl.tensor) -> None:
    """``scales`` [n, 1] float32, byte by byte: a token's bytes may start anywhere."""
    lanes = tl.arange(0, SCALE_BYTES)[None, :]
    tiles = tl.arange(0, scales.shape[0])[:, None]
    scale_bytes = (scales.to(tl.uint32, bitcast=True) >> (8 * lanes)).to(tl.uint8)
    tl.store(target + tiles * SCALE_BYTES + lanes, scale_bytes)


_RUNTIME = [
    "kv", "index_k_cache", "k", "index_k", "out_cache_loc", "slot_stride", "page_stride", "k_stride", "index_k_stride",
    "loc_stride", "num_rows",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_RUNTIME)
def store_cache_kernel(
    kv: tl.tensor,
    index_k_cache: tl.tensor,
    k: tl.tensor,
    index_k: tl.tensor,
    out_cache_loc: tl.tensor,
    slot_stride: tl.tensor,
    page_stride: tl.tensor,
    k_stride: tl.tensor,
    index_k_stride: tl.tensor,
    loc_stride: tl.tensor,
    num_rows: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    IS_FP8: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    TILES: tl.constexpr,
    INDEX_DIM: tl.constexpr,
    TILE_LANES: tl.constexpr,
    ROPE_LANES: tl.constexpr,
    INDEX_LANES: tl.constexpr,
) -> None:
    """Programs by id: one per row for its key, then one per row for its index key. They share nothing but the slot.

    Only the bytes of the row's own slot are written; nothing, if the slot is -1. Strides are in elements. Each of the
    LANES is a size rounded up to a power of two.
    """
    pid = tl.program_id(0)
    is_key = pid < num_rows
    row = tl.where(is_key, pid, pid - num_rows)
    slot = tl.load(out_cache_loc + row * loc_stride.to(tl.int64)).to(tl.int64)
    if slot >= 0:
        if is_key:
            source = k + row * k_stride.to(tl.int64)
            target = kv + slot * slot_stride
            tile: tl.constexpr = LATENT // TILES
            tile_lanes = tl.arange(0, TILE_LANES)[None, :]
            latent = tl.arange(0, TILES)[:, None] * tile + tile_lanes  # [TILES, TILE_LANES]
            in_latent = (tile_lanes < tile) & (latent >= 0)
            values = tl.load(source + latent, mask=in_latent, other=0.0)
            if IS_FP8:
                codes, scales = quantize(values)
                tl.store(target + latent, codes, mask=in_latent)
                store_scales(target + LATENT, scales)
                rope_bytes = tl.arange(0, ROPE_LANES * ROPE_BYTES)
                in_rope = rope_bytes < ROPE * ROPE_BYTES
                rope = tl.load((source + LATENT).to(tl.pointer_type(tl.uint8)) + rope_bytes, mask=in_rope, other=0)
                tl.store(target + LATENT + TILES * SCALE_BYTES + rope_bytes, rope, mask=in_rope)
            else:
                tl.store(target + latent, values, mask=in_latent)
                rope_lanes = tl.arange(0, ROPE_LANES)
                rope = tl.load(source + LATENT + rope_lanes, mask=rope_lanes < ROPE, other=0.0)
                tl.store(target + LATENT + rope_lanes, rope, mask=rope_lanes < ROPE)
        else:
            page = slot // PAGE_SIZE
            offset = slot - page * PAGE_SIZE
            page_begin = index_k_cache + page * page_stride
            lanes = tl.arange(0, INDEX_LANES)[None, :]
            index_row = index_k + row * index_k_stride.to(tl.int64)
            index_values = tl.load(index_row + lanes, mask=lanes < INDEX_DIM, other=0.0)
            index_codes, index_scales = quantize(index_values)
            tl.store(page_begin + offset * INDEX_DIM + lanes, index_codes, mask=lanes < INDEX_DIM)
            store_scales(page_begin + PAGE_SIZE * INDEX_DIM + offset * SCALE_BYTES, index_scales)
