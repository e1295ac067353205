"""The blocks of torch's CUDA allocator at one moment."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SHARED_POOL = (0, 0)  # what torch calls the pool that is no graph's


@dataclass(frozen=True)
class Reference:
    """An address that the graph uses, and the part of the graph that does. node: its number in the graph."""

    part: str
    address: int
    node: int = 0


@dataclass(frozen=True)
class Block:
    """A piece of memory of torch's allocator.

    requested: bytes of it that somebody asked for; a block is rounded up to 512. held: whether somebody has it. free:
    whether the next allocation may get it; what nobody holds is not free as long as a stream uses it.
    """

    address: int
    size: int
    requested: int
    held: bool
    free: bool
    pool: tuple[int, int]
    stream: int


class Allocator:
    """The blocks of torch's CUDA allocator at one moment."""

    def __init__(self, segments: Iterable[Mapping[str, Any]], device: int) -> None:
        """``segments``: what ``torch.cuda.memory_snapshot()`` returns."""
        self.blocks = sorted(
            (block for segment in segments if segment["device"] == device for block in _blocks(segment)),
            key=lambda block: block.address,
        )
        self._addresses = [block.address for block in self.blocks]

    @classmethod
    def now(cls, device: torch.device) -> Allocator | None:
        """As it is; None if blocks come from another allocator than torch's own, or are not cached at all."""
        if torch.cuda.get_allocator_backend() != "native":
            return None
        index = torch.cuda.current_device() if device.index is None else device.index
        allocator = cls(torch.cuda.memory_snapshot(), index)  # type: ignore[no-untyped-call]
        return allocator if allocator.blocks else None

    def block_at(self, address: int) -> Block | None:
        """The block that holds ``address``, or None if it is of another allocator."""
        number = bisect.bisect_right(self._addresses, address) - 1
        if number < 0:
            return None
        block = self.blocks[number]
        return block if address < block.address + block.size else None

    def dangling(self, references: Sequence[Reference]) -> tuple[Reference, Block] | None:
        """The first of ``references`` into a block that nobody holds, or None."""
        for reference in references:
            block = self.block_at(reference.address)
            if block is None or block.held or block.pool != SHARED_POOL:
                continue
            if not self._may_be_an_end(reference, block, references):
                return reference, block
        return None

    def _may_be_an_end(self, reference: Reference, block: Block, references: Sequence[Reference]) -> bool:
        """Whether ``reference`` may say where the buffer before ``block`` ends, as some kernels are told.

        Nothing is read there, and where that buffer begins is a parameter of the same kernel. A buffer that leaves the
        last bytes of its block unused ends before.
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
