"""Names the operation and the line of the judged code behind a call."""

from __future__ import annotations

import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch
from torch.overrides import resolve_name

from nsa_oracle.harness.errors import error_line

_RUNNERS = f"{Path(__file__).parent}/"
_HARNESS = f"{Path(__file__).parents[1]}/"
_TORCH = Path(torch.__file__).parent
# What judged code calls, and what calls the harness.
_THIRD_PARTY = ("torch", "triton", "numpy", "hypothesis", "pytest", "_pytest", "pluggy", "typer", "click")
_THIRD_PARTY_FOLDERS = tuple(f"{_TORCH.parent / name}/" for name in _THIRD_PARTY)
_UNKNOWN = "unknown line"
_STANDARD_LIBRARY = f"{sysconfig.get_path('stdlib')}/"


def calling_line() -> str:
    """The innermost line outside torch, triton and the runners in the current stack."""
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        if _is_user_code(frame.f_code.co_filename):
            return _line(frame.f_code.co_filename, line, frame.f_code.co_name)
    return _UNKNOWN


def operation_name(func: Callable[..., Any]) -> str:
    """`aten.nonzero` for a dispatched operator, `torch.Tensor.item` for a Python-level function."""
    if isinstance(func, torch._ops.OpOverload):
        return str(func.overloadpacket)
    name: str = resolve_name(func) or getattr(func, "__name__", repr(func))
    return name


def judged_frames(failure: TracebackType | None) -> list[traceback.FrameSummary]:
    """The frames of ``failure`` in judged code, outermost first: not those of torch, Triton, the harness or Python."""
    return [frame for frame in traceback.extract_tb(failure) if is_judged_code(frame.filename)]


def defined_at(error: BaseException) -> str:
    """Where the method is defined that could not be called with the harness's arguments; "" for any other error.

    Such an error passes no line of judged code.
    """
    if not isinstance(error, TypeError):
        return ""
    called = re.match(r"(?:[\w.<>]*\.)?(\w+)\(\) (?:takes|missing|got)\b", error_line(error))
    if called is None:
        return ""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        there = frame.f_locals
        for value in (*there.values(), *getattr(there.get("self"), "__dict__", {}).values()):
            method = inspect.getattr_static(value, called[1], None)
            if method is None and getattr(value, "__name__", "") == called[1]:
                method = value  # a method that was wrapped
            if where := definition_of(method):
                return where
    return ""


def definition_of(function: object) -> str:
    """Where judged code defines ``function``, a method or a class, as FILE:LINE in NAME; "" if it does not."""
    with suppress(Exception):  # judged objects may answer any question in any way
        function = inspect.getattr_static(function, "__init__") if isinstance(function, type) else function
        unwrapped = inspect.unwrap(getattr(function, "__func__", function))  # type: ignore[arg-type]
        code = getattr(unwrapped, "__code__", None)
        if isinstance(code, CodeType) and is_judged_code(code.co_filename):
            return f"{code.co_filename}:{code.co_firstlineno} in {code.co_name}"
    return ""


def judged_stack(frame: FrameType | None, outermost: FrameType) -> list[FrameType]:
    """The frames of judged code at ``frame`` and in what called it, outermost first, as far as inside ``outermost``."""
    stack: list[FrameType] = []
    while frame is not None and frame is not outermost:
        stack += [frame] if is_judged_code(frame.f_code.co_filename) else []
        frame = frame.f_back
    return stack[::-1]


def is_judged_code(filename: str) -> bool:
    """Whether a source file is not of the harness, of Python, or of a library such as torch."""
    return _is_user_code(filename) and not is_harness(filename)


def is_harness(filename: str) -> bool:
    """Whether a source file is of the harness."""
    return filename.startswith(_HARNESS)


def innermost_user_frame(frames: traceback.StackSummary) -> traceback.FrameSummary | None:
    return next((frame for frame in reversed(frames) if _is_user_code(frame.filename)), None)


def _is_user_code(filename: str) -> bool:
    if filename.startswith(("<", _RUNNERS, *_THIRD_PARTY_FOLDERS)):
        return False
    # Installed packages may lie under the standard library's folder without being part of it.
    return not filename.startswith(_STANDARD_LIBRARY) or "-packages/" in filename


def describe_frame(frame: traceback.FrameSummary | None) -> str:
    return _UNKNOWN if frame is None else _line(frame.filename, frame.lineno, frame.name)


def _line(file: str, line: int | None, function: str) -> str:
    return f"{Path(file).name}:{line} in {function}"
