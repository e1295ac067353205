"""Layers whose offsets do not reach slots that lie far apart."""

from __future__ import annotations

import torch

from tests.support.layers.attention import Attention
from tests.support.layers.indexer import Indexer
from tests.support.layers.store import Store


class SlotsInInt32(Attention):
    """The first element of a slot is kept in 32 bits."""

    def keys(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        found = slots.long() * cache.stride(0) < 1 << 31
        return super().keys(cache, torch.where(found, slots, 0))


class SlotsInUint32(Attention):
    """The first element of a slot is kept in 32 bits without a sign."""

    def keys(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        found = slots.long() * cache.stride(0) < 1 << 32
        return super().keys(cache, torch.where(found, slots, 0))


class BytesInInt32(Attention):
    """The first byte of a slot is kept in 32 bits, and memory is read at whatever address results."""

    def keys(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        size = cache.element_size()
        first = (slots.long() * cache.stride(0) * size).to(torch.int32).long() // size
        return torch.stack([super(BytesInInt32, self).keys(self.at(cache, int(n)), slots[:1] * 0)[0] for n in first])

    def at(self, cache: torch.Tensor, first: int) -> torch.Tensor:
        """One slot that begins at element ``first`` of the cache."""
        return cache.as_strided((1, *cache.shape[1:]), cache.stride(), cache.storage_offset() + first)


class IndexPagesInInt32(Indexer):
    """The first byte of a page of index keys is kept in 32 bits."""

    def keys(self, cache: torch.Tensor, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = pages.long() * cache.stride(0) < 1 << 31
        return super().keys(cache, torch.where(found, pages, 0), length)


class IndexPagesInUint32(Indexer):
    """The first byte of a page of index keys is kept in 32 bits without a sign."""

    def keys(self, cache: torch.Tensor, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = pages.long() * cache.stride(0) < 1 << 32
        return super().keys(cache, torch.where(found, pages, 0), length)


class StoresInInt32(Store):
    """Keys whose slot begins beyond 2^31 elements go to slot 0."""

    def store_kv(self, cache: torch.Tensor, k: torch.Tensor, slots: torch.Tensor) -> None:
        super().store_kv(cache, k, torch.where(slots * cache.stride(0) < 1 << 31, slots, 0))
