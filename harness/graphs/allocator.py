"""A snapshot of the blocks of torch's CUDA allocator."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SHARED_POOL = (0, 0)  # torch's id of the pool that does not belong to a graph


@dataclass(frozen=True)
class Reference:
    """An address that a graph uses. part: what uses it, in words. node: number of that node in the graph."""

    part: str
    address: int
    node: int = 0


@dataclass(frozen=True)
class Block:
    """A block of torch's caching allocator.

    size: in bytes, rounded up to a multiple of 512. requested: bytes that the allocation asked for. held: whether the
    block is allocated. free: whether the next allocation may get it; a block that was freed while a stream still uses
    it is neither held nor free.
    """

    address: int
    size: int
    requested: int
    held: bool
    free: bool
    pool: tuple[int, int]
    stream: int


def in_free_block(reference: Reference, block: Block) -> str:
    """Where in the free ``block`` a reference points to, in words."""
    return f"{reference.address - block.address} bytes into a free block of {block.size}"


class Allocator:
    """A snapshot of the blocks of torch's CUDA allocator on one device, in order of address."""

    def __init__(self, segments: Iterable[Mapping[str, Any]], device: int) -> None:
        """``segments``: the result of ``torch.cuda.memory_snapshot()``. ``device``: index of the GPU."""
        self.blocks = sorted(
            (block for segment in segments if segment["device"] == device for block in _blocks(segment)),
            key=lambda block: block.address,
        )
        self._addresses = [block.address for block in self.blocks]

    @classmethod
    def now(cls, device: torch.device) -> Allocator | None:
        """Take a snapshot. None if torch uses another allocator than its native one, or caches no blocks."""
        if torch.cuda.get_allocator_backend() != "native":
            return None
        index = torch.cuda.current_device() if device.index is None else device.index
        allocator = cls(torch.cuda.memory_snapshot(), index)  # type: ignore[no-untyped-call]
        return allocator if allocator.blocks else None

    def block_at(self, address: int) -> Block | None:
        """The block that contains ``address``, or None if the memory belongs to another allocator."""
        number = bisect.bisect_right(self._addresses, address) - 1
        if number < 0:
            return None
        block = self.blocks[number]
        return block if address < block.address + block.size else None

    def dangling(self, references: Sequence[Reference]) -> tuple[Reference, Block] | None:
        """The first of ``references`` to a block of the shared pool that is not held, with that block, or None."""
        for reference in references:
            block = self.block_at(reference.address)
            if block is None or block.held or block.pool != SHARED_POOL:
                continue
            if not self._may_be_an_end(reference, block, references):
                return reference, block
        return None

    def _may_be_an_end(self, reference: Reference, block: Block, references: Sequence[Reference]) -> bool:
        """Whether ``reference`` may be the end of the buffer in the preceding block, which some kernels receive.

        Such an address is not read. The same kernel then also receives the beginning of that buffer, and the buffer
        fills its block to the last byte: a shorter one would end before ``block``.
        """
        before = self.block_at(block.address - 1)
        return (
            reference.address == block.address
            and before is not None
            and before.held
            and before.requested == before.size
            and any(r.node == reference.node and before.address <= r.address < block.address for r in references)
        )


def _blocks(segment: Mapping[str, Any]) -> Iterable[Block]:
    pool = tuple(segment.get("segment_pool_id", SHARED_POOL))
    address = segment["address"]
    for block in segment["blocks"]:
        address = block.get("address", address)
        held, free = block["state"] == "active_allocated", block["state"] == "inactive"
        requested = block.get("requested_size", block["size"])
        yield Block(address, block["size"], requested, held, free, pool, segment["stream"])
        address += block["size"]
