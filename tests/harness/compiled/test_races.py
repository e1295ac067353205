"""Accesses of two programs of a launch to one address, of which one writes, are found; what is harmless is not."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from nsa_oracle.harness.bugs.mutate import Mutation, mutated
from nsa_oracle.harness.compiled.faults import Race
from nsa_oracle.harness.compiled.races import leave_unordered, unordered
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.scenarios.files import load
from nsa_oracle.harness.subjects.default import optimized_backend
from tests.support.project import PROJECT

pytestmark = pytest.mark.usefixtures("all_are_compiled")


@triton.jit
def blocks_kernel(target: tl.tensor, stride: tl.tensor, VALUE_OF_PROGRAM: tl.constexpr) -> None:
    """Each program stores 8 cells, ``stride`` behind those of the one before."""
    pid = tl.program_id(0)
    value = pid if VALUE_OF_PROGRAM else 5
    tl.store(target + pid * stride + tl.arange(0, 8), value)


def test_programs_with_cells_of_their_own_do_not_race() -> None:
    blocks_kernel[(4,)](torch.zeros(32, dtype=torch.int32), 8, VALUE_OF_PROGRAM=True)


def test_two_programs_that_store_different_values_race() -> None:
    message = (
        r"a race of two programs of blocks_kernel: program 0 stores byte 28 of target \(line 26\), program 1 stores it "
        r"\(line 26\), and nothing orders them"
    )
    with pytest.raises(Race, match=message):
        blocks_kernel[(4,)](torch.zeros(32, dtype=torch.int32), 7, VALUE_OF_PROGRAM=True)


@pytest.mark.parametrize("before", [0, 5])
def test_programs_that_store_the_same_value_do_not_race(before: int) -> None:
    blocks_kernel[(4,)](torch.full((32,), before, dtype=torch.int32), 4, VALUE_OF_PROGRAM=False)


def test_memory_whose_content_is_unspecified_may_be_written_in_any_order() -> None:
    target = torch.zeros(32, dtype=torch.int32)
    leave_unordered(target[7:8], target)
    blocks_kernel[(2,)](target, 7, VALUE_OF_PROGRAM=True)
    with pytest.raises(Race, match="program 0 stores byte 24 of target"):
        blocks_kernel[(2,)](target, 6, VALUE_OF_PROGRAM=True)


def test_memory_is_unordered_while_it_lives() -> None:
    target = torch.zeros(32, dtype=torch.int32)
    leave_unordered(target[2:4], target)
    begin = target.data_ptr() + 8
    assert [part[:2] for part in unordered() if part.begin == begin] == [(begin, begin + 8)]
    del target
    assert not [part for part in unordered() if part.begin == begin]


@triton.jit
def exchange_kernel(target: tl.tensor, shift: tl.tensor) -> None:
    """Each program reads the cell of another and writes its own."""
    pid = tl.program_id(0)
    other = (pid + shift) % tl.num_programs(0)
    value = tl.load(target + other)
    tl.store(target + pid, value + 1)


@pytest.mark.parametrize("shift", [1, 3])  # each reads what the next one writes, or what the one before has written
def test_a_program_that_reads_what_another_one_writes_races(shift: int) -> None:
    with pytest.raises(Race, match="of target"):
        exchange_kernel[(4,)](torch.arange(4), shift)


def test_a_program_that_reads_what_it_alone_writes_does_not_race() -> None:
    exchange_kernel[(4,)](torch.arange(4), 0)


@triton.jit
def own_copy_kernel(shared: tl.tensor, out: tl.tensor, WRITES: tl.constexpr) -> None:
    """All programs store the same values in one place, and each reads them back."""
    lanes = tl.arange(0, 8)
    if (tl.program_id(0) == 0) | WRITES:
        tl.store(shared + lanes, lanes * 3)
    tl.debug_barrier()
    tl.store(out + tl.program_id(0) * 8 + lanes, tl.load(shared + lanes))


def test_a_program_reads_its_own_copy_of_what_all_have_written() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    own_copy_kernel[(4,)](torch.zeros(8, dtype=torch.int32), out, WRITES=True)
    with pytest.raises(Race, match=r"program 0 stores byte . of shared.*program 1 loads it"):
        own_copy_kernel[(4,)](torch.zeros(8, dtype=torch.int32), out, WRITES=False)


@triton.jit
def last_one_kernel(parts: tl.tensor, counter: tl.tensor, out: tl.tensor, SEMANTICS: tl.constexpr) -> None:
    """The program that counts last sums what all have stored."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(parts + pid, pid + 1)
    if tl.atomic_add(counter, 1, sem=SEMANTICS) == programs - 1:
        lanes = tl.arange(0, 8)
        tl.store(out, tl.sum(tl.load(parts + lanes, mask=lanes < programs, other=0)))


def test_programs_that_atomic_operations_order_do_not_race() -> None:
    counter, out = torch.zeros(2, 1, dtype=torch.int32)
    last_one_kernel[(8,)](torch.zeros(8, dtype=torch.int32), counter, out, SEMANTICS="acq_rel")
    assert out.item() == 36
    assert counter.item() == 8


def test_relaxed_atomic_operations_order_nothing() -> None:
    counter, out = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(Race, match="of parts"):
        last_one_kernel[(8,)](torch.zeros(8, dtype=torch.int32), counter, out, SEMANTICS="relaxed")


@triton.jit
def mixed_kernel(counter: tl.tensor) -> None:
    if tl.program_id(0) == 0:
        tl.atomic_add(counter, 1)
    else:
        tl.store(counter, 7)


def test_an_atomic_operation_and_a_store_race() -> None:
    with pytest.raises(Race, match=r"program 0 updates byte 0 of counter.*program 1 stores it"):
        mixed_kernel[(2,)](torch.zeros(1, dtype=torch.int32))


@triton.jit
def alias_kernel(source: tl.tensor, target: tl.tensor) -> None:
    pid = tl.program_id(0)
    tl.store(target + pid, tl.load(source + pid) + 1)


def test_two_views_of_one_memory_race() -> None:
    memory = torch.arange(9)
    alias_kernel[(8,)](memory[:8], memory[:8])
    with pytest.raises(Race):
        alias_kernel[(8,)](memory[1:], memory[:8])


def test_one_program_does_not_race_with_itself() -> None:
    own_copy_kernel[(1,)](torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32), WRITES=False)


def test_a_race_that_the_interpreter_hides_is_found_in_optimized() -> None:
    """Programs also fill the row behind their own. The program of that row runs later here, and makes it right."""
    one_row_more = Mutation(
        "nsa_oracle.optimized.kernels.metadata:fill_metadata_kernel",
        "        row_end = row_begin + rows_per_request\n",
        "        row_end = tl.minimum(row_begin + rows_per_request + 1, num_rows)\n",
    )
    scenario = load(PROJECT / "tests" / "cases" / "same-batch-on-other-pages.json")
    with mutated(one_row_more), pytest.raises(OracleFailure, match=r"Race at .*page_table.py:.* in fill_metadata"):
        judge(scenario, optimized_backend, torch.device("cpu"))
    judge(scenario, optimized_backend, torch.device("cpu"))
