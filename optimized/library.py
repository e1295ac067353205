"""The ``nsa_oracle`` operator library: each kernel launch is one torch operator.

As operators the launches are visible to torch (dispatch modes, fake tensors, ``torch.compile``) with what they mutate
declared. They are defined on a ``Library`` rather than with ``custom_op``, whose wrapper costs several microseconds
per call; a whole launch takes no more than that here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY: Any = torch.library.Library("nsa_oracle", "DEF")  # type: ignore[no-untyped-call]


def register(schema: str, launch: Callable[..., None]) -> Callable[..., None]:
    """Defines an operator that only mutates arguments, implemented by ``launch`` on both devices, and returns it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, launch, "CPU")
    _LIBRARY.impl(name, launch, "CUDA")
    torch.library.register_fake(f"nsa_oracle::{name}", _no_result, lib=_LIBRARY)
    operator: Callable[..., None] = getattr(torch.ops.nsa_oracle, name).default
    return operator


def _no_result(*arguments: object) -> None:
    """Shape inference for an operator that returns nothing."""
