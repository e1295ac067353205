"""Loads and stores of interpreted kernels must lie within what the launch was given."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.errors import InterpreterError

from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.memory.poison import GuardedAllocations
from nsa_oracle.reference.types import ForwardBatch, Metadata
from tests.support.backends.seams import Step, backend_of
from tests.support.bounded import add_kernel, load_kernel, memory, store_kernel, through_integers_kernel
from tests.support.metadata_cases import DECODE, factory_of, one_replay

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled where there is a GPU")


def test_what_was_given_may_be_loaded() -> None:
    _, part = memory()
    target = torch.zeros(1, dtype=torch.int32)
    load_kernel[(1,)](part, target, 0, 4)
    load_kernel[(1,)](part, target, 2, 2)  # the other lanes are masked off
    load_kernel[(1,)](part, target, 5, 0)
    assert target.item() == 1


@pytest.mark.parametrize(
    ("first", "count", "where"),
    [(1, 4, "0 bytes behind the end of source"), (-1, 1, "4 bytes before the beginning of source")],
)
def test_a_load_whose_value_is_not_used_is_found(first: int, count: int, where: str) -> None:
    _, part = memory()
    with pytest.raises(InterpreterError, match=f"a load of 4 bytes that begins {where}"):
        load_kernel[(1,)](part, torch.zeros(1, dtype=torch.int32), first, count)


@pytest.mark.parametrize("kernel", [store_kernel, add_kernel])
def test_stores_are_found_before_they_write(kernel: object) -> None:
    whole, part = memory()
    with pytest.raises(InterpreterError, match="OutOfBounds"):
        kernel[(1,)](part, 4)  # type: ignore[index]
    assert not whole.any()


def test_between_guard_bands() -> None:
    with GuardedAllocations(7, torch.device("cpu")) as guard:
        own = torch.zeros(4, dtype=torch.int32)
    store_kernel[(1,)](own[2:], -2)  # a backend reaches all of its own buffer through any view
    assert own.tolist() == [1, 0, 0, 0]
    with pytest.raises(InterpreterError, match="OutOfBounds"):
        store_kernel[(1,)](own, 4)
    assert len(guard.buffers) == 1


def test_all_of_other_memory_may_be_touched() -> None:
    whole = torch.zeros(16, dtype=torch.int32)
    store_kernel[(1,)](whole[:4], 10)
    assert whole[10] == 1


def test_what_is_gone_restricts_nothing() -> None:
    whole, part = memory()
    kept = part.detach()
    del whole, part
    store_kernel[(1,)](kept, 4)


def test_pointers_made_from_integers_are_not_checked() -> None:
    _, part = memory()
    other = torch.zeros(1, dtype=torch.int32)
    through_integers_kernel[(1,)](part, other.data_ptr())
    assert other.item() == 7


@backend_of
class ReadsBehindLengths(Step):
    """A kernel of its own loads, and does not use, what lies behind the last length."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        load_kernel[(1,)](batch.seq_lens, torch.zeros(1, dtype=torch.int32), batch.seq_lens.shape[0], 1)


def test_the_report_names_the_line_of_the_kernel() -> None:
    with pytest.raises(OracleFailure) as failure:
        judge(one_replay(DECODE), factory_of(ReadsBehindLengths), torch.device("cpu"))
    finding = failure.value.finding
    assert (finding.kind, finding.field) == (Kind.CRASH, "OutOfBounds")
    assert finding.place.endswith("in load_kernel")
    assert "behind the end of source" in finding.got
    assert finding.stack[-1].endswith("tl.load(source + first + lanes, mask=lanes < count, other=0)")
