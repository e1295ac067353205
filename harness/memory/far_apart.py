"""Small tensors whose rows lie so far apart that offsets need 64 bits, as in the caches and pools of production.

The gaps are addresses without memory of their own: never touched on a host, mapped to one small piece of memory on a
GPU. Where rows are many, so that there are no gaps of 2 MiB, it takes gigabytes of a GPU.
"""

from __future__ import annotations

import gc
import mmap
import sys
from contextlib import suppress

import torch

from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.graphs.driver import driver_bindings
from nsa_oracle.harness.memory.sparse_gpu import GRANULE, Piece, bytes_of, layout, sparse_gpu_memory, unmap_unused

BEYOND_32_BITS = 1 << 32  # elements; an offset of 32 bits, signed or unsigned, cannot express this or more
BEYOND_31_BITS = BEYOND_32_BITS >> 1  # elements; a signed offset of 32 bits cannot express this or more
MOST_FAR_BYTES = 48 << 30  # of GPU memory for one case: three engines with both caches, no rows with gaps of 2 MiB
_ADDRESSES = 1 << 42  # bytes of address space that rows may spread over on a host
_ROW_ALIGNMENT = 128
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE, in ``mmap`` from Python 3.13 on


def far_apart(dense: torch.Tensor, reach: int | None = None) -> torch.Tensor:
    """A copy of ``dense`` whose rows lie so far apart that offsets need 64 bits, in elements and in bytes.

    The last row lies ``reach`` elements after the first: 2**32 by default on a GPU, where rows that are close share
    little memory with the gaps. By default on a host every row but the first few lies beyond 2**32 elements. A wrapped
    offset stays within the memory, where it finds row 0 or the content of a gap. Raises ScenarioError if there is too
    little memory or address space.
    """
    rows, size = len(dense), dense.element_size()
    if dense.device.type == "cpu":
        widest = -(-reach * size // max(1, rows - 1)) if reach else BEYOND_32_BITS * size
        memory, stride, first = _sparse_host_memory(dense, widest)
    else:
        memory, stride, first = _gpu_memory(dense, reach)
    return memory.as_strided(dense.shape, (stride, *dense.stride()[1:]), first).copy_(dense)


def gpu_bytes(rows: int, row_bytes: int, element_size: int, reach: int | None = None) -> int:
    """The memory that ``far_apart`` takes on a GPU for ``rows`` of ``row_bytes`` each."""
    if driver_bindings() is None:
        return (rows - 1) * _gpu_spacing(rows, element_size, reach) + row_bytes
    return bytes_of(_gpu_pieces(rows, row_bytes, element_size, reach))


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


def _gpu_spacing(rows: int, size: int, reach: int | None) -> int:
    """The distance of ``rows`` of elements of ``size`` bytes on a GPU, in bytes."""
    spacing = -(-(reach or BEYOND_32_BITS) * size // max(1, rows - 1) // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    # A row that begins a granule is in no other one. Closer rows gain less than such a distance costs.
    return spacing if spacing < 4 * GRANULE else -(-spacing // GRANULE) * GRANULE


def _gpu_pieces(rows: int, row_bytes: int, size: int, reach: int | None) -> list[Piece]:
    """``rows`` and the gaps between them, with as much before and behind as a wrapped offset may reach."""
    spacing, before = _gpu_spacing(rows, size, reach), BEYOND_31_BITS * size
    count = before + max((rows - 1) * spacing + row_bytes, (BEYOND_32_BITS + 1) * size)
    begins = range(before, before + rows * spacing, spacing)
    return layout(count, [(begin, begin + row_bytes) for begin in begins])


def _gpu_memory(dense: torch.Tensor, reach: int | None) -> tuple[torch.Tensor, int, int]:
    """Memory of a GPU for the rows of ``dense``, their distance and the offset of row 0, in elements.

    Where the driver maps no memory to addresses, all of it is allocated, from row 0 on.
    """
    rows, size, row_bytes = len(dense), dense.element_size(), dense[0].numel() * dense.element_size()
    spacing = _gpu_spacing(rows, size, reach)
    pieces = _gpu_pieces(rows, row_bytes, size, reach)
    for _ in range(2):
        memory = sparse_gpu_memory(pieces, dense.device)
        if memory is not None:
            return memory.view(dense.dtype), spacing // size, BEYOND_31_BITS
        release_unused()  # memory of engines that are gone
    count = (rows - 1) * spacing // size + dense[0].numel()
    with suppress(torch.OutOfMemoryError):
        return torch.empty(count, dtype=dense.dtype, device=dense.device), spacing // size, 0
    raise ScenarioError(f"far memory needs {count * size >> 30} GiB on {dense.device} in one piece, and less is free")


def release_unused() -> None:
    """Return GPU memory to other processes: that of engines in reference cycles, and what torch keeps cached."""
    gc.collect()
    torch.cuda.empty_cache()
    unmap_unused()


def _aligned(count: int) -> int:
    return count - count % _ROW_ALIGNMENT
