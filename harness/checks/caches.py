"""Compares the caches of a layer byte by byte."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsa_oracle.harness.checks.tally import LayerTally
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.memory.bits import NAN_BYTE, as_bytes
from nsa_oracle.reference.kv_cache import index_k_bytes
from nsa_oracle.reference.types import AttentionCaches, AttentionConfig, KVCacheDtype


def compare_caches(
    config: AttentionConfig,
    page_size: int,
    seen: AttentionCaches,
    expected: AttentionCaches,
    slot_name: Callable[[int], str],
    tally: LayerTally,
) -> Finding | None:
    """Compare every byte of both dense caches, except page 0, whose content is unspecified.

    slot_name: returns the name of a slot in reports.
    """
    for name, got, want, skipped in (
        ("kv_cache", seen.kv.flatten(1), expected.kv.flatten(1), page_size),
        ("index_k_cache", seen.index_k, expected.index_k, 1),
    ):
        got_bytes, want_bytes = as_bytes(got)[skipped:], as_bytes(want)[skipped:]
        tally.stage(name).exact += want_bytes.numel()
        wrong = got_bytes != want_bytes
        if not bool(wrong.any()):
            continue
        unit, byte = (int(i) for i in wrong.nonzero()[0])
        slot, part = _place_of(config, page_size, name, unit + skipped, byte)
        begin, dtype = _number_at(config, page_size, name, byte)
        return Finding(
            Kind.VALUE,
            name,
            _shown(got_bytes[unit], byte, begin, dtype),
            _shown(want_bytes[unit], byte, begin, dtype),
            place=f"{slot_name(slot)}, {part}",
            differing=int(wrong.sum()),
            compared=want_bytes.numel(),
        )
    return None


def _number_at(config: AttentionConfig, page_size: int, name: str, byte: int) -> tuple[int, torch.dtype]:
    """The first byte and the dtype of the number that a byte of a slot's or a page's row belongs to."""
    if name == "index_k_cache":
        parts = [(0, torch.float8_e4m3fn), (page_size * config.index_head_dim, torch.float32)]
    elif config.kv_cache_dtype is KVCacheDtype.FP8:
        rope = config.kv_token_bytes - 2 * config.qk_rope_head_dim
        parts = [(0, torch.float8_e4m3fn), (config.kv_lora_rank, torch.float32), (rope, torch.bfloat16)]
    else:
        parts = [(0, torch.bfloat16)]
    begin, dtype = next(part for part in reversed(parts) if part[0] <= byte)
    return byte - (byte - begin) % dtype.itemsize, dtype


def _shown(row: torch.Tensor, byte: int, begin: int, dtype: torch.dtype) -> str:
    """The number of ``row`` that begins at the byte ``begin``, and the byte of it that differs."""
    number = row[begin : begin + dtype.itemsize].cpu().clone().view(dtype)
    return f"{float(number):.9g} (byte {int(row[byte]):#04x})"


def _place_of(config: AttentionConfig, page_size: int, name: str, unit: int, byte: int) -> tuple[int, str]:
    """The slot that a byte of a cache belongs to, and the part of the slot's token."""
    if name == "index_k_cache":
        keys = page_size * config.index_head_dim
        if byte < keys:
            return unit * page_size + byte // config.index_head_dim, f"key element {byte % config.index_head_dim}"
        return unit * page_size + (byte - keys) // 4, "scale"
    if config.kv_cache_dtype is KVCacheDtype.BF16:
        element = byte // 2
        latent = element < config.kv_lora_rank
        return unit, f"latent element {element}" if latent else f"RoPE element {element - config.kv_lora_rank}"
    if byte < config.kv_lora_rank:
        return unit, f"latent element {byte}"
    rope = config.kv_token_bytes - 2 * config.qk_rope_head_dim
    if byte < rope:
        return unit, f"scale {(byte - config.kv_lora_rank) // 4}"
    return unit, f"RoPE element {(byte - rope) // 2}"


def with_canonical_nans(config: AttentionConfig, caches: AttentionCaches, slots: torch.Tensor) -> AttentionCaches:
    """A copy of dense ``caches`` in which all NaNs in ``slots`` [n] have the same bits."""
    kv, index_k = caches.kv.clone(), caches.index_k.clone()
    tokens = as_bytes(kv[slots, 0])  # [n, bytes]
    if config.kv_cache_dtype is KVCacheDtype.FP8:
        scales_begin, rope_begin = config.kv_lora_rank, config.kv_token_bytes - 2 * config.qk_rope_head_dim
        parts = [
            _canonical_nans(tokens[:, :scales_begin], torch.float8_e4m3fn),
            _canonical_nans(tokens[:, scales_begin:rope_begin], torch.float32),
            _canonical_nans(tokens[:, rope_begin:], torch.bfloat16),
        ]
    else:
        parts = [_canonical_nans(tokens, torch.bfloat16)]
    as_bytes(kv)[slots, 0] = torch.cat(parts, dim=1)
    pages, values, scales = index_k_bytes(config, index_k, slots)
    index_k[pages, values] = _canonical_nans(index_k[pages, values], torch.float8_e4m3fn)
    index_k[pages, scales] = _canonical_nans(index_k[pages, scales], torch.float32)
    return AttentionCaches(kv, index_k)


def _canonical_nans(content: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``content`` [n, bytes] uint8, numbers of ``dtype``, with all bytes of each NaN set to NAN_BYTE."""
    nan = content.clone(memory_format=torch.contiguous_format).view(dtype).float().isnan()
    return torch.where(nan.repeat_interleave(dtype.itemsize, dim=1), NAN_BYTE, content)
