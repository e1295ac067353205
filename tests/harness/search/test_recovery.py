"""Judging goes on after a process has lost its GPU; here the loss is made up, and everything runs on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.judge import OracleFailure
from nsa_oracle.harness.processes import ChildDied
from nsa_oracle.harness.scenarios.files import load, save
from nsa_oracle.harness.scenarios.scenario import Join
from nsa_oracle.harness.search import recovery
from nsa_oracle.harness.search.explore import DeviceLost, has_lost_the_device
from nsa_oracle.harness.search.recovery import Recovery, SubjectSpec
from tests.support.metadata_cases import CROWDED, DECODE, FAULT, case, one_replay

CPU = torch.device("cpu")


def recovery_of(spec: str) -> Recovery:
    subject = SubjectSpec(spec)
    return Recovery(subject, subject.build(CPU), CPU)


@pytest.fixture
def stale() -> Iterator[Recovery]:
    made = recovery_of("tests.support.backends.replays:KeepsPageTable")
    yield made
    made.close()


def test_what_loses_a_device() -> None:
    cuda = torch.device("cuda")
    assert has_lost_the_device(FAULT, cuda)
    assert not has_lost_the_device(FAULT, CPU)
    assert not has_lost_the_device(Finding(Kind.CRASH, "IndexError", "index 3", "no exception"), cuda)
    assert not has_lost_the_device(Finding(Kind.VALUE, "CUDA error", "3", "4"), cuda)


def test_without_a_loss_everything_runs_here(stale: Recovery) -> None:
    outcome = stale.judge(one_replay(DECODE))
    assert outcome.failure is not None
    assert not outcome.lost
    assert stale._child._process is None


def test_a_loss_is_shrunk_and_judging_goes_on(stale: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "0123456789ab.raw.json"
    save(CROWDED, raw)

    def fault(*arguments: Any, **options: Any) -> None:
        raise DeviceLost(OracleFailure(CROWDED, FAULT, 4), raw, 7)

    monkeypatch.setattr(recovery, "explore", fault)
    outcome = stale.explore(4, 0, tmp_path)
    assert outcome.lost
    assert outcome.failure is not None
    assert outcome.failure.finding.field == "page_table_1"  # as the child finds it
    assert len(outcome.failure.scenario.events) < len(CROWDED.events)
    assert outcome.saved == tmp_path / "0123456789ab.min.json"
    assert load(outcome.saved).events == outcome.failure.scenario.events

    # From now on in a child, which knows nothing of the fault above.
    again = stale.explore(24, 0, tmp_path)
    assert again.failure is not None
    assert not again.lost
    assert again.failure.finding.kind is Kind.VALUE
    judged = stale.judge(one_replay(DECODE))
    assert judged.failure is not None


def test_a_child_that_dies_is_replaced() -> None:
    made = recovery_of("tests.support.backends.crashes:EndsTheProcess")
    made.lost = True
    try:
        with pytest.raises(ChildDied, match="its process ended with 9"):
            made.judge(one_replay(DECODE))
        assert made.judge(case(Join(seq_len=3))).failure is None
    finally:
        made.close()
