"""Makes the interpreter of Triton 3.9 accept masks that are the ``&`` or ``|`` of two comparisons.

It computes such a mask in numpy's integers and then refuses to load or store under it ("mask has unsupported dtype").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np


def accept_integer_masks() -> None:
    """Make masked loads and stores take masks of integers. Repeated calls do no harm."""
    from triton.runtime import interpreter  # late: importing Triton fixes how kernels run

    builder: Any = interpreter.interpreter_builder
    if "create_masked_load" not in vars(builder):
        builder.create_masked_load = _with_mask_of_bool(builder.create_masked_load, 1)
        builder.create_masked_store = _with_mask_of_bool(builder.create_masked_store, 2)


def _with_mask_of_bool(access: Callable[..., Any], place: int) -> Callable[..., Any]:
    """Wrap ``access``, whose positional argument ``place`` is the mask."""

    @functools.wraps(access)
    def masked(*arguments: Any) -> Any:
        mask = arguments[place]
        if mask.data.dtype != np.bool_:
            mask.data = mask.data.astype(np.bool_)
        return access(*arguments)

    return masked
