"""Memory spread out so far that offsets need 64 bits, as in the caches and pools of production, but hardly any of it.

On a host it is addresses that nobody touches. A GPU provides all of it, so processes that share one take turns.
"""

from __future__ import annotations

import gc
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from nsa_oracle.harness.errors import ScenarioError

BEYOND_32_BITS = 1 << 32  # elements from which on an offset of 32 bits is wrong, with a sign or without
BEYOND_31_BITS = BEYOND_32_BITS >> 1  # with a sign
MOST_FAR_BYTES = 48 << 30  # of a GPU that one case may hold at a time: three engines, each with both caches
_PATIENCE = 0.02  # seconds between two looks whether it is one's turn
_ADDRESSES = 1 << 42  # bytes that rows may spread over on a host
_ROW_ALIGNMENT = 128
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # Python names it from 3.13 on: pages that may not all exist


@contextmanager
def memory_for(far: bool, device: torch.device) -> Iterator[None]:
    """Around the judging of one case: memory for what lies ``far`` apart, if anything does, returned afterwards.

    On a GPU it waits until so few processes hold such memory that there is enough.
    """
    if not far:
        yield
    elif device.type == "cpu":
        gc.collect()  # engines are in cycles, and each holds a page of memory for every row that is far
        yield
    else:
        with _turn(_places(device)):
            try:
                yield
            finally:
                _give_back()


def _places(device: torch.device) -> list[Path]:
    """A file for each case that finds room on the GPU at a time; whoever locks one may have ``MOST_BYTES``."""
    properties = torch.cuda.get_device_properties(device)
    name = f"nsa-oracle-{os.getuid()}-{properties.uuid}"
    count = max(1, properties.total_memory // MOST_FAR_BYTES)
    return [Path(tempfile.gettempdir()) / f"{name}.{place}.lock" for place in range(count)]


@contextmanager
def _turn(places: Sequence[Path]) -> Iterator[None]:
    """Hold the lock of one of ``places``; waits until one is free. A process that dies holds none."""
    while True:
        for place in places:
            try:
                held = FileLock(place).acquire(timeout=0)
            except Timeout:
                continue
            with held:
                yield
            return
        time.sleep(_PATIENCE)


def far_apart(dense: torch.Tensor, reach: int | None = None) -> torch.Tensor:
    """A copy of ``dense`` whose rows lie so far apart that offsets need 64 bits, in elements as in bytes.

    The last row lies ``reach`` elements behind the first. Without a reach that is 2**32 on a GPU, where memory is spent
    on all of it; on a host, where what lies between is not touched, every row but the first few lies beyond 2**32, and
    a wrapped offset stays within the memory: it finds row 0 or zeros. Raises ScenarioError where there is not as much.
    """
    rows, size = len(dense), dense.element_size()
    given = -(-(reach or BEYOND_32_BITS) * size // max(1, rows - 1) // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    if dense.device.type == "cpu":
        memory, stride, first = _untouched(dense, given if reach else BEYOND_32_BITS * size)
    else:
        memory, stride, first = _allocated((rows - 1) * given // size + dense[0].numel(), dense), given // size, 0
    return memory.as_strided(dense.shape, (stride, *dense.stride()[1:]), first).copy_(dense)


def _untouched(like: torch.Tensor, widest: int) -> tuple[torch.Tensor, int, int]:
    """Memory that the host provides when it is touched, in small pages: with the stride and first element of rows.

    Rows lie ``widest`` bytes apart, or less if that takes more addresses than the host has. The memory reaches as far
    around row 0 as an offset that wraps, in elements.
    """
    rows, size = len(like), like.element_size()
    before, least = BEYOND_31_BITS * size, (BEYOND_32_BITS + 1) * size
    for spread in (_ADDRESSES, _ADDRESSES >> 3, _ADDRESSES >> 6, 2 * least):
        stride = _aligned(min(widest, spread // rows))
        pages = _mapped(before + max(rows * stride, least) + _ROW_ALIGNMENT)
        if pages is not None:
            return torch.frombuffer(pages, dtype=like.dtype), stride // size, before // size
    raise ScenarioError(
        f"far memory needs {2 * least >> 30} GiB of addresses, and this process may not have them (ulimit -v?)"
    )


def _mapped(count: int) -> mmap.mmap | None:
    """Addresses of ``count`` bytes, if the host gives so many."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    for _ in range(2):
        try:
            pages = mmap.mmap(-1, count, flags=flags)
        except OSError:
            gc.collect()  # engines are in cycles, and each may hold as many
            continue
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages does not know the word
                pages.madvise(mmap.MADV_NOHUGEPAGE)
        return pages
    return None


def _allocated(count: int, like: torch.Tensor) -> torch.Tensor:
    """Memory of ``count`` elements on a GPU. What engines that are gone held makes room for it."""
    needed = count * like.element_size()
    for is_short in (torch.cuda.memory_reserved(like.device) + needed > MOST_FAR_BYTES, True):
        if is_short:
            _give_back()
        with suppress(torch.OutOfMemoryError):
            return torch.empty(count, dtype=like.dtype, device=like.device)
    raise ScenarioError(f"far memory needs {needed >> 30} GiB on {like.device} at once, and there is less")


def _give_back() -> None:
    """To other processes: what engines on a GPU held, which are in cycles, and what torch keeps of it for later."""
    gc.collect()
    torch.cuda.empty_cache()


def _aligned(count: int) -> int:
    return count - count % _ROW_ALIGNMENT
