"""Makes the interpreter compute the functions of float32 by the C library, as compiled kernels do.

Some kernels stay in the interpreter (those in Gluon do). Where one of them and a compiled one compute the same thing,
as two shapes of one attention kernel do, a contract may ask for the same bits; numpy has an exp2 of its own, and the
interpreter's fma rounds twice.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from nsa_oracle.harness.compiled.building import build

FUNCTIONS = ("exp", "exp2", "log", "log2", "sin", "cos")
_UNARY = """
void {name}_all(const float *x, float *y, long n)
{{
    for (long i = 0; i < n; i++)
        y[i] = {name}f(x[i]);
}}
"""
_FMA = """
void fma_all(const float *a, const float *b, const float *c, float *y, long n)
{
    for (long i = 0; i < n; i++)
        y[i] = fmaf(a[i], b[i], c[i]);
}
"""
_SOURCE = "#include <math.h>\n" + "".join(_UNARY.format(name=name) for name in FUNCTIONS) + _FMA

_Array = npt.NDArray[Any]


@contextmanager
def by_the_c_library() -> Iterator[None]:
    """Raises BuildError if there is no C compiler."""
    from triton.runtime import interpreter  # late: importing Triton fixes how kernels run

    builder: Any = interpreter.interpreter_builder
    library, handle = ctypes.CDLL(str(build(_SOURCE))), interpreter.TensorHandle
    replaced = {
        f"create_{name}": _unary(getattr(builder, f"create_{name}"), library[f"{name}_all"], handle)
        for name in FUNCTIONS
    }
    replaced["create_fma"] = _fma(builder.create_fma, library.fma_all, handle)
    with patch.dict(vars(builder), replaced):
        yield


def _unary(original: Callable[..., Any], function: Any, handle: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def create(argument: Any) -> Any:
        if argument.data.dtype != np.float32:
            return original(argument)
        return handle(_called(function, argument.data), argument.dtype.scalar)

    return create


def _fma(original: Callable[..., Any], function: Any, handle: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def create(x: Any, y: Any, z: Any) -> Any:
        if x.data.dtype != np.float32:
            return original(x, y, z)
        return handle(_called(function, *np.broadcast_arrays(x.data, y.data, z.data)), z.dtype.scalar)

    return create


def _called(function: Any, *arrays: _Array) -> _Array:
    given = [np.ascontiguousarray(array) for array in arrays]
    result = np.empty(given[0].shape, np.float32)
    function(*(ctypes.c_void_p(array.ctypes.data) for array in (*given, result)), ctypes.c_long(result.size))
    return result
