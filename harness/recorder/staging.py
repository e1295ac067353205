"""Copies of tensors to the host that nobody waits for.

Those of the device go to pinned memory, with an event behind them, by calls of the driver: torch's own calls take two
to six times as long, and each lends Python's lock to the thread that writes.
"""

from __future__ import annotations

import ctypes
import functools
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

SLOT = 1 << 14  # bytes of the pinned memory of one call: rows, lengths and accept lengths of 800 requests in int64
_TOGETHER = 64  # slots that are pinned together, because pinning takes long
_ALIGNED = 16  # bytes
Copies = tuple[Callable[[], bool], Callable[[], dict[str, torch.Tensor]]]
"""Whether the copies are done; and what was copied, by name, which may be asked once."""


@dataclass(frozen=True, slots=True)
class _Slot:
    address: int
    memory: torch.Tensor  # uint8 [SLOT], pinned
    event: torch.cuda.Event
    handle: int  # of the event, for the driver


@dataclass(slots=True)
class _Part:
    """A tensor as the bytes of a host tensor, or those from ``start`` of a slot."""

    dtype: torch.dtype
    shape: torch.Size
    content: bytes | int

    def tensor(self, slot: _Slot | None) -> torch.Tensor:
        if slot is None or isinstance(self.content, bytes):
            plain = bytearray(self.content)
            flat = torch.frombuffer(plain, dtype=self.dtype) if plain else torch.empty(0, dtype=self.dtype)
        else:
            size = self.shape.numel() * self.dtype.itemsize
            flat = slot.memory[self.content : self.content + size].view(self.dtype).clone()
        return flat.view(self.shape)


class Staging:
    """Pinned slots, used again and again. What does not fit gets pinned memory of its own, such as whole tables."""

    def __init__(self) -> None:
        self._free: defaultdict[int, deque[_Slot]] = defaultdict(deque)  # by index of the device

    def copies(self, tensors: Mapping[str, torch.Tensor]) -> Copies:
        """Begin to copy ``tensors``, on the current stream of their device; those of the host are copied at once."""
        copied: dict[str, torch.Tensor | _Part] = {}
        on_device: list[tuple[str, torch.Tensor]] = []
        for name, tensor in tensors.items():
            if tensor.is_cuda:
                on_device.append((name, tensor))
            elif tensor.is_contiguous():
                content = ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
                copied[name] = _Part(tensor.dtype, tensor.shape, content)
            else:
                copied[name] = tensor.clone()
        if not on_device:
            return _done, lambda: _numbers(copied, None)
        index = on_device[0][1].get_device()
        free = self._free[index]
        if not free:
            free.extend(_new_slots(index))
        slot = free.popleft()
        driver, start = _driver(), 0
        if driver is not None and torch._C._cuda_getDevice() != index:
            driver = None
        stream = torch._C._cuda_getCurrentRawStream(index)
        for name, tensor in on_device:
            size = tensor.nbytes
            if (
                driver is not None
                and 0 < size <= SLOT - start
                and tensor.is_contiguous()
                and tensor.get_device() == index
                and driver.copy(slot.address + start, tensor.data_ptr(), size, stream) == 0
            ):
                copied[name] = _Part(tensor.dtype, tensor.shape, start)
                start += -(-size // _ALIGNED) * _ALIGNED
            else:
                target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copied[name] = target.copy_(tensor, non_blocking=True)
        if driver is None or driver.record(slot.handle, stream) != 0:
            slot.event.record(torch.cuda.current_stream(index))

        def numbers() -> dict[str, torch.Tensor]:
            found = _numbers(copied, slot)
            free.append(slot)
            return found

        return slot.event.query, numbers


class _Driver:
    """Two functions of CUDA's driver. Each returns 0, or the number of an error."""

    def __init__(self, library: ctypes.CDLL) -> None:
        number, address = ctypes.c_size_t, ctypes.c_void_p
        self.copy = library.cuMemcpyDtoHAsync_v2
        self.copy.argtypes = (address, address, number, address)  # to, from, bytes, stream
        self.record = library.cuEventRecord
        self.record.argtypes = (address, address)  # event, stream


@functools.cache
def _driver() -> _Driver | None:
    try:
        return _Driver(ctypes.PyDLL("libcuda.so.1"))  # keeps Python's lock, which CDLL would let go
    except (OSError, AttributeError):
        return None


def _new_slots(device: int) -> list[_Slot]:
    memory = torch.empty(_TOGETHER, SLOT, dtype=torch.uint8, pin_memory=True)
    slots = []
    with torch.cuda.device(device):
        for row in memory:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()  # which makes it
            slots.append(_Slot(row.data_ptr(), row, event, event.cuda_event))
    return slots


def _numbers(copied: Mapping[str, torch.Tensor | _Part], slot: _Slot | None) -> dict[str, torch.Tensor]:
    return {name: part.tensor(slot) if isinstance(part, _Part) else part for name, part in copied.items()}


def _done() -> bool:
    return True
