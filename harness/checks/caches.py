"""Compares the caches of a layer byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from nsa_oracle.harness.checks.cells import picture_of
from nsa_oracle.harness.checks.tally import LayerTally
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.memory.bits import NAN_BYTE, as_bytes
from nsa_oracle.reference.kv_cache import index_k_bytes, store_index_k, store_kv
from nsa_oracle.reference.types import AttentionCaches, AttentionConfig, AttentionInputs, KVCacheDtype


def compare_caches(
    config: AttentionConfig,
    page_size: int,
    seen: AttentionCaches,
    expected: AttentionCaches,
    slot_name: Callable[[int], str],
    tally: LayerTally,
    inputs: AttentionInputs,
    row_name: Callable[[int], str],
    padding_slot: int,
) -> Finding | None:
    """Compare every byte of both dense caches, except page 0 if rows of padding are stored there.

    padding_slot: of rows of padding; if it is -1, nothing stores them. slot_name: gives the name of a slot in reports.
    inputs: of the pass, on any device, whose keys the caches have now; a row of it that was stored where it does not
    belong is named by ``row_name``.
    """
    dummy_pages = 0 if padding_slot < 0 else 1
    for name, got, want, skipped in (
        ("kv_cache", seen.kv.flatten(1), expected.kv.flatten(1), dummy_pages * page_size),
        ("index_k_cache", seen.index_k, expected.index_k, dummy_pages),
    ):
        got_bytes, want_bytes = as_bytes(got)[skipped:], as_bytes(want)[skipped:]
        tally.stage(name).exact += want_bytes.numel()
        wrong = got_bytes != want_bytes
        if not bool(wrong.any()):
            continue
        unit, byte = (int(i) for i in wrong.nonzero()[0])
        slot, part = _place_of(config, page_size, name, unit + skipped, byte)
        begin, dtype = _number_at(config, page_size, name, byte)
        writer = writer_of(config, name, slot, seen, expected, inputs)
        origin = "" if writer is None else f", as {row_name(writer)} stores"
        return Finding(
            Kind.VALUE,
            name,
            _shown(got_bytes[unit], byte, begin, dtype) + origin,
            _shown(want_bytes[unit], byte, begin, dtype),
            place=f"{slot_name(slot)}, {part}",
            differing=int(wrong.sum()),
            compared=want_bytes.numel(),
            picture=picture_of(
                got_bytes,
                want_bytes,
                wrong,
                "byte",
                partial(_unit_name, name, slot_name, skipped),
                shown="{:#04x}".format,
            ),
        )
    return None


def _unit_name(name: str, slot_name: Callable[[int], str], skipped: int, unit: int) -> str:
    """What a row of bytes is: a slot, or in the cache of index keys a page. skipped: rows before the first."""
    return slot_name(unit + skipped) if name == "kv_cache" else f"page {unit + skipped}"


FEWEST_BYTES = 4  # that tell the key of one row from another's


def writer_of(
    config: AttentionConfig,
    name: str,
    slot: int,
    seen: AttentionCaches,
    expected: AttentionCaches,
    inputs: AttentionInputs,
) -> int | None:
    """The one row whose key, or index key, is what differs in ``slot`` of the cache ``name``; None: no or several rows.

    A row that belongs to the slot is not taken: its key is wrong there, or was not expected yet.
    """
    got, want = _token(config, name, seen, slot), _token(config, name, expected, slot)
    differing = got != want
    if int(differing.sum()) < FEWEST_BYTES:
        return None
    alone = AttentionCaches(torch.zeros_like(seen.kv[:1]), torch.zeros_like(seen.index_k[:1]))
    first = torch.tensor([0], device=got.device)
    found = []
    for row in range(len(inputs.out_cache_loc)):
        if int(inputs.out_cache_loc[row]) == slot:
            continue
        keys, index_keys = inputs.k[row : row + 1].to(got.device), inputs.index_k[row : row + 1].to(got.device)
        store_kv(config, alone.kv, keys, first)
        store_index_k(config, alone.index_k, index_keys, first)
        if _token(config, name, alone, 0)[differing].equal(got[differing]):
            found.append(row)
    return found[0] if len(found) == 1 else None


def _token(config: AttentionConfig, name: str, caches: AttentionCaches, slot: int) -> torch.Tensor:
    """The bytes of one slot of the cache ``name``: of the index-K cache, the key and its scale."""
    if name == "kv_cache":
        return as_bytes(caches.kv[slot, 0])
    where = torch.tensor([slot], device=caches.index_k.device)
    pages, values, scales = index_k_bytes(config, caches.index_k, where)
    return torch.cat([caches.index_k[pages, values][0], caches.index_k[pages, scales][0]])


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
