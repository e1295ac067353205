"""Model of one GPU program that runs in several partitions, and of how they synchronise. Used by ``interpreter.gluon``.

- Partitions take turns, and a partition waits at an mbarrier until its phase has passed. Every second program is
  *eager*: copies land at once, and a waiting partition continues as soon as it may. In the other programs a copy lands
  when it is needed, and a partition runs until it must wait. A kernel that is right under any schedule is right under
  both. A missing wait, or a barrier that passes too early, shows under one of the two: in a launch of two programs,
  always.
- Shared memory begins as NaN. An access outside a tile is an error and does not reach the neighbouring memory.
- Matrix units read shared memory when a product is waited for, and no earlier; a fence must have made it visible.
- A deadlock of all partitions is an error, and so are more arrivals at an mbarrier than its count.

Import this module late: importing Triton fixes how kernels run.
"""

from __future__ import annotations

import contextvars
import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from triton.runtime import interpreter


class GluonError(RuntimeError):
    """An error that on a GPU would be a fault, a hang, or results that depend on timing. The message is one line."""


# Shared memory.


@dataclass(eq=False)
class Barrier:
    """An mbarrier: a phase ends after ``count`` arrivals, and the next one begins with none.

    missing: arrivals that the current phase still needs. late: copies in flight, with the number of arrivals once they
    have landed.
    """

    count: int
    missing: int
    phase: int = 0
    late: list[tuple[list[Copy], int]] = field(default_factory=list)

    def arrive(self, count: int) -> None:
        self.missing -= count
        if self.missing < 0:
            raise GluonError(f"more arrivals at an mbarrier than its count of {self.count}")
        if self.missing == 0:
            self.phase, self.missing = self.phase + 1, self.count

    def land(self) -> None:
        """Land all copies in flight, and count their arrivals."""
        late, self.late = self.late, []
        for copies, count in late:
            for copy in copies:
                copy.land()
            self.arrive(count)

    def has_passed(self, parity: int) -> bool:
        self.land()
        return self.phase & 1 != parity & 1


@dataclass(eq=False)
class Allocation:
    """An allocation of shared memory. unfenced: numbers of its buffers that were written since the last fence."""

    barriers: dict[int, Barrier] = field(default_factory=dict)
    unfenced: set[int] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class Descriptor:
    """A tile in shared memory. buffer: its number in the allocation, an index of the first of three dimensions."""

    allocation: Allocation
    data: npt.NDArray[Any]
    dtype: Any
    buffer: int = 0

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def index(self, number: Any) -> Descriptor:
        number = operator.index(number)
        if not 0 <= number < len(self.data):
            raise GluonError(f"there is no buffer {number} among {len(self.data)}")
        return Descriptor(self.allocation, self.data[number], self.dtype, number)

    def slice(self, start: Any, length: Any, dim: Any = 0) -> Descriptor:
        start, length, dim = map(operator.index, (start, length, dim))
        if start < 0 or length < 1 or start + length > self.data.shape[dim]:
            raise GluonError(f"the slice {start} to {start + length} exceeds a dimension of {self.data.shape[dim]}")
        place = (slice(None),) * dim + (slice(start, start + length),)
        return Descriptor(self.allocation, self.data[place], self.dtype, self.buffer)

    def permute(self, order: Sequence[Any]) -> Descriptor:
        return Descriptor(
            self.allocation, self.data.transpose([operator.index(o) for o in order]), self.dtype, self.buffer
        )

    def reinterpret(self, dtype: Any, shape: Sequence[Any], layout: Any) -> Descriptor:
        words = self.data.view(numpy_type(dtype))
        if words.shape != tuple(map(operator.index, shape)):
            raise GluonError(f"a tile of {self.shape} of {self.dtype} cannot be read as {list(shape)} of {dtype}")
        return Descriptor(self.allocation, words, dtype, self.buffer)

    def store(self, value: Any) -> None:
        if list(value.handle.data.shape) != self.shape or value.dtype != self.dtype:
            raise GluonError(f"{value.type} does not fit a tile of {self.shape} of {self.dtype}")
        self.write(value.handle.data)

    def write(self, values: npt.NDArray[Any]) -> None:
        self.data[...] = values
        self.allocation.unfenced.add(self.buffer)

    def load(self, layout: Any) -> Any:
        return tensor(self.data.copy(), self.dtype)


@dataclass(frozen=True, eq=False)
class Copy:
    """A copy from ``pointers`` in global memory to a tile in shared memory; masked-off cells become 0."""

    target: Descriptor
    pointers: Any
    mask: Any

    def land(self) -> None:
        other = None if self.mask is None else 0
        self.target.write(tl.load(self.pointers, mask=self.mask, other=other).handle.data)


@dataclass(frozen=True, eq=False)
class Product:
    """``a`` @ ``b`` + ``acc``, not yet waited for. ``value`` computes it in float32, from the memory as it is then."""

    a: Any
    b: Descriptor
    acc: Any

    def value(self) -> Any:
        acc = self.acc.value() if isinstance(self.acc, Product) else self.acc
        product = torch.matmul(_floats(self.a), _floats(self.b)).numpy()
        if acc is not None:
            product = acc.handle.data + product
        return tensor(product, tl.float32)


def _floats(operand: Any) -> torch.Tensor:
    """A 16-bit operand, in shared memory or in registers, as float32. torch multiplies in one thread; numpy may not."""
    bits = operand.data if isinstance(operand, Descriptor) else operand.handle.data
    if bits.dtype == np.float16:
        return torch.from_numpy(bits.astype(np.float32))
    if bits.dtype != np.uint16:
        raise GluonError(f"the Gluon interpreter multiplies bf16 and float16 alone, not {operand.dtype}")
    return torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32))


# Partitions.


class _Abandoned(Exception):
    """Raised in a partition to end it after another partition of its program has failed."""


@dataclass(eq=False)
class Partition:
    """Warps that run one function, and act as one thread.

    copies: assigned neither to a group nor to a barrier yet. groups: of copies, not waited for yet.
    """

    warps: int
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    waits_for: tuple[Barrier, int] | None = None
    copies: list[Copy] = field(default_factory=list)
    groups: list[list[Copy]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    is_done: bool = False

    def can_go(self) -> bool:
        return not self.is_done and (self.waits_for is None or self.waits_for[0].has_passed(self.waits_for[1]))


class Program:
    """One program of a launch. eager: see the module docstring."""

    def __init__(self, warps: int, eager: bool) -> None:
        self.eager = eager
        self.allocations: list[Allocation] = []
        self.partitions = [Partition(warps)]
        self.current = self.partitions[0]
        self.error: BaseException | None = None

    def specialize(self, work: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], warps: Sequence[int]) -> Any:
        """Run one function in each partition, the first in this thread, and return its result after all have ended."""
        default = self.current
        (function, args), *others = work
        threads = []
        for (other, other_args), count in zip(others, warps, strict=True):
            partition = Partition(count)
            self.partitions.append(partition)
            body = contextvars.copy_context().run  # numpy's error handling is stored in the context
            threads.append(threading.Thread(target=body, args=(self._work, partition, other, other_args), daemon=True))
            threads[-1].start()
        try:
            if self.eager:
                self._pass_on(default)
            result = function(*args)
            default.is_done = True
            while not all(partition.is_done for partition in self.partitions):
                self._pass_on(default)
            return result
        except BaseException as error:
            self.error = self.error or error
            raise
        finally:
            for partition in self.partitions[1:]:
                while not partition.is_done:  # once woken, it finds the error and ends
                    partition.turn.release()
                    default.turn.acquire()
            for thread in threads:
                thread.join()
            del self.partitions[1:]
            default.is_done = False

    def _work(self, partition: Partition, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        partition.turn.acquire()
        try:
            if self.error is None:
                function(*args)
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = self.error or error
        partition.is_done = True
        self._wake(self.partitions[0])  # it gives the turn to another partition

    def wait(self, barrier: Barrier, parity: int) -> None:
        partition = self.current
        if not barrier.has_passed(parity):
            partition.waits_for = barrier, parity
            self._pass_on(partition)
            partition.waits_for = None

    def offer(self) -> None:
        """In an eager program, let a partition run that may continue now."""
        if self.eager and len(self.partitions) > 1:
            self._pass_on(self.current)

    def _pass_on(self, partition: Partition) -> None:
        """Give the turn to another partition that can run, and return when ``partition`` may continue.

        If no other partition can run, returns at once if ``partition`` can, and raises GluonError (a deadlock) if not.
        """
        others = [other for other in self.partitions if other is not partition and other.can_go()]
        if others:
            self._wake(others[0])
            partition.turn.acquire()
            self.current = partition
            if self.error is not None:
                raise _Abandoned if partition is not self.partitions[0] else self.error
            while partition.waits_for is not None and not partition.can_go():
                self._pass_on(partition)
        elif partition.is_done or not partition.can_go():
            raise GluonError("deadlock: every partition waits at an mbarrier for another one")

    def _wake(self, partition: Partition) -> None:
        self.current = partition
        partition.turn.release()


def tensor(data: npt.NDArray[Any], dtype: Any) -> Any:
    shape = tl.block_type(dtype, list(data.shape)) if data.ndim else dtype
    return tl.tensor(interpreter.TensorHandle(data, dtype), shape)


def numpy_type(dtype: Any) -> Any:
    return interpreter._get_np_dtype(dtype)
