"""Checks, in Triton's interpreter, what kernels promise the compiler of pointers, which the interpreter takes on trust.

A kernel says ``tl.multiple_of(pointer, 16)`` so that 16 bytes move at once. Where that is not so, a GPU faults; where
``tl.max_contiguous`` is not so, it reads and writes other cells than the kernel names. An interpreter, which moves
every cell by itself, gives the right answer. Of integers nothing is checked: kernels promise much of offsets that they
then mask off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

POINTER_BITS = 64


class BrokenPromise(RuntimeError):
    """What a kernel promises the compiler is not so. One line."""


def install() -> None:
    """Have the interpreter raise BrokenPromise where a kernel breaks one. Harmless to call twice."""
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
            _refuse(
                np.where(_continue(pointers, dim, size), 0, beyond),
                f"tl.multiple_of promises that what starts in dimension {dim} starts on {value} bytes, and",
                "points {} beyond such: a GPU would fault",
            )


def _check_contiguity(pointers: npt.NDArray[Any], values: list[int], size: int) -> None:
    for dim, value in enumerate(values):
        place = np.indices(pointers.shape)[dim] % value
        _refuse(
            np.where(_continue(pointers, dim, size), 0, place),
            f"tl.max_contiguous promises {value} cells side by side in dimension {dim}, and",
            "points elsewhere: a GPU would take cells that the kernel does not name",
        )


def _continue(pointers: npt.NDArray[Any], dim: int, size: int) -> npt.NDArray[np.bool_]:
    """Which point to the cell behind that of the lane before them in ``dim``."""
    found = np.zeros(pointers.shape, bool)
    found[(slice(None),) * dim + (slice(1, None),)] = np.diff(pointers.astype(np.int64), axis=dim) == size
    return found


def _refuse(wrong: npt.NDArray[Any], promise: str, truth: str) -> None:
    """Raise for the first lane that is not 0, if any."""
    if wrong.any():
        lane = tuple(map(int, np.argwhere(wrong)[0]))
        raise BrokenPromise(f"{promise} lane {list(lane)} {truth.format(int(wrong[lane]))}")


CHECKS = {"tt.divisibility": _check_divisibility, "tt.contiguity": _check_contiguity}  # by Triton's names for promises
