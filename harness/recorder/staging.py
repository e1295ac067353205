"""Copies of tensors to the host that nobody waits for.

One kernel copies all small tensors of a call into pinned memory and then sets a flag there, which the thread that
writes looks at. torch's own copies and events take several times as long, and lend Python's lock to that thread; they
serve what the kernel does not: other devices than the current one, strides, and what does not fit.
"""

from __future__ import annotations

import ctypes
import functools
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence

import torch

SLOT = 1 << 14  # bytes of the pinned memory of one call: rows, lengths and accept lengths of 680 requests in int64
_TOGETHER = 64  # slots that are pinned together, because pinning takes long
_ALIGNED = 16  # bytes; where the parts of a slot begin, the first behind the flag
_MOST_PARTS = 4  # tensors that one launch copies
_WORD = 4  # bytes
_THREADS = 256

_GATHER = """
struct Part { const unsigned* from; unsigned* to; unsigned long long words; };
struct Parts { Part part[MOST_PARTS]; volatile unsigned* done; };

extern "C" __global__ void gather(Parts parts) {
    for (int p = 0; p < MOST_PARTS; ++p)
        for (unsigned i = threadIdx.x; i < parts.part[p].words; i += blockDim.x)
            parts.part[p].to[i] = parts.part[p].from[i];
    __threadfence_system();  // the host sees the words before the flag
    __syncthreads();
    if (threadIdx.x == 0) *parts.done = 1;
}
""".replace("MOST_PARTS", str(_MOST_PARTS))

Copies = tuple[Callable[[], bool], Callable[[], dict[str, torch.Tensor]]]
"""Whether the copies are done; and what was copied, by name, which may be asked once."""


class _PartGiven(ctypes.Structure):
    """``Part`` of the kernel."""

    _fields_ = (("source", ctypes.c_void_p), ("target", ctypes.c_void_p), ("words", ctypes.c_ulonglong))


class _Given(ctypes.Structure):
    """``Parts`` of the kernel."""

    _fields_ = (("part", _PartGiven * _MOST_PARTS), ("done", ctypes.c_void_p))


class _Slot:
    """Pinned memory for the tensors of one call, with its flag in the first word."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory  # uint8 [SLOT]
        self.address = memory.data_ptr()
        self.flag = ctypes.c_uint32.from_address(self.address)
        self.given = _Given()
        self.given.done = self.address
        self.arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self.given))

    def is_done(self) -> bool:
        return self.flag.value != 0


class _Part:
    """A tensor as the bytes of a host tensor, or those from ``start`` of a slot."""

    __slots__ = ("content", "dtype", "shape")

    def __init__(self, tensor: torch.Tensor, content: bytes | int) -> None:
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.content = content

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
                copied[name] = _Part(tensor, ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
            else:
                copied[name] = tensor.clone()
        if not on_device:
            return _done, lambda: _numbers(copied, None)
        index = on_device[0][1].get_device()
        gather = _gather(index) if torch._C._cuda_getDevice() == index else None
        if gather is None:
            return _copied_by_torch(copied, on_device, index)
        free = self._free[index]
        if not free:
            free.extend(map(_Slot, torch.empty(_TOGETHER, SLOT, dtype=torch.uint8, pin_memory=True)))
        slot = free.popleft()
        number, start = 0, _ALIGNED
        for name, tensor in on_device:
            size = tensor.nbytes
            fits = number < _MOST_PARTS and size <= SLOT - start and size % _WORD == 0
            if fits and tensor.is_contiguous() and tensor.get_device() == index:
                part = slot.given.part[number]
                part.source, part.target, part.words = tensor.data_ptr(), slot.address + start, size // _WORD
                copied[name] = _Part(tensor, start)
                number, start = number + 1, start + -(-size // _ALIGNED) * _ALIGNED
            else:
                copied[name] = _pinned_copy(tensor)  # the launch is behind it on the stream, and so is the flag
        for unused in range(number, _MOST_PARTS):
            slot.given.part[unused].words = 0
        slot.flag.value = 0
        gather(slot.arguments, torch._C._cuda_getCurrentRawStream(index))

        def numbers() -> dict[str, torch.Tensor]:
            found = _numbers(copied, slot)
            free.append(slot)
            return found

        return slot.is_done, numbers


def _copied_by_torch(
    copied: dict[str, torch.Tensor | _Part], on_device: Sequence[tuple[str, torch.Tensor]], index: int
) -> Copies:
    with torch.cuda.device(index):
        copied.update((name, _pinned_copy(tensor)) for name, tensor in on_device)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
    return event.query, lambda: _numbers(copied, None)


def _pinned_copy(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


@functools.cache
def _gather(device: int) -> Callable[[ctypes.Array[ctypes.c_void_p], int], None] | None:
    """Launches the kernel on a stream of ``device``, which must be the current one. None where it does not compile."""
    try:
        kernel = torch.cuda._compile_kernel(_GATHER, "gather")
        function = kernel.func
        launch = ctypes.PyDLL("libcuda.so.1").cuLaunchKernel  # keeps Python's lock, which CDLL would let go
    except (OSError, AttributeError, RuntimeError):  # AttributeError: a torch that has no such function
        return None
    size, address = ctypes.c_uint, ctypes.c_void_p
    launch.argtypes = (address, *[size] * 7, *[address] * 3)  # grid, block, shared memory; stream, arguments, extra

    def start(arguments: ctypes.Array[ctypes.c_void_p], stream: int) -> None:
        assert kernel.module  # which is unloaded with it
        if (error := launch(function, 1, 1, 1, _THREADS, 1, 1, 0, stream, arguments, None)) != 0:
            raise RuntimeError(f"cuLaunchKernel returned {error}")

    return start


def _numbers(copied: Mapping[str, torch.Tensor | _Part], slot: _Slot | None) -> dict[str, torch.Tensor]:
    return {name: part.tensor(slot) if isinstance(part, _Part) else part for name, part in copied.items()}


def _done() -> bool:
    return True
