"""Launches a Triton kernel without asking Triton, each time, which compiled variant the arguments select.

Triton derives the variant from every argument at every launch, which costs more host time than the launch itself.
Our kernels specialise on nothing but the dtypes of a few tensors and some flags, so the launch site names those.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch


class Launcher:
    """One kernel. The first launch of each variant goes through Triton, later ones to what it compiled."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Hashable, ...], Any] = {}

    def __call__(self, programs: int, variant: tuple[Hashable, ...], *args: Any, **options: int) -> None:
        """Launch ``programs`` instances. ``variant``: all that selects compiled code: dtypes, flags, wide strides.

        The first argument is a tensor on the device to use. ``options``: Triton's ``num_warps`` and ``num_stages``;
        they select compiled code as well, so always name them in the same order.
        """
        compiled = self._compiled.get(key := (args[0].get_device(), *variant, *options.values()))
        if compiled is None:
            # None in the interpreter: it compiles nothing
            self._compiled[key] = self.kernel[(programs,)](*args, **options)
        else:
            compiled[(programs, 1, 1)](*args)


def is_wide(*numbers: int) -> bool:
    """Whether any of the numbers needs 64 bits, which changes the signature of a compiled kernel."""
    return max(numbers) > 0x7FFFFFFF


def is_dense(*tensors: torch.Tensor) -> bool:
    """Whether neighbours in the last dimension are neighbours in memory; the other dimensions may be strided."""
    return all(tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 for tensor in tensors)
