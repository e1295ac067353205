"""Small tensors whose rows lie so far apart that offsets need 64 bits, as in the caches and pools of production.

On a host the gaps are address space that is never touched. A GPU allocates all of it, so processes that share a GPU
take turns.
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

BEYOND_32_BITS = 1 << 32  # elements; an offset of 32 bits, signed or unsigned, cannot express this or more
BEYOND_31_BITS = BEYOND_32_BITS >> 1  # elements; a signed offset of 32 bits cannot express this or more
MOST_FAR_BYTES = 48 << 30  # of GPU memory for one case at a time: three engines, each with both caches
_POLL_INTERVAL = 0.02  # seconds between attempts to lock a place
_ADDRESSES = 1 << 42  # bytes of address space that rows may spread over on a host
_ROW_ALIGNMENT = 128
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE, in ``mmap`` from Python 3.13 on


@contextmanager
def memory_for(far: bool, device: torch.device) -> Iterator[None]:
    """Context for judging one case. If the case is ``far``, reserves memory for it and releases it afterwards.

    On a GPU, waits until few enough processes hold such memory.
    """
    if not far:
        yield
    elif device.type == "cpu":
        gc.collect()  # engines are in reference cycles, and each holds a page of memory for every far row
        yield
    else:
        with _turn(_lock_files(device)):
            try:
                yield
            finally:
                _release_unused()


def _lock_files(device: torch.device) -> list[Path]:
    """Lock files, one for each case that fits on the GPU at a time. The owner of a lock may use ``MOST_FAR_BYTES``."""
    properties = torch.cuda.get_device_properties(device)
    name = f"nsa-oracle-{os.getuid()}-{properties.uuid}"
    count = max(1, properties.total_memory // MOST_FAR_BYTES)
    return [Path(tempfile.gettempdir()) / f"{name}.{place}.lock" for place in range(count)]


@contextmanager
def _turn(places: Sequence[Path]) -> Iterator[None]:
    """Hold the lock of one of ``places``. Waits until one is free. A process that dies releases its lock."""
    while True:
        for place in places:
            try:
                held = FileLock(place).acquire(timeout=0)
            except Timeout:
                continue
            with held:
                yield
            return
        time.sleep(_POLL_INTERVAL)


def far_apart(dense: torch.Tensor, reach: int | None = None) -> torch.Tensor:
    """A copy of ``dense`` whose rows lie so far apart that offsets need 64 bits, in elements and in bytes.

    The last row lies ``reach`` elements after the first. The default reach on a GPU is 2**32, because all of the memory
    is allocated. By default on a host, where gaps are not touched, every row but the first few lies beyond 2**32
    elements, and a wrapped offset stays within the memory, where it finds row 0 or zeros. Raises ScenarioError if
    there is too little memory or address space.
    """
    rows, size = len(dense), dense.element_size()
    spacing = -(-(reach or BEYOND_32_BITS) * size // max(1, rows - 1) // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    if dense.device.type == "cpu":
        memory, stride, first = _sparse_host_memory(dense, spacing if reach else BEYOND_32_BITS * size)
    else:
        memory, stride, first = _gpu_memory((rows - 1) * spacing // size + dense[0].numel(), dense), spacing // size, 0
    return memory.as_strided(dense.shape, (stride, *dense.stride()[1:]), first).copy_(dense)


def _sparse_host_memory(like: torch.Tensor, widest: int) -> tuple[torch.Tensor, int, int]:
    """Host memory that exists only where it is touched, in small pages. Also returns the row stride and row 0's offset.

    The stride and the offset are in elements. Rows lie ``widest`` bytes apart, or less if the host has too few
    addresses. The memory extends around row 0 as far as a wrapped offset, counted in elements, can point.
    """
    rows, size = len(like), like.element_size()
    before, least = BEYOND_31_BITS * size, (BEYOND_32_BITS + 1) * size
    for spread in (_ADDRESSES, _ADDRESSES >> 3, _ADDRESSES >> 6, 2 * least):
        stride = _aligned(min(widest, spread // rows))
        pages = _mapped_addresses(before + max(rows * stride, least) + _ROW_ALIGNMENT)
        if pages is not None:
            return torch.frombuffer(pages, dtype=like.dtype), stride // size, before // size
    raise ScenarioError(
        f"far memory needs {2 * least >> 30} GiB of addresses, and this process may not have them (ulimit -v?)"
    )


def _mapped_addresses(count: int) -> mmap.mmap | None:
    """Maps ``count`` bytes of address space. Returns None if the host refuses."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    for _ in range(2):
        try:
            pages = mmap.mmap(-1, count, flags=flags)
        except OSError:
            gc.collect()  # engines are in reference cycles, and each may hold as many addresses
            continue
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages rejects this
                pages.madvise(mmap.MADV_NOHUGEPAGE)
        return pages
    return None


def _gpu_memory(count: int, like: torch.Tensor) -> torch.Tensor:
    """Allocates ``count`` elements on a GPU. First releases memory of engines that are gone, if that is needed."""
    needed = count * like.element_size()
    for is_short in (torch.cuda.memory_reserved(like.device) + needed > MOST_FAR_BYTES, True):
        if is_short:
            _release_unused()
        with suppress(torch.OutOfMemoryError):
            return torch.empty(count, dtype=like.dtype, device=like.device)
    raise ScenarioError(f"far memory needs {needed >> 30} GiB on {like.device} in one piece, and less is free")


def _release_unused() -> None:
    """Return GPU memory to other processes: that of engines in reference cycles, and what torch keeps cached."""
    gc.collect()
    torch.cuda.empty_cache()


def _aligned(count: int) -> int:
    return count - count % _ROW_ALIGNMENT
