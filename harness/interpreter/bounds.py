"""Checks, in Triton's interpreter, that each load and store of a launch lies within the tensors that it was given.

Memory behind a tensor usually exists: an input is the front part of a larger buffer, and guard bands surround most
others. A load there goes unnoticed if its value is not used, or if it is right by chance; on a GPU, at the end of an
allocation, it is a fault. Lanes that are masked off are not checked.

Of each tensor argument, a launch may touch what ``hand_out`` names of its memory, such as the part of an input that
belongs to the batch, or else all of its memory, because backends reach all of a buffer of their own through a view of
its beginning. A launch that makes pointers from integers is not checked from then on: those may point anywhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Pointers = npt.NDArray[np.uint64]


class OutOfBounds(RuntimeError):
    """A kernel loads or stores outside the tensors it was given. The message is one line."""


class Extent(NamedTuple):
    """Addresses from the first byte that may be touched to behind the last, and the kernel's name for the tensor."""

    begin: int
    end: int
    name: str = ""


_handed_out: dict[int, tuple[weakref.ref[torch.Tensor], Extent]] = {}  # by the address of the memory
_launches: list[list[Extent] | None] = []  # what each running launch may touch; None if it is not checked


def hand_out(tensor: torch.Tensor, memory: torch.Tensor) -> None:
    """From now on launches may touch, of ``memory``, only the cells from the first one of ``tensor`` to its last.

    tensor: a view of ``memory``. It holds for as long as the object ``memory`` lives, and has no effect on a GPU.
    """
    if memory.device.type == "cpu":
        address = memory.untyped_storage().data_ptr()
        _handed_out[address] = weakref.ref(memory, lambda gone: _forget(address, gone)), extent_of(tensor)


def _forget(address: int, gone: weakref.ref[torch.Tensor]) -> None:
    if address in _handed_out and _handed_out[address][0] is gone:
        del _handed_out[address]


def extent_of(tensor: torch.Tensor) -> Extent:
    """The addresses from the first cell of ``tensor`` to its last."""
    begin = tensor.data_ptr()
    if not tensor.numel():
        return Extent(begin, begin)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Extent(begin, begin + (last + 1) * tensor.element_size())


def install() -> None:
    """Make the interpreter raise OutOfBounds where a kernel leaves its tensors. Repeated calls do no harm."""
    from triton.runtime import interpreter  # late: importing Triton fixes how kernels run

    if isinstance(interpreter._interpreter, _CheckedMemory):
        return
    interpreter._interpreter = _CheckedMemory(interpreter._interpreter)
    interpreter.GridExecutor._init_args_hst = _noting_arguments(interpreter.GridExecutor._init_args_hst)
    interpreter.GridExecutor.__call__ = _one_launch(interpreter.GridExecutor.__call__)
    builder: Any = interpreter.interpreter_builder
    builder.create_int_to_ptr = _unchecking(builder.create_int_to_ptr)


def _one_launch(call: Callable[..., None]) -> Callable[..., None]:
    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        _launches.append(None)
        try:
            call(executor, *args, **kwargs)
        finally:
            _launches.pop()

    return launch


def _noting_arguments(to_host: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what gives a launch its arguments on the host, to note what of them may be touched."""

    def noted(executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        host_args, host_kwargs = to_host(executor, args, kwargs)
        named = [*zip(executor.arg_names, host_args, strict=False), *host_kwargs.items()]
        _launches[-1] = [part for name, value in named if type(value) is not int for part in extents_of(name, value)]
        return host_args, host_kwargs

    return noted


def extents_of(name: str, value: Any) -> Iterable[Extent]:
    """What may be touched of an argument: a tensor, or a tuple or a descriptor of tensors."""
    if isinstance(value, tuple):
        return [part for each in value for part in extents_of(name, each)]
    if not isinstance(value, torch.Tensor):
        value = getattr(value, "base", None)  # a tensor descriptor, or a tensor seen as another type
    if not isinstance(value, torch.Tensor):
        return []
    storage = value.untyped_storage()
    begin = storage.data_ptr()
    memory, part = _handed_out.get(begin, (None, None))
    if memory is None or part is None or memory() is None:
        return [Extent(begin, begin + storage.nbytes(), name)]
    return [part._replace(name=name)]


def _unchecking(cast: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a cast of integers to pointers: the running launch may then touch any memory."""

    def unchecked(source: Any, target: Any) -> Any:
        if _launches:
            _launches[-1] = None
        return cast(source, target)

    return unchecked


class _CheckedMemory:
    """The interpreter's access to memory, which refuses pointers outside what the running launch may touch."""

    def __init__(self, access: Any) -> None:
        self._access = access

    def __getattr__(self, name: str) -> Any:
        return getattr(self._access, name)

    def load(self, pointers: Pointers, mask: npt.NDArray[Any], other: npt.NDArray[Any], dtype: Any) -> Any:
        _check("load", pointers, mask, other.itemsize)
        return self._access.load(pointers, mask, other, dtype)

    def store(self, pointers: Pointers, values: npt.NDArray[Any], mask: npt.NDArray[Any]) -> Any:
        _check("store", pointers, mask, values.itemsize)
        return self._access.store(pointers, values, mask)

    def atomic_cas(self, pointers: Pointers, compared: npt.NDArray[Any], values: npt.NDArray[Any], how: Any) -> Any:
        _check("atomic operation", pointers, np.ones(pointers.shape, bool), values.itemsize)
        return self._access.atomic_cas(pointers, compared, values, how)

    def atomic_rmw(
        self, kind: Any, pointers: Pointers, values: npt.NDArray[Any], mask: npt.NDArray[Any], how: Any
    ) -> Any:
        _check("atomic operation", pointers, mask, values.itemsize)
        return self._access.atomic_rmw(kind, pointers, values, mask, how)


def _check(access: str, pointers: Pointers, mask: npt.NDArray[Any], size: int) -> None:
    """Raise OutOfBounds if one of the ``pointers`` that ``mask`` selects is outside what the launch may touch."""
    parts = _launches[-1] if _launches else None
    if parts is None or not pointers.size:
        return
    if _are_within_one(parts, pointers, size):
        return  # all lanes, and so those that are selected
    selected = pointers[mask.astype(bool, copy=False)]
    if not selected.size or _are_within_one(parts, selected, size):
        return
    for pointer in np.unique(selected):  # of several tensors, or wrong
        if not _are_within_one(parts, pointer, size):
            raise OutOfBounds(out_of_bounds_line(access, parts, int(pointer), size))


def _are_within_one(parts: list[Extent], pointers: Pointers | np.uint64, size: int) -> bool:
    """Whether one part holds what all of the pointers point to, which has ``size`` bytes. Called at every access."""
    if pointers.size == 1:
        first = last = pointers.item()
    else:
        first, last = _least(pointers, None).item(), _largest(pointers, None).item()
    for begin, end, _ in parts:  # noqa: SIM110 (a generator would double the cost)
        if begin <= first and last + size <= end:
            return True
    return False


_least, _largest = np.minimum.reduce, np.maximum.reduce  # faster than the methods


def out_of_bounds_line(access: str, parts: Sequence[Extent], pointer: int, size: int) -> str:
    """What is wrong with an access that lies in none of ``parts``, in one line."""
    if not parts:
        return f"a {access} of {size} bytes by a kernel without a tensor argument"
    near = min(parts, key=lambda part: max(part.begin - pointer, pointer - part.end))
    if pointer < near.begin:
        distance = f"{near.begin - pointer} bytes before the beginning"
    elif pointer < near.end:
        distance = f"{near.end - pointer} bytes before the end"
    else:
        distance = f"{pointer - near.end} bytes behind the end"
    return (
        f"a {access} of {size} bytes that begins {distance} of {near.name}, of which the kernel was given "
        f"{near.end - near.begin} bytes"
    )
