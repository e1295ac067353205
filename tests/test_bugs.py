"""Every bug of the zoo is killed on its saved case, by one of the checks that are meant to find it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nsa_oracle.harness.bugs.bug import Bug
from nsa_oracle.harness.bugs.zoo import ZOO
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.findings import Finding
from nsa_oracle.harness.judge import OracleFailure, judge, judge_subject
from nsa_oracle.harness.processes import Child
from nsa_oracle.harness.scenarios.files import BUG_CASES, load
from nsa_oracle.harness.subjects.default import optimized_backend
from nsa_oracle.pytest_plugin import BUG


def finding_of(name: str, device: str) -> Finding | None:
    """The judge's finding on the bug's saved case; None if it survives. Raises if the clean tree fails the case."""
    bug, scenario = ZOO[name], load(BUG_CASES / f"{name}.json")
    judge(scenario, optimized_backend, torch.device(device))
    with bug.plant() as subject:
        try:
            judge_subject(subject, scenario, torch.device(device))
        except OracleFailure as failure:
            return failure.finding
    return None


@pytest.mark.parametrize("bug", ZOO.values(), ids=lambda bug: bug.name)
def test_bug_is_killed(bug: Bug, device: torch.device, record_property: Callable[[str, object], None]) -> None:
    record_property(BUG, bug.name)
    if not bug.shows_on(device.type):
        pytest.skip("this bug needs a GPU" if bug.gpu else "only the interpreter checks every access")
    if bug.faults:  # the bug leaves the GPU unusable for its process
        child = Child(device.type)
        try:
            finding = child.call(finding_of, bug.name, device.type)
        finally:
            child.close()
    else:
        finding = finding_of(bug.name, device.type)
        judge(load(BUG_CASES / f"{bug.name}.json"), optimized_backend, device)  # the mutation is gone
    assert finding is not None, "it survives its case"
    assert Check.of(finding) in bug.caught_by, finding.sentence()


def test_every_case_is_of_a_bug() -> None:
    assert {path.stem for path in BUG_CASES.glob("*.json")} == set(ZOO)


def test_the_zoo_is_described() -> None:
    for name, bug in ZOO.items():
        assert name == bug.name
        assert bug.sentence.endswith(".")
        assert bug.reference
        assert bug.trigger
        assert bug.caught_by
        assert bug.gpu or not bug.faults
