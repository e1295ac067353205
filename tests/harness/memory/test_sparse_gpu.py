"""Addresses of a GPU that share memory: the pieces, what the driver (a fake) is asked for, and what a GPU does."""

# ruff: noqa: N802 - names of the driver
from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_oracle.harness.graphs.cuda import CudaGraphRunner
from nsa_oracle.harness.memory.far_apart import BEYOND_31_BITS, BEYOND_32_BITS, far_apart, gpu_bytes
from nsa_oracle.harness.memory.sparse_gpu import (
    GRANULE,
    Piece,
    _Mapping,
    _Refused,
    _unused,
    bytes_of,
    layout,
    unmap_unused,
)

G = GRANULE


class FakeDriver:
    """Notes every call. refused: the name of a call that fails, and after how many that succeed."""

    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    FIRST = 64 * G

    def __init__(self, refused: str = "", after: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.made: dict[int, int] = {}  # handle to size, of those not released
        self.mapped: dict[int, tuple[int, int]] = {}  # address to size and handle
        self.reserved = 0
        self._refused, self._after = refused, after

    def CUmemAllocationProp(self) -> Any:
        return SimpleNamespace(location=SimpleNamespace())

    def CUmemAccessDesc(self) -> Any:
        return SimpleNamespace()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append((name, *args))
            if name == self._refused and sum(call[0] == name for call in self.calls) > self._after:
                return (2,)
            return 0, *getattr(self, f"_{name}")(*args)

        return call

    def _cuMemAddressReserve(self, size: int, *_: int) -> tuple[int]:
        self.reserved = size
        return (self.FIRST,)

    def _cuMemCreate(self, size: int, properties: Any, _: int) -> tuple[int]:
        handle = len(self.calls)
        self.made[handle] = size
        return (handle,)

    def _cuMemRelease(self, handle: int) -> tuple[()]:
        del self.made[handle]
        return ()

    def _cuMemMap(self, address: int, size: int, offset: int, handle: int, _: int) -> tuple[()]:
        assert (self.made[handle], offset) == (size, 0), "the driver maps memory as a whole"
        self.mapped[address] = size, handle
        return ()

    def _cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> tuple[()]:
        assert (address, size, count) == (self.FIRST, self.reserved, len(access))
        assert sum(size for size, _ in self.mapped.values()) == size
        return ()

    def _cuMemUnmap(self, address: int, size: int) -> tuple[()]:
        assert self.mapped.pop(address)[0] == size
        return ()

    def _cuMemAddressFree(self, address: int, size: int) -> tuple[()]:
        assert not self.mapped
        assert size == self.reserved
        self.reserved = 0
        return ()


@pytest.mark.parametrize(
    ("count", "held", "pieces"),
    [
        (3 * G, [(G, G + 1)], [(0, G, False), (G, G, True), (2 * G, G, False)]),
        (3 * G, [(G - 1, G + 1)], [(0, 2 * G, True), (2 * G, G, False)]),
        (2 * G, [(5, 6), (7, 8), (G + 1, G + 2)], [(0, 2 * G, True)]),
        (4 * G, [(0, 1), (G, G + 1), (3 * G, 4 * G)], [(0, 2 * G, True), (2 * G, G, False), (3 * G, G, True)]),
        (G + 1, [], [(0, G, False), (G, G, False)]),
        (18 * G, [(17 * G, 17 * G + 8)], [(0, 16 * G, False), (16 * G, G, False), (17 * G, G, True)]),
    ],
    ids=["one granule", "across two", "neighbours", "runs", "nothing held", "a long gap"],
)
def test_layout(count: int, held: list[tuple[int, int]], pieces: list[tuple[int, int, bool]]) -> None:
    found = layout(count, held)
    assert found == [Piece(*piece) for piece in pieces]
    assert bytes_of(found) == sum(size for _, size, own in pieces if own) + 17 * G


def test_each_address_is_mapped_and_gaps_share_memory() -> None:
    driver = FakeDriver()
    mapping = _Mapping(driver, 0)
    pieces = layout(40 * G, [(3 * G, 3 * G + 8), (30 * G, 30 * G + 8), (38 * G, 39 * G)])
    assert mapping.map(pieces) == driver.FIRST
    end = driver.FIRST
    for address, (size, _) in sorted(driver.mapped.items()):
        assert address == end
        end += size
    assert end == driver.FIRST + 40 * G
    own = [driver.mapped[driver.FIRST + piece.begin][1] for piece in pieces if piece.own]
    fillers = {driver.mapped[driver.FIRST + piece.begin][1] for piece in pieces if not piece.own}
    assert len(set(own)) == 3
    assert len(fillers) == 2
    assert not fillers & set(own)
    assert not driver.made, "memory that stays referred to is not freed with its mapping"
    mapping.unmap()
    assert not driver.reserved
    mapping.unmap()  # once is enough


@pytest.mark.parametrize(
    ("refused", "after"),
    [("cuMemAddressReserve", 0), ("cuMemCreate", 1), ("cuMemMap", 2), ("cuMemSetAccess", 0)],
)
def test_refusal_of_the_driver_leaves_nothing(refused: str, after: int) -> None:
    driver = FakeDriver(refused, after)
    with pytest.raises(_Refused, match=refused):
        _Mapping(driver, 0).map(layout(40 * G, [(3 * G, 3 * G + 8), (30 * G, 30 * G + 8)]))
    assert not driver.made
    assert not driver.mapped
    assert not driver.reserved


class TestOnAGpu:
    """The rows are where they belong, all addresses can be read and written, and the memory goes back."""

    @pytest.fixture(autouse=True)
    def gpu(self, device: torch.device) -> torch.device:
        if device.type != "cuda":
            pytest.skip("needs a GPU")
        return device

    @pytest.mark.parametrize(
        ("rows", "columns", "dtype", "reach"),
        [
            (2, 7, torch.int32, BEYOND_31_BITS),
            (50, 5000, torch.int32, BEYOND_31_BITS),
            (300, 576, torch.bfloat16, None),
        ],
    )
    def test_rows_and_gaps(self, gpu: torch.device, rows: int, columns: int, dtype: torch.dtype, reach: int) -> None:
        dense = torch.arange(rows * columns, device=gpu).view(rows, columns).to(dtype)
        spread = far_apart(dense, reach)
        assert torch.equal(spread, dense)
        assert (rows - 1) * spread.stride(0) >= (reach or BEYOND_32_BITS)
        whole = torch.empty(0, dtype=dtype, device=gpu).set_(spread.untyped_storage())
        first = spread.storage_offset()
        for wrapped in (first - BEYOND_31_BITS, first + BEYOND_31_BITS - 8, first + BEYOND_32_BITS - 8):
            whole[wrapped : wrapped + 8] = 3
            assert whole[wrapped : wrapped + 8].tolist() == [3] * 8
        middle = first + spread.stride(0) // 2
        filler = torch.full((16,), 0x5A, dtype=torch.uint8).view(dtype)[0].item()
        assert whole[middle : middle + 8].tolist() == [filler] * 8
        assert torch.equal(spread, dense), "a row shares memory with a gap"

    def test_takes_no_more_memory_than_it_says(self, gpu: torch.device) -> None:
        needed = gpu_bytes(50, 20_000, 4, BEYOND_31_BITS)
        unmap_unused()
        mappings = [far_apart(torch.ones(50, 5000, dtype=torch.int32, device=gpu), BEYOND_31_BITS) for _ in range(3)]
        assert 3 * needed < 1 << 30 < mappings[0].untyped_storage().nbytes()
        del mappings
        gc.collect()
        assert len(_unused) == 3
        unmap_unused()
        assert not _unused

    def test_graph_replays_on_it(self, gpu: torch.device) -> None:
        spread = far_apart(torch.zeros(50, 5000, dtype=torch.int32, device=gpu), BEYOND_31_BITS)
        graph = CudaGraphRunner(gpu).capture(lambda: (spread.add_(1), None)[1])
        for _ in range(2):
            graph.replay()
        assert torch.equal(spread, torch.full_like(spread, 3))
        assert graph.released() is None
        assert graph.audit().fault is None
