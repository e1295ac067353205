"""State that judged code may leave changed for all other code of the process, the harness included."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nsa_oracle.harness.findings import Finding, Kind

Report = Callable[[Finding, BaseException | None], BaseException]


@contextmanager
def kept_global_state(report: Report, instead_of: type[BaseException] | tuple[()]) -> Iterator[None]:
    """Put torch's settings and the current folder back at the end.

    A default dtype or a default device that was left changed alters every tensor that other code makes without naming
    one, and another current folder every relative path. It is therefore reported: the context ends with what ``report``
    makes of the finding and of the error that ends the context, if any. Errors of other types than ``instead_of`` pass.
    The other settings (seed, threads, gradients, deterministic algorithms, precision of products) are put back without
    a word.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    seed, threads, gradients = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()
    folder = _current_folder()
    failure: BaseException | None = None
    changed: Finding | None = None
    try:
        yield
    except instead_of as error:
        failure = error
    finally:
        changed = _changed(dtype, device, folder)
        if _current_folder() != folder:
            os.chdir(folder)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        torch.set_rng_state(seed)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=only_warns)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
    if changed is not None:
        raise report(changed, failure) from failure
    if failure is not None:
        raise failure


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
