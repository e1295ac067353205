"""Bodies and tensors to capture, for the simulated and for the CUDA graph alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from nsa_oracle.harness.errors import CaptureError
from nsa_oracle.harness.graphs.capture import GraphRunner

# Without a GPU the raw launches run in Triton's interpreter, which has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

Body = Callable[[], None]


@triton.jit
def add_kernel(target_ptr, amount_ptr, increment, n, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < n
    value = tl.load(target_ptr + offset, mask=inside) + tl.load(amount_ptr + offset, mask=inside) + increment
    tl.store(target_ptr + offset, value, mask=inside)


@torch.library.custom_op("graph_test::bump", mutates_args=("target",))
def bump(target: torch.Tensor, amount: int) -> None:
    target.add_(amount)


@torch.library.custom_op("graph_test::bump_and_double", mutates_args=("target",))
def bump_and_double(target: torch.Tensor) -> torch.Tensor:
    target.add_(1)
    return target * 2


@torch.library.custom_op("graph_test::launch", mutates_args=("target",))
def launch_in_operator(target: torch.Tensor, amount: torch.Tensor) -> None:
    add_kernel[(1,)](target, amount, 1, target.numel(), BLOCK=8)


def ints(device: torch.device, *values: int) -> torch.Tensor:
    return torch.tensor(values, device=device)


def floats(device: torch.device, n: int = 4) -> torch.Tensor:
    return torch.arange(n, device=device, dtype=torch.float32)


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def replay(graph: object, device: torch.device, times: int = 1) -> None:
    for _ in range(times):
        graph.replay()  # type: ignore[attr-defined]
    settle(device)


def assert_refused(
    runner: GraphRunner, body: Body, *names: str, host_tensors: tuple[torch.Tensor, ...] = ()
) -> CaptureError:
    """The capture fails, names one of the operations `names`, and names a line of the file that `body` is in."""
    with pytest.raises(CaptureError) as caught:
        runner.capture(body, host_tensors=host_tensors)
    error = caught.value
    assert any(name in error.operation for name in names), error
    assert error.where.startswith(f"{Path(body.__code__.co_filename).name}:"), error
    assert error.reason
    assert str(error) == f"{error.operation} at {error.where}: {error.reason}"
    assert "\n" not in str(error)
    return error
