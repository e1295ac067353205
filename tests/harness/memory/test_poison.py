"""Poison around what a backend is given, and what it finds."""

from __future__ import annotations

import pytest
import torch

from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.memory.banded import BandedInput
from nsa_oracle.harness.memory.poison import GuardedAllocations, overrun, without_bands
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Join, Replay
from nsa_oracle.harness.scenarios.setup import Inputs
from tests.support.backends import clean, memory, replays
from tests.support.metadata_cases import DECODE, case, factory_of, one_replay

CPU = torch.device("cpu")
SENTINEL = 0x5A5A5A5A


class TestBandedInput:
    def test_poison_on_either_side(self) -> None:
        banded = BandedInput((3, 70), torch.int32, SENTINEL, CPU)
        assert banded.tensor.shape == (3, 70)
        before = banded.tensor.storage_offset()
        assert before >= 70
        assert banded.memory[:before].eq(SENTINEL).all()
        behind = banded.memory[before + banded.tensor.numel() :]
        assert behind.eq(SENTINEL).all()
        assert len(behind) >= 70
        assert banded.tensor.data_ptr() % 64 == banded.memory.data_ptr() % 64

    @pytest.mark.parametrize("cell", [-1, 0, 5, 6])
    def test_a_write_anywhere_is_found(self, cell: int) -> None:
        banded = BandedInput((2, 3), torch.int64, SENTINEL, CPU)
        banded.content.fill_(4)
        banded.memory.copy_(banded.expected)
        assert not banded.is_modified()
        banded.memory[banded.tensor.storage_offset() + cell] += 1
        assert banded.is_modified()


class TestReadsBeyond:
    """Reading past an input gets poison: the judge sees it in whatever is made of it."""

    @pytest.mark.parametrize("strided", [False, True])
    def test_planted_reads(self, device: torch.device, strided: bool) -> None:
        scenario = one_replay(DECODE, inputs=Inputs(strided=strided))
        judge(scenario, factory_of(clean.Clean), device)
        for backend in (memory.ReadsBehindSeqLens, memory.ReadsBehindThePool):
            with pytest.raises(OracleFailure) as caught:
                judge(scenario, factory_of(backend), device)
            assert caught.value.finding.kind is Kind.VALUE


class TestWithoutBands:
    """A tool that watches allocations finds nothing in a band, so there must be none."""

    def test_nothing_beside(self) -> None:
        cpu = torch.device("cpu")
        with without_bands():
            banded = BandedInput((2, 3), torch.int32, 7, cpu)
            with GuardedAllocations(7, cpu) as guard:
                made = torch.ones(5, dtype=torch.int32)
            assert len(banded.memory) == 6
            assert made.untyped_storage().nbytes() == 20
            assert overrun(guard.buffers) is None
        assert len(BandedInput((2, 3), torch.int32, 7, cpu).memory) > 6

    def test_judging_works_all_the_same(self, device: torch.device) -> None:
        scenario = case(Capture(mode=DECODE, buckets=(1,)), Join(seq_len=3), Replay(mode=DECODE), Eager(mode=DECODE))
        with without_bands():
            judge(scenario, factory_of(clean.Clean), device)
            with pytest.raises(OracleFailure) as caught:
                judge(scenario, factory_of(replays.KeepsPageTable), device)
        assert caught.value.finding.kind is Kind.VALUE
