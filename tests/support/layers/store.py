"""Layers that are wrong in the store of keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from nsa_oracle.harness.engine.passes import map_tensors
from nsa_oracle.reference import kv_cache
from nsa_oracle.reference.layer import SparseAttention
from nsa_oracle.reference.types import FP8_MAX, AttentionCaches, AttentionInputs, KVCacheDtype


def to_bytes(x: torch.Tensor) -> torch.Tensor:
    """The bytes of ``x`` [..., n]: uint8 [..., n * itemsize]."""
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


class Store(SparseAttention):
    """The reference's store with seams."""

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        self.store_kv(caches.kv, inputs.k, inputs.out_cache_loc)
        self.store_index_k(caches.index_k, inputs.index_k, inputs.out_cache_loc)

    def store_kv(self, cache: torch.Tensor, k: torch.Tensor, slots: torch.Tensor) -> None:
        fp8 = self.attention.kv_cache_dtype is KVCacheDtype.FP8
        cache[slots, 0] = torch.cat(self.parts(k), dim=-1) if fp8 else k

    def parts(self, k: torch.Tensor) -> Sequence[torch.Tensor]:
        """The bytes of tokens in the FP8 cache: latent, scales, RoPE."""
        rank = self.attention.kv_lora_rank
        values, scales = self.quantize(k[:, :rank], self.attention.quant_tile)
        return to_bytes(values), to_bytes(scales), to_bytes(k[:, rank:])

    def store_index_k(self, cache: torch.Tensor, k: torch.Tensor, slots: torch.Tensor) -> None:
        values, scales = self.quantize(k, self.attention.index_head_dim)
        pages, offsets = slots // self.config.page_size, slots % self.config.page_size
        self.put(cache, pages, offsets, to_bytes(values), to_bytes(scales))

    def put(
        self, cache: torch.Tensor, pages: torch.Tensor, offsets: torch.Tensor, key: torch.Tensor, scale: torch.Tensor
    ) -> None:
        dim = self.attention.index_head_dim
        write_bytes(cache, pages, offsets * dim, key)
        write_bytes(cache, pages, self.config.page_size * dim + 4 * offsets, scale)

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        return kv_cache.quantize(x, tile)


def write_bytes(cache: torch.Tensor, pages: torch.Tensor, first: torch.Tensor, values: torch.Tensor) -> None:
    """``values`` [n, bytes] to the bytes from ``first`` [n] on of ``pages`` [n]."""
    cache[pages[:, None], first[:, None] + torch.arange(values.shape[1], device=cache.device)] = values


class WritesNextSlot(Store):
    """Keys go one slot too far."""

    def store_kv(self, cache: torch.Tensor, k: torch.Tensor, slots: torch.Tensor) -> None:
        super().store_kv(cache, k, slots + 1)


class WritesTwoSlots(Store):
    """A key spills over into the slot behind its own."""

    def store_kv(self, cache: torch.Tensor, k: torch.Tensor, slots: torch.Tensor) -> None:
        super().store_kv(cache, k, slots + 1)
        super().store_kv(cache, k, slots)


class SkipsLastRow(Store):
    """The last row's keys are not written."""

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        super().store_cache(caches, map_tensors(inputs, lambda tensor: tensor[:-1]))


class StoresInFirstStepOnly(Store):
    """Later draft steps leave the slots of their keys as they were."""

    calls = 0

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        if self.calls % self.config.speculative_num_steps == 0:
            super().store_cache(caches, inputs)
        self.calls += 1


class RowsWithoutTokenWriteToSlotOne(Store):
    """The keys of rows that stand for no token go to slot 1, which is somebody's when pages hold one token."""

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        slots = torch.where(inputs.out_cache_loc == 0, 1, inputs.out_cache_loc)
        super().store_cache(caches, dataclasses.replace(inputs, out_cache_loc=slots))


class NeighbourTileScale(Store):
    """A tile of the latent gets the scale of the one before."""

    def parts(self, k: torch.Tensor) -> Sequence[torch.Tensor]:
        values, scales, rope = super().parts(k)
        return values, scales.roll(4, dims=1), rope


class StoresReciprocalScale(Store):
    """What is stored is the factor that the values were multiplied by."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = super().quantize(x, tile)
        return values, 1 / scales


class ScalesToTwoHundredForty(Store):
    """The largest value of a tile becomes 240, the maximum of another FP8 type."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        _, scales = super().quantize(x * (FP8_MAX / 240), tile)
        scaled = x.float().unflatten(-1, (-1, tile)) / scales.unsqueeze(-1)
        return scaled.flatten(-2).to(torch.float8_e4m3fn), scales


class ZeroScaleOfZeroTile(Store):
    """A tile of zeros gets the scale 0."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = super().quantize(x, tile)
        zero = (values.float() == 0).view(*scales.shape, tile).all(dim=-1)
        return values, scales.masked_fill(zero, 0)


class UnscaledLatents(Store):
    """Latents are cast as they are, with scales of 1."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        if tile == self.attention.index_head_dim:
            return super().quantize(x, tile)
        return x.float().to(torch.float8_e4m3fn), torch.ones_like(x.float()[:, :: self.attention.quant_tile])


class OneScaleForAllTiles(Store):
    """The largest of the whole latent decides the scale of every tile."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = super().quantize(x, x.shape[-1])
        return values, scales.expand(-1, x.shape[-1] // tile)


class RoundsTowardsZero(Store):
    """The cast to e4m3 cuts off instead of rounding to nearest."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = super().quantize(x, tile)
        away = values.float().abs() > (x.float().unflatten(-1, (-1, tile)) / scales.unsqueeze(-1)).flatten(-2).abs()
        return (values.view(torch.uint8) - away.to(torch.uint8)).view(torch.float8_e4m3fn), scales


class NanStaysAlone(Store):
    """A NaN does not enter the largest magnitude of its tile."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = super().quantize(x.nan_to_num(0, math.inf, -math.inf), tile)
        return torch.where(x.isnan(), math.nan, values.float()).to(torch.float8_e4m3fn), scales


class InfinityIsTheLargest(Store):
    """An infinite element counts as the largest finite one."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        return super().quantize(x.nan_to_num(math.nan), tile)


class TiesAwayFromZero(Store):
    """What lies half-way between two e4m3 numbers becomes the larger one."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = super().quantize(x, tile)
        scaled = (x.float().unflatten(-1, (-1, tile)) / scales.unsqueeze(-1)).flatten(-2).abs()
        bits = values.view(torch.uint8) & 0x7F
        next_one = torch.where(bits < 0x7E, bits + 1, bits).view(torch.float8_e4m3fn).float()
        tied = (bits < 0x7E) & (scaled - values.float().abs() == next_one - scaled)
        return (values.view(torch.uint8) + tied.to(torch.uint8)).view(torch.float8_e4m3fn), scales


class FlushesDenormalKeys(Store):
    """A denormal element counts as zero."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        return super().quantize(torch.where(x.abs() < torch.finfo(x.dtype).tiny, 0 * x, x), tile)


class RopeBeforeScales(Store):
    """The RoPE part lies where the scales belong, and the scales behind it."""

    def parts(self, k: torch.Tensor) -> Sequence[torch.Tensor]:
        values, scales, rope = super().parts(k)
        return values, rope, scales


class InterleavesIndexScales(Store):
    """Each index key is followed by its scale, instead of all keys of a page by all scales."""

    def put(
        self, cache: torch.Tensor, pages: torch.Tensor, offsets: torch.Tensor, key: torch.Tensor, scale: torch.Tensor
    ) -> None:
        write_bytes(cache, pages, offsets * self.attention.index_page_bytes(1), torch.cat([key, scale], dim=1))


class IndexKeyWithoutOffset(Store):
    """Index keys go to the start of their page, whatever their place in it."""

    def put(
        self, cache: torch.Tensor, pages: torch.Tensor, offsets: torch.Tensor, key: torch.Tensor, scale: torch.Tensor
    ) -> None:
        super().put(cache, pages, torch.zeros_like(offsets), key, scale)


class IndexKeyToNextPage(Store):
    """Index keys go to the page behind their own."""

    def put(
        self, cache: torch.Tensor, pages: torch.Tensor, offsets: torch.Tensor, key: torch.Tensor, scale: torch.Tensor
    ) -> None:
        super().put(cache, pages + 1, offsets, key, scale)
