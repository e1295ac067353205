"""Every bug of the zoo still dies, on the case that once killed it, by a check that is meant to find it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.bugs.bug import Bug, Check
from harness.bugs.zoo import ZOO
from harness.judge import OracleFailure, judge
from harness.plugin import BUG
from harness.protocol import optimized_backend
from harness.scenario import load

CASES = Path(__file__).parent / "bugs"


def case_of(bug: Bug) -> Path:
    return CASES / f"{bug.name}.json"


@pytest.mark.parametrize("bug", ZOO.values(), ids=lambda bug: bug.name)
def test_bug_is_killed(bug: Bug, device: torch.device, record_property: Callable[[str, object], None]) -> None:
    record_property(BUG, bug.name)
    if bug.gpu and device.type != "cuda":
        pytest.skip("this bug needs a GPU")
    scenario = load(case_of(bug))
    judge(scenario, optimized_backend, device)  # nothing is wrong with the clean tree
    with bug.plant() as subject, pytest.raises(OracleFailure) as failure:
        subject.judge(scenario, device)
    assert Check.of(failure.value.finding) in bug.caught_by, failure.value.finding.sentence()
    judge(scenario, optimized_backend, device)  # and the mutation is gone


def test_every_case_is_of_a_bug() -> None:
    assert {path.stem for path in CASES.glob("*.json")} == set(ZOO)


def test_the_zoo_is_described() -> None:
    for name, bug in ZOO.items():
        assert name == bug.name
        assert bug.sentence.endswith(".")
        assert bug.reference
        assert bug.trigger
        assert bug.caught_by
