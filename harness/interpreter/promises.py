"""Checks, in Triton's interpreter, what kernels promise the compiler about pointers; the interpreter ignores it.

With ``tl.multiple_of(pointer, 16)`` the compiler may move 16 bytes at once. If this promise is broken, a GPU faults. If
that of ``tl.max_contiguous`` is broken, a GPU reads and writes other cells than the kernel names. The interpreter moves
each cell separately and gives the right result. Promises about integers are not checked: kernels promise much about
offsets that they then mask off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

POINTER_BITS = 64


class BrokenPromise(RuntimeError):
    """A kernel breaks a promise that it gave the compiler. The message is one line."""


def install() -> None:
    """Make the interpreter raise BrokenPromise where a kernel breaks a promise. Repeated calls do no harm."""
    from triton.runtime import interpreter  # late: importing Triton fixes how kernels run

    def set_attr(handle: Any, key: str, values: list[int]) -> None:
        handle.attr[key] = values
        if handle.dtype.is_ptr():
            element = handle.dtype.element_ty
            bits = POINTER_BITS if element.is_ptr() else element.primitive_bitwidth
            if check := CHECKS.get(key):
                check(np.atleast_1d(handle.data), values, max(1, bits // 8))

    interpreter.TensorHandle.set_attr = set_attr


def _check_divisibility(pointers: npt.NDArray[Any], values: list[int], size: int) -> None:
    for dim, value in enumerate(values):
        beyond = pointers % np.uint64(value)
        if beyond.any():
            _refuse(np.where(_continue(pointers, dim, size), 0, beyond), "tt.divisibility", value, dim)


def _check_contiguity(pointers: npt.NDArray[Any], values: list[int], size: int) -> None:
    for dim, value in enumerate(values):
        place = np.indices(pointers.shape)[dim] % value
        _refuse(np.where(_continue(pointers, dim, size), 0, place), "tt.contiguity", value, dim)


def _continue(pointers: npt.NDArray[Any], dim: int, size: int) -> npt.NDArray[np.bool_]:
    """Marks the pointers to the cell right after that of the preceding lane in ``dim``; these need no alignment."""
    found = np.zeros(pointers.shape, bool)
    found[(slice(None),) * dim + (slice(1, None),)] = np.diff(pointers.astype(np.int64), axis=dim) == size
    return found


def _refuse(wrong: npt.NDArray[Any], name: str, value: int, dim: int) -> None:
    """Raise BrokenPromise for the first lane that is not 0 in ``wrong``, if any. name: Triton's, of the promise."""
    if wrong.any():
        lane = tuple(map(int, np.argwhere(wrong)[0]))
        raise BrokenPromise(broken(name, value, dim, list(lane), int(wrong[lane])))


def broken(name: str, value: int, dim: int, lane: list[int], beyond: int) -> str:
    """The promise ``name`` of ``value`` in ``dim``, and what ``lane`` does instead: ``beyond`` the promised place."""
    promise, truth = _TEXTS[name]
    return f"{promise.format(value=value, dim=dim)} lane {lane} {truth.format(beyond)}"


_TEXTS = {
    "tt.divisibility": (
        "tl.multiple_of promises that contiguous cells in dimension {dim} start at a multiple of {value} bytes, but",
        "points {} bytes past one: a GPU would fault",
    ),
    "tt.contiguity": (
        "tl.max_contiguous promises {value} contiguous cells in dimension {dim}, but",
        "points elsewhere: a GPU would access cells that the kernel does not name",
    ),
}
CHECKS = {"tt.divisibility": _check_divisibility, "tt.contiguity": _check_contiguity}  # by Triton's names
