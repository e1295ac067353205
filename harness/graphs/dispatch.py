"""Dispatch modes that do not import torch's compiler."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A ``TorchDispatchMode`` whose first operator does not import ``torch._dynamo``, which takes a second or two.

    torch hides ``__torch_dispatch__`` from its compiler, and imports that to do so. Here it is hidden once something
    else has imported the compiler; before that nothing can be compiled.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)  # type: ignore[no-untyped-call]
        if "__torch_dispatch__" in vars(cls):
            _hide_later(cls)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # in torch's way, from the first operator on


def _hide_later(mode: type[DispatchMode]) -> None:
    dispatch: Any = vars(mode)["__torch_dispatch__"]
    hidden = torch._disable_dynamo(dispatch)  # type: ignore[attr-defined]

    @functools.wraps(dispatch)
    def dispatched(*args: Any, **kwargs: Any) -> Any:
        if not hasattr(sys.modules.get("torch._dynamo"), "disable"):  # of a module that is being imported, perhaps
            return dispatch(*args, **kwargs)
        mode.__torch_dispatch__ = hidden  # type: ignore[method-assign]
        return hidden(*args, **kwargs)  # type: ignore[no-untyped-call]

    mode.__torch_dispatch__ = dispatched  # type: ignore[method-assign]
