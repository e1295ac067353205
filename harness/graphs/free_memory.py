"""Overwrites memory that nobody holds, as the next allocation in a busy server would.

A block of torch's allocator that is free may be handed out at any moment, on the stream it belongs to: whoever still
reads it, from a graph or by an address kept in a table, reads what its next owner writes. Here that owner writes at
once. No memory is allocated for it, so that nothing moves.
"""

from __future__ import annotations

from typing import Any

import torch

from nsa_oracle.harness.graphs.allocator import SHARED_POOL, Allocator

MOST_SPOILED_BYTES = 1 << 31  # of one call: a bound on time, more than any case leaves behind
_WORD = 4


class _Words:
    """int32 words at an address, as an object that torch can see as a tensor."""

    def __init__(self, address: int, count: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (count,),
            "typestr": "<i4",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def spoil_free_blocks(allocator: Allocator, own_pool: tuple[int, int], device: torch.device, value: int) -> int:
    """Fill free blocks with ``value`` on the current stream; returns how many bytes.

    They are those that an allocation on this very stream could get without waiting, and those of ``own_pool``, which
    belong to one graph alone: between its replays they hold nothing.
    """
    stream, spoiled = torch.cuda.current_stream(device).cuda_stream, 0
    for block in allocator.blocks:
        shared = block.pool == SHARED_POOL and block.stream == stream
        if block.free and (shared or block.pool == own_pool) and spoiled + block.size <= MOST_SPOILED_BYTES:
            words = torch.as_tensor(_Words(block.address, block.size // _WORD), device=device)
            words.fill_(value)
            spoiled += block.size
    return spoiled


def spoil_storage(storage: torch.UntypedStorage, value: int) -> None:
    """Fill host memory with ``value``, whole words of it. A storage of another device is left alone."""
    if storage.device.type != "cpu":
        return
    memory = torch.empty(0, dtype=torch.uint8).set_(storage)
    memory[: len(memory) // _WORD * _WORD].view(torch.int32).fill_(value)
