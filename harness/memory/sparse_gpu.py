"""Gigabytes of addresses of a GPU, of which only some hold memory of their own.

The driver maps memory to addresses in granules of 2 MiB. Those that hold something get memory; all others share one
small piece, the filler, so that every address of the range can be read and written. Nothing is promised of the content
of the filler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from nsa_oracle.harness.graphs.driver import MemoryAt, driver_bindings

GRANULE = 2 << 20  # bytes; what the driver maps is a multiple of its granularity, 2 MiB on all GPUs so far
_FILLER = 16 * GRANULE  # bytes of the larger of two fillers: fewer pieces to map
_FILLER_BYTE = 0x5A  # as integers no slot, page or length of a case: see the sentinels in ``memory.poison``
ByteRange = tuple[int, int]
"""Begin and end, in bytes."""
_unused: list[_Mapping] = []


@dataclass(frozen=True)
class Piece:
    """A part of the range, mapped at once. own: has memory of its own."""

    begin: int
    size: int
    own: bool


def layout(count: int, held: Sequence[ByteRange]) -> list[Piece]:
    """Divides ``count`` bytes into pieces of whole granules. held: what needs memory of its own, in ascending order."""
    pieces: list[Piece] = []
    end = 0
    for begin, behind in held:
        begin, behind = max(end, begin // GRANULE * GRANULE), -(-behind // GRANULE) * GRANULE
        if begin < behind:
            pieces += _filled(end, begin)
            if pieces and pieces[-1].own and pieces[-1].begin + pieces[-1].size == begin:
                begin = pieces.pop().begin
            pieces.append(Piece(begin, behind - begin, True))
            end = behind
    return [*pieces, *_filled(end, -(-count // GRANULE) * GRANULE)]


def _filled(begin: int, end: int) -> Iterator[Piece]:
    while begin < end:
        size = _FILLER if end - begin >= _FILLER else GRANULE
        yield Piece(begin, size, False)
        begin += size


def bytes_of(pieces: Sequence[Piece]) -> int:
    """The memory that ``pieces`` take."""
    return sum(piece.size for piece in pieces if piece.own) + _FILLER + GRANULE


def sparse_gpu_memory(pieces: Sequence[Piece], device: torch.device) -> torch.Tensor | None:
    """uint8 [addresses of all ``pieces``]. None if the driver refuses, or its bindings are not installed."""
    driver = driver_bindings()
    if driver is None:
        return None
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # makes the device's context that of this thread
        unmap_unused()
        mapping = _Mapping(driver, torch.cuda.current_device())
        try:
            address = mapping.map(pieces)
        except _Refused:
            return None
        region = _Region(address, mapping.size, mapping)
        memory = torch.as_tensor(region, device=device)
        for size in {piece.size for piece in pieces if not piece.own}:
            begin = next(piece.begin for piece in pieces if not piece.own and piece.size == size)
            memory[begin : begin + size].fill_(_FILLER_BYTE)
    return memory


def unmap_unused() -> None:
    """Return the memory of ranges whose tensors are gone to the driver. Waits for the device if there is any."""
    while _unused:
        mapping = _unused.pop()
        with torch.cuda.device(mapping.device), suppress(RuntimeError):  # a GPU that has faulted refuses everything
            torch.cuda.synchronize()
            mapping.unmap()


class _Refused(Exception):
    """The driver refused a call."""


class _Mapping:
    """A range of addresses of one GPU, and the memory mapped to it. The context of the device must be current."""

    def __init__(self, driver: Any, device: int) -> None:
        self.device = device
        self.size = 0
        self._driver = driver
        self._address: Any = None
        self._mapped: list[ByteRange] = []

    def map(self, pieces: Sequence[Piece]) -> int:
        """Reserve addresses for ``pieces`` and map memory to all. Returns the first. Raises _Refused."""
        driver = self._driver
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self.device
        access = driver.CUmemAccessDesc()
        access.location = properties.location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self.size = sum(piece.size for piece in pieces)
        made: list[Any] = []
        fillers: dict[int, Any] = {}  # by size
        try:
            self._address = self._call("cuMemAddressReserve", self.size, GRANULE, 0, 0)
            first = int(self._address)
            for piece in pieces:
                handle = None if piece.own else fillers.get(piece.size)
                if handle is None:
                    handle = self._call("cuMemCreate", piece.size, properties, 0)
                    made.append(handle)
                    if not piece.own:
                        fillers[piece.size] = handle
                self._call("cuMemMap", first + piece.begin, piece.size, 0, handle, 0)
                self._mapped.append((piece.begin, piece.size))
            self._call("cuMemSetAccess", first, self.size, [access], 1)
        except _Refused:
            self.unmap()
            raise
        finally:
            with suppress(_Refused):
                for handle in made:
                    self._call("cuMemRelease", handle)  # the memory lives as long as it is mapped
        return first

    def unmap(self) -> None:
        if self._address is None:
            return
        with suppress(_Refused):
            for begin, size in self._mapped:
                self._call("cuMemUnmap", int(self._address) + begin, size)
            self._call("cuMemAddressFree", self._address, self.size)
        self._address, self._mapped = None, []

    def _call(self, name: str, *args: Any) -> Any:
        code, *results = getattr(self._driver, name)(*args)
        if int(code) != 0:
            raise _Refused(f"{name} returned {code}")
        return results[0] if results else None


class _Region(MemoryAt):
    """The range of a mapping, which is unmapped some time after the last tensor on it is gone."""

    def __init__(self, address: int, size: int, mapping: _Mapping) -> None:
        super().__init__(address, size, "|u1")
        self._mapping = mapping
        self._unused = _unused  # when Python ends, the module may be gone first

    def __del__(self) -> None:
        self._unused.append(self._mapping)  # not unmapped here: kernels may still run, or a graph be under capture
