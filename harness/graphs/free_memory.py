"""Overwrites free memory, as the next allocation in a busy server would.

torch's allocator may hand out a free block at any time, on the stream that the block belongs to. A graph, or an address
kept in a table, that still refers to the block then reads what its next owner writes. This module writes to the block
at once. It allocates no memory, so it does not change which blocks later allocations get.
"""

from __future__ import annotations

import torch

from nsa_oracle.harness.graphs.allocator import SHARED_POOL, Allocator
from nsa_oracle.harness.graphs.driver import MemoryAt

MOST_SPOILED_BYTES = 1 << 31  # for one call: bounds the time
_WORD = 4


def spoil_free_blocks(allocator: Allocator, own_pool: tuple[int, int], device: torch.device, value: int) -> int:
    """Fill free blocks with the int32 ``value`` on the current stream, and return the number of bytes written.

    The blocks are those that an allocation on this stream could get without waiting, and the free blocks of
    ``own_pool``, which belong to one graph alone and hold nothing between its replays. The graph's own come first,
    then the small ones: what a process of many cases has left free may be more than one call fills.
    """
    stream, spoiled = torch.cuda.current_stream(device).cuda_stream, 0
    for block in sorted(allocator.blocks, key=lambda block: (block.pool != own_pool, block.size)):
        shared = block.pool == SHARED_POOL and block.stream == stream
        if block.free and (shared or block.pool == own_pool) and spoiled + block.size <= MOST_SPOILED_BYTES:
            words = torch.as_tensor(MemoryAt(block.address, block.size // _WORD, "<i4"), device=device)
            words.fill_(value)
            spoiled += block.size
    return spoiled


def spoil_storage(storage: torch.UntypedStorage, value: int) -> None:
    """Fill the whole int32 words of a storage in host memory with ``value``. Leaves other devices' storages alone."""
    if storage.device.type != "cpu":
        return
    memory = torch.empty(0, dtype=torch.uint8).set_(storage)
    memory[: len(memory) // _WORD * _WORD].view(torch.int32).fill_(value)
