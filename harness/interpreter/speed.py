"""Makes Triton's interpreter about five times faster, for the many small launches of a run without a GPU.

It also makes the interpreter of Triton 3.6 run with numpy 2.4, which no longer accepts an array of one element as a
number. Five costs take most of the time and are not needed here. The interpreter patches the language module again for
every call of a device function, although the enclosing launch has done so. It recomputes each integer operation in 64
bits to detect overflow, which sizes that fit the interpreter cannot cause. It builds a table of dtypes for each
look-up. It validates and wraps the shape of every intermediate, although there are few different shapes. It promotes
and broadcasts operands that already have the same type and shape.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

F = TypeVar("F", bound=Callable[..., Any])

MOST_CONSTANTS = 4096


def speed_up() -> None:
    """Remove all five costs. Repeated calls do no harm, nor does a Triton whose interpreter lacks one of them."""
    from triton.runtime import interpreter  # late: importing Triton fixes how kernels run

    builder: Any = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter.InterpretedFunction.__call__ = _call_device_function
    if not hasattr(interpreter._get_np_dtype, "__wrapped__"):
        interpreter._get_np_dtype = _remembering(interpreter._get_np_dtype)
    if not hasattr(interpreter._patch_lang_tensor, "__wrapped__"):
        interpreter._patch_lang_tensor = _with_numbers(interpreter._patch_lang_tensor)
    for kind in (interpreter.tl.core.block_type, interpreter.tl.core.tensor):
        if not hasattr(kind.__init__, "__wrapped__"):
            kind.__init__ = _remembering_shapes(kind.__init__, kind is interpreter.tl.core.tensor)
    semantic: Any = interpreter.interpreter_semantic
    if "broadcast_impl_value" not in vars(semantic):
        semantic.cast = _unless_of_that_type(semantic.cast)
        semantic.broadcast_impl_value = _unless_alike(semantic.broadcast_impl_value)
        semantic.binary_op_type_checking_impl = _remembering_constants(
            semantic.binary_op_type_checking_impl, interpreter.tl.core.tensor
        )


def _call_device_function(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a device function inside a launch; patch the language that it can name only if that is not yet done."""
    from triton.runtime import interpreter

    if any(interpreter.tl.core.is_builtin(module.load) for module in _languages(function.fn)):
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*args, **kwargs)


def _with_numbers(patch_tensor: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``patch_tensor`` so that a tensor of one element, of any shape, also works as an index."""

    @functools.wraps(patch_tensor)
    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())  # the scope restores the old value

    return patch


@functools.cache
def _languages(function: Callable[..., Any]) -> tuple[Any, ...]:
    """The modules of Triton's language that ``function`` can name."""
    import triton.language as tl

    return tuple({id(v): v for v in function.__globals__.values() if v is tl or v is tl.core}.values())


def _remembering(get_np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Cache ``get_np_dtype`` by scalar type: a block has the numpy dtype of its elements."""
    known: dict[str, Any] = {}

    @functools.wraps(get_np_dtype)
    def remembered(triton_type: Any) -> Any:
        scalar = triton_type.scalar
        name = str(scalar)
        if name not in known:
            known[name] = get_np_dtype(scalar)
        return known[name]

    return remembered


def _remembering_shapes(init: Callable[..., None], of_tensor: bool) -> Callable[..., None]:
    """Cache the results of the constructor of block types, or of tensors, by type and shape."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(init)
    def make_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(getattr(size, "value", size) for size in shape)
        key = (id(element_ty), sizes)
        if key not in known:
            init(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)  # one object for all element types: compared by identity
            known[key] = dict(vars(self))  # holds the element type, so that its id is not reused
        else:
            vars(self).update(known[key])

    @functools.wraps(init)
    def make_tensor(self: Any, handle: Any, tensor_type: Any) -> None:
        key = (tensor_type.name,)
        if key not in known:
            init(self, handle, tensor_type)
            known[key] = {name: getattr(self, name) for name in ("shape", "numel")}
        else:
            vars(self).update(known[key], handle=handle, type=tensor_type, dtype=tensor_type.scalar)

    return make_tensor if of_tensor else make_type


def _unless_of_that_type(cast: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``cast`` to return a tensor unchanged that already has the type."""

    @functools.wraps(cast)
    def to_type(tensor: Any, dtype: Any, *rounding: Any) -> Any:
        return tensor if tensor.type.scalar is dtype and not rounding else cast(tensor, dtype, *rounding)

    return to_type


def _unless_alike(broadcast: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Wrap ``broadcast`` to return operands of the same shape unchanged."""

    @functools.wraps(broadcast)
    def shared(lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape is other.shape:
            return lhs, rhs
        return broadcast(lhs, rhs)

    return shared


def _remembering_constants(promote: Callable[..., Any], tensor_type: type) -> Callable[..., Any]:
    """Wrap ``promote`` to cache the block made from an int or a float, by the type of the tensor operand.

    Sharing such blocks is safe: no operation writes to its operands. Two tensors of the same integer type, or of
    float32, are returned unchanged, because they need no promotion.
    """
    known: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(promote)
    def promoted(lhs: Any, rhs: Any, *how: bool, **named: bool) -> Any:
        tensor_first, tensor_last = isinstance(lhs, tensor_type), isinstance(rhs, tensor_type)
        if tensor_first and tensor_last:
            alike = lhs.type.name == rhs.type.name and (lhs.dtype.is_int() or lhs.dtype.is_fp32())
            return (lhs, rhs) if alike else promote(lhs, rhs, *how, **named)
        tensor, number = (lhs, rhs) if tensor_first else (rhs, lhs)
        if not (tensor_first or tensor_last) or type(number) not in (int, float):
            return promote(lhs, rhs, *how, **named)
        # Not the float itself: as keys, -0.0 and 0.0 are equal, and so are 1.0 and 1. For True there is none.
        key = (number.hex() if type(number) is float else number, tensor_first, tensor.type.name, how, *named.items())
        if key not in known:
            both = promote(lhs, rhs, *how, **named)
            if both[tensor_last] is not tensor:  # the tensor was promoted as well
                return both
            if len(known) == MOST_CONSTANTS:
                known.clear()
            known[key] = both[tensor_first]
        return (tensor, known[key]) if tensor_first else (known[key], tensor)

    return promoted


@contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress numpy's warnings of NaN and infinity, which padding rows and poison contain; a GPU does not warn."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def deep_stack(function: F) -> F:
    """Give ``function`` a frame so large that the frames of all calls below it fit in its chunk.

    CPython keeps frames in chunks of 16 KiB and returns a chunk to the system as soon as the call that opened it
    returns. Depending on the depth of the stack, the interpreter's small calls can begin right at the end of a chunk,
    and each of them then maps and unmaps memory; this was seen to double the time of a run. A larger frame opens a
    larger chunk.
    """
    code = function.__code__.replace(co_stacksize=1 << 16)  # 512 KiB, in a chunk of 1 MiB
    function.__code__ = code
    return function
