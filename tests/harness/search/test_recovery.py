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
from nsa_oracle.harness.search.recovery import Recovery
from nsa_oracle.harness.search.spec import SubjectSpec
from tests.support.backends import crashes
from tests.support.command_line import FAILS, PASSES, replay
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


def remembering() -> Recovery:
    return recovery_of("tests.support.backends.crashes:RemembersThePageSize")


def test_a_failure_that_depends_on_earlier_cases_is_reported_behind_them(tmp_path: Path) -> None:
    """One of four earlier cases is at fault."""
    at_fault, harmless = one_replay(DECODE, page_size=2, max_context_len=8), case(Join(seq_len=3))
    made = remembering()
    crashes.RemembersThePageSize.step.first = None  # type: ignore[attr-defined]
    try:
        for earlier in (harmless, at_fault, harmless, harmless):
            assert made.judge(earlier, tmp_path).failure is None
        outcome = made.judge(one_replay(DECODE), tmp_path)
        assert outcome.failure is not None
        assert outcome.depends
        (before,) = outcome.before
        assert load(before) == at_fault
        assert before.parent == tmp_path
        assert outcome.remark.startswith("DEPENDS ON EARLIER CASES: it passes in a fresh process, and fails there ")
        assert outcome.remark.endswith("behind 1 earlier case.\n")
        save(one_replay(DECODE), tmp_path / "failing.json")
        named = ["--backend", made.spec.backend or ""]
        together = replay(str(before), str(tmp_path / "failing.json"), *named)
        assert together.returncode == FAILS, "files are judged in order, in one process"
        assert together.stdout.splitlines()[1] == f"ORACLE FAILURE  {outcome.failure.finding.sentence()}"
        assert replay(str(tmp_path / "failing.json"), *named).returncode == PASSES
    finally:
        crashes.RemembersThePageSize.step.first = None  # type: ignore[attr-defined]
        made.close()


def test_a_failure_that_nothing_in_a_fresh_process_shows_says_so(tmp_path: Path) -> None:
    made = remembering()
    crashes.RemembersThePageSize.step.first = 64  # type: ignore[attr-defined]
    try:
        outcome = made.judge(one_replay(DECODE), tmp_path)
        assert outcome.failure is not None
        assert (outcome.depends, outcome.before) == (True, ())
        assert outcome.remark.startswith("DEPENDS ON ITS PROCESS: it passes in a fresh one")
        assert list(tmp_path.iterdir()) == []
    finally:
        crashes.RemembersThePageSize.step.first = None  # type: ignore[attr-defined]
        made.close()


def test_a_failure_of_a_fresh_process_has_no_remark(stale: Recovery, tmp_path: Path) -> None:
    outcome = stale.judge(one_replay(DECODE), tmp_path)
    assert outcome.failure is not None
    assert (outcome.depends, outcome.before, outcome.remark) == (False, (), "")
    explored = stale.explore(24, 0, tmp_path)
    assert explored.saved is not None
    assert explored.saved.name.endswith(".min.json")
    assert (explored.depends, explored.before, explored.remark) == (False, (), "")


def test_a_child_that_dies_is_replaced() -> None:
    made = recovery_of("tests.support.backends.crashes:EndsTheProcess")
    made.lost = True
    try:
        with pytest.raises(ChildDied, match=r"the process ended \(signal SIGKILL\)"):
            made.judge(one_replay(DECODE))
        assert made.judge(case(Join(seq_len=3))).failure is None
    finally:
        made.close()
