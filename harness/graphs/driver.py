"""CUDA's driver, and memory of a device by its address."""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def driver_bindings() -> Any | None:
    """The module ``cuda.bindings.driver``, or None if it is not installed."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError:
        return None


class MemoryAt:
    """``count`` elements of a device from ``address`` on, dense. typestr: their type for numpy, such as "<i4".

    A tensor that ``torch.as_tensor`` makes of it refers to the memory, and keeps this object alive.
    """

    def __init__(self, address: int, count: int, typestr: str) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (count,),
            "typestr": typestr,
            "data": (address, False),
            "strides": None,
            "version": 3,
        }
