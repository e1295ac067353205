"""Sees operators of torch that write to an input, also where the content stays as it is.

On a GPU an engine may refresh its inputs on another stream, and a write of the same content is then a race with it.
Seen are operators of torch that write in place or to ``out=``, with their line. What a kernel of Triton, an operator of
another library, compiled code or numpy writes is seen by its content alone, by those who compare that.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from nsa_oracle.harness.findings import InputWrite
from nsa_oracle.harness.graphs.callers import is_judged_code
from nsa_oracle.harness.graphs.dispatch import DispatchMode
from nsa_oracle.harness.graphs.operators import aten, written_arguments

_WRITES_NOTHING = {aten.requires_grad_, aten._coalesced_, aten._resize_output_}  # beside what only changes a shape


class WrittenInputs:
    """The first write to an input in a ``watching`` context.

    inputs: gives the names and tensors of all inputs, as they are now. All of the storage of each is the engine's.
    """

    def __init__(self, inputs: Callable[[], Iterable[tuple[str, torch.Tensor]]]) -> None:
        self.first: InputWrite | None = None
        self._inputs = inputs

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context of calls of judged code."""
        watch = _Watch({_address(tensor): name for name, tensor in self._inputs() if tensor.numel()})
        try:
            with watch:
                yield
        finally:
            self.first = self.first or watch.first


class _Watch(DispatchMode):
    """Dispatch mode that notes the first write to a storage among ``names``, which are by address."""

    def __init__(self, names: Mapping[int | None, str]) -> None:
        super().__init__()
        self.first: InputWrite | None = None
        self._names = names

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.first is None and func._schema.is_mutable and func.namespace == "aten":
            for tensor in _written(func, args, kwargs):
                if name := self._names.get(_address(tensor)):
                    self.first = InputWrite(name, func.overloadpacket.__name__, _judged_line())
                    break
        return func(*args, **kwargs)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors of which an operator of torch writes cells, not only the shape or what torch notes of them."""
    packet = func.overloadpacket
    if torch.Tag.inplace_view in func.tags or packet in _WRITES_NOTHING:
        return []
    if not packet.__name__.endswith("_") and not any(argument.is_out for argument in func._schema.arguments):
        return []  # record_stream, for example
    if packet is aten.copy_ and _are_same_cells(args[0], args[1]):
        return []  # torch returns at once
    return [tensor for tensor in written_arguments(func, args, kwargs) if tensor.numel()]


def _are_same_cells(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape, one.device) != (other.dtype, other.shape, other.device):
        return False
    address = _address(one)
    return (
        address is not None
        and address == _address(other)
        and (one.storage_offset(), one.stride()) == (other.storage_offset(), other.stride())
    )


def _address(tensor: torch.Tensor) -> int | None:
    """The address of the tensor's storage; None for one without, such as a sparse tensor."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


def _judged_line() -> str:
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        if is_judged_code(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
    return ""
