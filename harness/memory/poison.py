"""Memory that exposes a backend which reads or writes where it must not.

Three mechanisms. A *sentinel* fills every cell whose content is unspecified; the judge runs each scenario with two
sentinels, so that a value computed from such a cell shows even if it happens to be right once. *Bands* surround every
buffer that the backend allocates and every input that it receives. Dead cells of the page tables are filled again
before each replay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from nsa_oracle.harness.graphs.dispatch import DispatchMode
from nsa_oracle.harness.interpreter.bounds import hand_out
from nsa_oracle.harness.memory.bits import NAN_BYTE

# Sentinels of scenarios without a layer. They lie far outside every slot, page and length that a scenario can produce,
# and are positive, so that division in C and in Python agree.
SENTINELS = (0x5A5A5A5A, 0x35353535)
ALIGNED_WORDS = 64  # int32 words, 256 bytes: keeps the alignment that vectorised stores need
GUARD_WORDS = 64 * ALIGNED_WORDS  # int32 words at either end; a write further away may crash the process
GUARD_VALUE = 0x6BADBEEF


_bands = True


def band(size: int) -> int:
    """The size of a band: ``size``, or 0 inside ``without_bands``."""
    return size if _bands else 0


@contextmanager
def without_bands() -> Iterator[None]:
    """Context without bands around buffers and inputs, for a tool that itself checks the end of every allocation."""
    global _bands
    _bands = False
    try:
        yield
    finally:
        _bands = True


@dataclass
class GuardedBuffer:
    """One allocation of the backend: its storage with a guard band at either end, and the operator that made it."""

    storage: torch.Tensor  # int32: a band, the words of the buffer, a band
    operation: str
    shape: tuple[int, ...]

    def bands(self) -> torch.Tensor:
        """The bands before and after the buffer: [2, words] int32."""
        words = band(GUARD_WORDS)
        return torch.stack((self.storage[:words], self.storage[len(self.storage) - words :]))

    @property
    def address(self) -> int:
        return self.storage.data_ptr()


class PoisonedAllocations(DispatchMode):
    """Dispatch mode that fills each new tensor which ``empty`` and similar operators return on the device.

    int32 and int64 tensors are filled with ``sentinel``, others with bytes that are NaN in every floating-point type.
    Otherwise such a tensor would often hold the content freed last, which is usually right.
    """

    def __init__(self, sentinel: int, device: torch.device) -> None:
        super().__init__()
        self.sentinel = sentinel
        self.device = device

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and self._is_fresh_buffer(result, (*args, *(kwargs or {}).values())):
            return self._replacement(result, str(func))
        return result

    def _is_fresh_buffer(self, result: torch.Tensor, arguments: tuple[Any, ...]) -> bool:
        """Whether ``result`` is a new dense buffer: not a view, an in-place result or a host tensor."""
        if result.device.type != self.device.type:
            return False
        if not result.is_contiguous() or result.storage_offset():
            return False
        address = result.untyped_storage().data_ptr()
        inputs = (argument for argument in arguments if isinstance(argument, torch.Tensor))
        return all(tensor.untyped_storage().data_ptr() != address for tensor in inputs)

    def _replacement(self, tensor: torch.Tensor, operation: str) -> torch.Tensor:
        """The tensor to return in place of the new ``tensor``."""
        if "empty" in operation and tensor.dtype in (torch.int32, torch.int64):
            tensor.fill_(self.sentinel)
        elif "empty" in operation:
            tensor.view(-1).view(torch.uint8).fill_(NAN_BYTE)
        return tensor


class GuardedAllocations(PoisonedAllocations):
    """Also moves each new tensor between guard bands. ``buffers`` keeps them until they are checked."""

    def __init__(self, sentinel: int, device: torch.device) -> None:
        super().__init__(sentinel, device)
        self.buffers: list[GuardedBuffer] = []

    def _replacement(self, tensor: torch.Tensor, operation: str) -> torch.Tensor:
        count = tensor.numel() * tensor.element_size()
        words, margin = -(-count // 4), band(GUARD_WORDS)
        storage = torch.full((words + 2 * margin,), GUARD_VALUE, dtype=torch.int32, device=tensor.device)
        body = storage.view(torch.uint8)[4 * margin : 4 * margin + count].view(tensor.dtype).view(tensor.shape)
        if "empty" in operation:
            super()._replacement(body, operation)
        else:
            body.copy_(tensor)
        hand_out(body, storage)
        self.buffers.append(GuardedBuffer(storage, operation, tuple(tensor.shape)))
        return body


def overrun(buffers: Sequence[GuardedBuffer]) -> GuardedBuffer | None:
    """The first of ``buffers`` with a changed guard band, or None. Synchronises once."""
    if not buffers:
        return None
    bands = torch.stack([buffer.bands() for buffer in buffers])  # [buffers, 2, GUARD_WORDS]
    written = (bands != GUARD_VALUE).flatten(1).any(dim=1).tolist()
    return next((buffer for buffer, bad in zip(buffers, written, strict=True) if bad), None)


def fill_dead_cells(table: torch.Tensor, live_columns: torch.Tensor, sentinel: int) -> None:
    """Write ``sentinel`` into the cells of ``table`` [rows, columns] at or beyond ``live_columns`` [rows], in place."""
    columns = torch.arange(table.shape[1], device=table.device)
    with torch.inference_mode() if table.is_inference() else nullcontext():  # made by a backend that runs in that mode
        table.masked_fill_(columns >= live_columns[:, None], sentinel)


# Byte values of unwritten cache memory, one per run of a scenario.
POISON_BYTES = (0xFF, 0x7F)  # NaN in every type; a huge finite bf16 and float32, and NaN in e4m3
