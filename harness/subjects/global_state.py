"""State that judged code may leave changed for all other code of the process, the harness included."""

from __future__ import annotations

import builtins
import functools
import gc
import os
import re
import resource
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.graphs.callers import definition_of

_kept: list[torch._C._ForceDispatchKeyGuard] = []
Report = Callable[[Finding, BaseException | None], BaseException]


@contextmanager
def kept_global_state(report: Report, instead_of: type[BaseException] | tuple[()]) -> Iterator[None]:
    """Put torch's settings, the current folder, ``sys.stdout``, ``sys.stderr`` and their descriptors back at the end.

    A default dtype or a default device that was left changed alters every tensor that other code makes without naming
    one, inference mode every tensor, and another current folder every relative path; without a stream nothing can be
    printed any more. It is therefore reported: the context ends with what ``report`` makes of the finding and of the
    error that ends the context, if any. Errors of other types than ``instead_of`` pass.
    So are functions of torch and of Python that the judge calls and that have been replaced: it would agree with
    anything. An error that passes is then due to them.
    The other settings (seed, threads, gradients, deterministic algorithms, precision of products, denormals flushed to
    zero) are put back without a word.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    seed, threads, gradients = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
    deterministic = _deterministic()
    precision = torch.get_float32_matmul_precision()
    inference, keys = torch.is_inference_mode_enabled(), _dispatch_keys()
    folder, streams = _current_folder(), Streams()
    failure: BaseException | None = None
    changed: Finding | None = None
    replaced: Finding | None = None
    try:
        yield
    except instead_of as error:
        failure = error
    except Exception as error:
        replaced, failure = functions_put_back(), error
        if replaced is None:
            raise
    finally:
        replaced = replaced or functions_put_back()  # first: what follows calls them
        torch.set_flush_denormal(False)
        changed = replaced or _changed(dtype, device, folder)
        changed = changed or inference_mode_left_on(inference) or streams.lost()
        streams.put_back()
        _end_inference_mode(inference, keys)
        if _current_folder() != folder:
            os.chdir(folder)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        torch.set_rng_state(seed)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if _deterministic() != deterministic:
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])  # imports torch's compiler
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
    if changed is not None:
        raise report(changed, failure) from failure
    if failure is not None:
        raise failure


@functools.cache
def _words_of_the_judge() -> set[str]:
    """All names in the source of the reference and of what compares with it."""
    harness = Path(__file__).parents[1]
    folders = (harness.parent / "reference", harness / "checks", harness / "content", harness / "memory")
    files = (file for folder in folders for file in folder.glob("*.py"))
    return {word for file in files for word in re.findall(r"\w+", file.read_text(encoding="utf-8"))}


_FUNCTIONS = {  # in C, which hardly anybody has a reason to replace
    (owner, name): function
    for owner, kind in ((torch, types.BuiltinFunctionType), (torch.Tensor, types.MethodDescriptorType))
    for name in _words_of_the_judge()
    if not name.startswith("_") and isinstance(function := getattr(owner, name, None), kind)
}


_PYTHONS = builtins.__dict__
_OFTEN_REPLACED = ("breakpoint", "input", "open", "print")
_BUILTINS = {
    name: function
    for name, function in _PYTHONS.items()
    if isinstance(function, types.BuiltinFunctionType | type)
    and name in _words_of_the_judge()
    and not name.startswith("_")
    and name not in _OFTEN_REPLACED
}


def functions_put_back() -> Finding | None:
    """Put back functions of torch and of Python that the judge calls. A finding if one was another one, else None."""
    found = _builtins_put_back()  # first: the rest calls them
    for (owner, name), function in _FUNCTIONS.items():
        if (now := getattr(owner, name, None)) is not function:
            setattr(owner, name, function)
            place = f" by {where}" if (where := definition_of(now)) else ""
            named = f"torch.{name}" if owner is torch else f"torch.Tensor.{name}"
            found = found or Finding(Kind.STATE, named, f"replaced{place}", "torch's own function")
    return found


def _builtins_put_back() -> Finding | None:
    lost: tuple[str, object] | None = None
    for name, function in _BUILTINS.items():  # without a call of any of them
        if (now := _PYTHONS.get(name)) is not function:
            _PYTHONS[name] = function
            lost = lost or (name, now)
    if lost is None:
        return None
    place = f" by {where}" if (where := definition_of(lost[1])) else ""
    return Finding(Kind.STATE, f"builtins.{lost[0]}", f"replaced{place}", "Python's own")


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


class Streams:
    """From its creation until ``put_back``, ``sys.stdout`` and ``sys.stderr`` are stand-ins that cannot be lost.

    The descriptors behind them, 1 and 2, can be, and are opened again by ``put_back``.
    """

    def __init__(self) -> None:
        self._files = {number: (os.dup(number), file) for number in (1, 2) if (file := _file_of(number)) is not None}
        self._before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
        for name, stream in self._before.items():
            if stream is not None:
                setattr(sys, name, _Unclosable(stream))

    def lost(self) -> Finding | None:
        """A finding if one of them is closed or no more, else None. Others than before are only put back."""
        for name in (name for name, stream in self._before.items() if stream is not None):
            now = getattr(sys, name, None)
            if now is None or getattr(now, "closed", False):
                return Finding(Kind.STATE, f"sys.{name}", "None" if now is None else "a closed file", "an open file")
        for number in self._files:
            if _file_of(number) is None:
                return Finding(Kind.STATE, f"file descriptor {number}", "closed", "an open file")
        return None

    def put_back(self) -> None:
        for number, (kept, file) in self._files.items():
            if _file_of(number) != file:
                os.dup2(kept, number)
            os.close(kept)
        self._files = {}
        for name, stream in self._before.items():
            setattr(sys, name, stream)


MOST_FILES_OF_OURS = 8  # that the harness may have opened meanwhile
_MOST_LOOKED_AT = 4096


def open_files() -> int:
    """How many files this process has open, of the first 4,096 that it may have. Needs no further one."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sum(_file_of(descriptor) is not None for descriptor in range(min(most, _MOST_LOOKED_AT)))


@functools.cache
def open_files_at_first() -> int:
    """How many files this process had open when this was called for the first time."""
    return open_files()


def files_left_open() -> Finding | None:
    """A finding if judged code has left files open since ``open_files_at_first`` was called, else None."""
    left = open_files() - open_files_at_first()
    if left <= MOST_FILES_OF_OURS:
        return None
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    got = f"{left} more than before the first case, and this process may have {most}"
    return Finding(Kind.STATE, "open files", got, "as many as before")


def _file_of(descriptor: int) -> tuple[int, int] | None:
    """Which file is open as ``descriptor``, as device and inode, or None."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class _Unclosable:
    """A stream whose ``close`` closes nothing but this stand-in."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._is_closed = False

    @property
    def closed(self) -> bool:
        return self._is_closed or bool(self._stream.closed)

    def close(self) -> None:
        self._is_closed = True

    def write(self, text: str) -> Any:
        if self._is_closed:
            raise ValueError("I/O operation on closed file.")
        return self._stream.write(text)

    def __enter__(self) -> _Unclosable:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _dispatch_keys() -> tuple[torch._C.DispatchKeySet, torch._C.DispatchKeySet]:
    return torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def inference_mode_left_on(before: bool) -> Finding | None:
    """A finding if torch's inference mode is on and was not ``before``, else None.

    Ask while what may have entered it is alive: the mode ends when its object dies.
    """
    if before or not torch.is_inference_mode_enabled():
        return None
    return Finding(Kind.STATE, "torch.is_inference_mode_enabled()", "True", "False")


def _end_inference_mode(before: bool, keys: tuple[torch._C.DispatchKeySet, torch._C.DispatchKeySet]) -> None:
    """Leave every inference mode if it was not on ``before``, and put the thread's ``keys`` back.

    A mode that was never left ends when its object dies, and then restores the keys of its beginning, those of a
    dispatch mode of the harness included. So all are ended first.
    """
    if torch.is_inference_mode_enabled() and not before:
        for entered in (one for one in gc.get_objects() if type(one) is torch.inference_mode):
            if (guard := getattr(entered, "_inference_mode_context", None)) is not None:
                guard.__exit__(None, None, None)
    if str(_dispatch_keys()) != str(keys):
        _kept.append(torch._C._ForceDispatchKeyGuard(*keys))  # at its end it would put back what is there now
        _kept[-1].__enter__()  # type: ignore[no-untyped-call]


def _current_folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # it has been removed
        return "a folder that is no more"


def _changed(dtype: torch.dtype, device: torch.device, folder: str) -> Finding | None:
    now_dtype, now_device = torch.get_default_dtype(), torch.get_default_device()
    if now_dtype is not dtype:
        return Finding(Kind.STATE, "torch.get_default_dtype()", str(now_dtype), str(dtype))
    if now_device != device:
        return Finding(Kind.STATE, "torch.get_default_device()", str(now_device), str(device))
    if (now_folder := _current_folder()) != folder:
        return Finding(Kind.STATE, "os.getcwd()", now_folder, folder)
    return None
