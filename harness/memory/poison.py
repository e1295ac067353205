"""Memory that betrays a backend which reads or writes what it must not.

Three devices: a *sentinel* fills every cell whose content is unspecified (the judge runs each scenario with two
different ones, so that a value computed from such a cell shows even if it happens to be right once); *bands* surround
every buffer the backend allocates and every input it is given; and dead cells of the page tables are filled anew
before each replay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_oracle.harness.memory.bits import NAN_BYTE
from nsa_oracle.harness.memory.far_apart import BEYOND_31_BITS, far_apart

# Where no layer follows the metadata. Far outside every slot, page and length a scenario can produce, positive so that
# C and Python division agree.
SENTINELS = (0x5A5A5A5A, 0x35353535)
ALIGNED_WORDS = 64  # int32 words; 256 bytes keep the alignment that vectorised stores need
GUARD_WORDS = 64 * ALIGNED_WORDS  # on either side: what is written further off may end the process, and tell nothing
GUARD_VALUE = 0x6BADBEEF


_bands = True


def band(size: int) -> int:
    """How large a band of ``size`` is: 0 inside ``without_bands``."""
    return size if _bands else 0


@contextmanager
def without_bands() -> Iterator[None]:
    """Buffers and inputs have nothing beside them, for a tool that watches the end of every allocation itself."""
    global _bands
    _bands = False
    try:
        yield
    finally:
        _bands = True


@dataclass
class GuardedBuffer:
    """One allocation of the backend: its storage with a guard band on either side, and the operation that made it."""

    storage: torch.Tensor  # the buffer's words between two bands, int32
    operation: str
    shape: tuple[int, ...]

    def bands(self) -> torch.Tensor:
        """What lies before and behind the buffer: [2, words]."""
        words = band(GUARD_WORDS)
        return torch.stack((self.storage[:words], self.storage[len(self.storage) - words :]))

    @property
    def address(self) -> int:
        return self.storage.data_ptr()


class BandedInput:
    """An input of the engine: memory at a fixed address, poison on either side of it, and a host copy of all of that.

    What reads past either end gets poison; what writes there is found as what writes to the input itself. ``far``: its
    rows, with poison around each, lie so far apart that the offset of the last one, in elements, needs 64 bits.
    """

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, sentinel: int, device: torch.device, far: bool = False
    ) -> None:
        rows, columns = shape
        beside = band(-(-max(columns, 1) // ALIGNED_WORDS) * ALIGNED_WORDS)  # a whole row, and as aligned as the memory
        inside: tuple[slice, ...]
        if far:
            self.expected = torch.full((rows, columns + 2 * beside), sentinel, dtype=dtype)
            self.memory = far_apart(self.expected.to(device, copy=True), BEYOND_31_BITS)
            inside = (slice(None), slice(beside, beside + columns))
        else:
            self.expected = torch.full((rows * columns + 2 * beside,), sentinel, dtype=dtype)
            self.memory = self.expected.to(device, copy=True)
            inside = (slice(beside, beside + rows * columns),)
        self.content = self.expected[inside].view(shape)  # on the host: what is sent next
        self.tensor = self.memory[inside].view(shape)  # on the device

    def is_modified(self) -> bool:
        return not torch.equal(self.memory.cpu(), self.expected)


class PoisonedAllocations(TorchDispatchMode):
    """While active, every fresh tensor that ``empty`` and its kin return on the device is filled: with ``sentinel`` if
    it holds int32 or int64, else with bytes that make NaN of any floating-point type.

    Else it would often hold what was freed last, which is right more often than not.
    """

    def __init__(self, sentinel: int, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sentinel = sentinel
        self.device = device

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and self._is_fresh_buffer(result, (*args, *(kwargs or {}).values())):
            return self._made(result, str(func))
        return result

    def _is_fresh_buffer(self, result: torch.Tensor, arguments: tuple[Any, ...]) -> bool:
        """Not a view, an in-place result or a host tensor."""
        if result.device.type != self.device.type:
            return False
        if not result.is_contiguous() or result.storage_offset():
            return False
        address = result.untyped_storage().data_ptr()
        inputs = (argument for argument in arguments if isinstance(argument, torch.Tensor))
        return all(tensor.untyped_storage().data_ptr() != address for tensor in inputs)

    def _made(self, tensor: torch.Tensor, operation: str) -> torch.Tensor:
        """What to hand out in place of a fresh ``tensor``."""
        if "empty" in operation and tensor.dtype in (torch.int32, torch.int64):
            tensor.fill_(self.sentinel)
        elif "empty" in operation:
            tensor.view(-1).view(torch.uint8).fill_(NAN_BYTE)
        return tensor


class GuardedAllocations(PoisonedAllocations):  # type: ignore[no-untyped-call]
    """And every fresh tensor is moved between guard bands, which ``buffers`` keep until somebody looks at them."""

    def __init__(self, sentinel: int, device: torch.device) -> None:
        super().__init__(sentinel, device)
        self.buffers: list[GuardedBuffer] = []

    def _made(self, tensor: torch.Tensor, operation: str) -> torch.Tensor:
        count = tensor.numel() * tensor.element_size()
        words, beside = -(-count // 4), band(GUARD_WORDS)
        storage = torch.full((words + 2 * beside,), GUARD_VALUE, dtype=torch.int32, device=tensor.device)
        body = storage.view(torch.uint8)[4 * beside : 4 * beside + count].view(tensor.dtype).view(tensor.shape)
        if "empty" in operation:
            super()._made(body, operation)
        else:
            body.copy_(tensor)
        self.buffers.append(GuardedBuffer(storage, operation, tuple(tensor.shape)))
        return body


def overrun(buffers: Sequence[GuardedBuffer]) -> GuardedBuffer | None:
    """The first of ``buffers`` with a written guard band, or None. Synchronises once."""
    if not buffers:
        return None
    bands = torch.stack([buffer.bands() for buffer in buffers])  # [buffers, 2, GUARD_WORDS]
    written = (bands != GUARD_VALUE).flatten(1).any(dim=1).tolist()
    return next((buffer for buffer, bad in zip(buffers, written, strict=True) if bad), None)


def fill_dead_cells(table: torch.Tensor, live_columns: torch.Tensor, sentinel: int) -> None:
    """Write ``sentinel`` into the cells of ``table`` [rows, columns] at or beyond ``live_columns`` [rows], in place."""
    columns = torch.arange(table.shape[1], device=table.device)
    table.masked_fill_(columns >= live_columns[:, None], sentinel)


# What cache memory that nobody wrote is made of, by run.
POISON_BYTES = (0xFF, 0x7F)  # NaN in every type; a huge finite bf16 and float32, and NaN in e4m3
