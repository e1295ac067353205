"""What a kernel promises the compiler of its pointers is checked where an interpreter runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from nsa_oracle.harness.bugs.mutate import Mutation, mutated
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.scenarios.files import CORPUS, load
from nsa_oracle.harness.scenarios.setup import Inputs
from nsa_oracle.harness.subjects.default import optimized_backend
from nsa_oracle.optimized import indexer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled where there is a GPU")


@triton.jit
def of_one_pointer(memory: tl.tensor, begin: tl.tensor, VALUE: tl.constexpr) -> None:
    start = tl.multiple_of(memory + begin, VALUE)
    lanes = tl.arange(0, 4)
    tl.store(start + lanes, tl.load(start + lanes) + 1)


@triton.jit
def of_rows(memory: tl.tensor, stride: tl.tensor, VALUE: tl.constexpr) -> None:
    rows = tl.multiple_of(memory + tl.arange(0, 4) * stride, [VALUE])
    cells = rows[:, None] + tl.arange(0, 4)[None, :]
    tl.store(cells, tl.load(cells) + 1)


@triton.jit
def of_cells(memory: tl.tensor, stride: tl.tensor, step: tl.tensor, RUN: tl.constexpr) -> None:
    """Every lane but the first of a row goes on from the one before it, so that its place promises nothing."""
    cells = memory + tl.arange(0, 4)[:, None] * stride + (tl.arange(0, 8) + tl.arange(0, 8) // 4 * step)[None, :]
    cells = tl.max_contiguous(tl.multiple_of(cells, [4, 16]), [1, RUN])
    tl.store(cells, tl.load(cells) + 1)


@triton.jit
def of_offsets(memory: tl.tensor, count: tl.tensor, VALUE: tl.constexpr) -> None:
    """As matrix products do: what wraps round is masked off, or of no use."""
    lanes = tl.arange(0, VALUE)
    offsets = tl.max_contiguous(tl.multiple_of(lanes % count, VALUE), VALUE)
    tl.store(memory + offsets, tl.load(memory + offsets, mask=lanes < count, other=0) + 1, mask=lanes < count)


@triton.jit
def of_pointers(memory: tl.tensor, VALUE: tl.constexpr) -> None:
    table = tl.multiple_of(memory.to(tl.pointer_type(tl.pointer_type(tl.float32))), VALUE)
    tl.store(table.to(tl.pointer_type(tl.float32)), 1.0)


def run(kernel: Any, *args: Any) -> None:
    memory = torch.zeros(64, dtype=torch.float32)
    assert memory.data_ptr() % 64 == 0
    kernel[(1,)](memory, *args)
    assert memory.any()


@pytest.mark.parametrize(
    ("kernel", "args"),
    [
        (of_one_pointer, (4, 16)),
        (of_one_pointer, (1, 4)),
        (of_rows, (12, 16)),
        (of_rows, (1, 4)),
        (of_rows, (1, 16)),  # one contiguous group
        (of_cells, (12, 0, 8)),
        (of_cells, (12, 4, 4)),
        (of_offsets, (5, 8)),
        (of_pointers, (16,)),
    ],
)
def test_promises_that_are_kept(kernel: Any, args: tuple[int, ...]) -> None:
    run(kernel, *args)


@pytest.mark.parametrize(
    ("kernel", "args", "reported"),
    [
        (of_one_pointer, (1, 16), r"start at a multiple of 16 bytes, but lane \[0\] points 4 bytes past one"),
        (of_one_pointer, (4, 32), r"start at a multiple of 32 bytes, but lane \[0\] points 16 bytes past"),
        (of_rows, (5, 16), r"in dimension 0 start at a multiple of 16 bytes, but lane \[1\] points 4 bytes"),
        (of_cells, (10, 0, 8), r"in dimension 1 start at a multiple of 16 bytes, but lane \[1, 0\] points 8 bytes"),
        (of_cells, (12, 4, 8), r"8 contiguous cells in dimension 1, but lane \[0, 4\] points elsewhere"),
    ],
)
def test_promises_that_are_broken(kernel: Any, args: tuple[int, ...], reported: str) -> None:
    with pytest.raises(InterpreterError, match=reported):
        run(kernel, *args)


VIEW = Inputs(wide_req_to_token=True)  # three columns more on either side
ROWS = Mutation("nsa_oracle.optimized.metadata:_source_aligned", "row_stride % buffers.WORDS_PER_VECTOR == 0", "True")
START = Mutation("nsa_oracle.optimized.metadata:_source_aligned", "table.data_ptr() % 16 == 0", "True")


@contextmanager
def pages_thought_aligned() -> Iterator[None]:
    """A page of one index key is 36 bytes."""
    with patch.object(indexer, "math", SimpleNamespace(gcd=lambda *numbers: 16)):
        yield


@pytest.mark.parametrize(
    ("case", "changes", "assumed"),
    [
        ("rows-longer-than-a-copy-chunk", {"max_context_len": 2301}, mutated(ROWS)),
        ("rows-longer-than-a-copy-chunk", {"max_context_len": 2298, "inputs": VIEW}, mutated(START)),
        ("layer-one-column-behind-a-tile", {}, pages_thought_aligned()),
    ],
    ids=["rows", "a view", "pages"],
)
def test_the_oracle_reports_an_alignment_that_was_assumed(
    case: str, changes: dict[str, Any], assumed: AbstractContextManager[None]
) -> None:
    scenario = load(CORPUS / f"{case}.json")
    scenario = scenario.model_copy(update={"setup": scenario.setup.model_copy(update=changes)})
    judge(scenario, optimized_backend, torch.device("cpu"))
    with assumed, pytest.raises(OracleFailure) as failure:
        judge(scenario, optimized_backend, torch.device("cpu"))
    promise = "tl.multiple_of promises that contiguous cells in dimension 0 start at a multiple of 16 bytes"
    assert promise in str(failure.value)
