"""docs/reverts.md says what the oracle found in each wiring of two reverted optimisations. It still does."""

from __future__ import annotations

import re

import pytest
import torch

from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.scenarios.files import load
from nsa_oracle.harness.subjects.loading import load_backend
from tests.support.project import PROJECT

CASES = {path.stem.removeprefix("revert-"): path for path in (PROJECT / "tests/cases").glob("revert-*.json")}
ROWS = dict(re.findall(r"^\| \[?`(\w+)`.*?\| (?:wrong results|CUDA graph|run-time error) \| `(.+?)`",
                       (PROJECT / "docs/reverts.md").read_text(encoding="utf-8"), re.MULTILINE))  # fmt: skip


def wiring(stem: str) -> str:
    """The class that a case is named after."""
    return "".join(word.capitalize() for word in stem.split("-"))


def test_every_failing_wiring_has_its_case() -> None:
    assert {wiring(stem) for stem in CASES} == set(ROWS)


@pytest.mark.parametrize("stem", sorted(CASES))
def test_wiring_fails_as_described(stem: str) -> None:
    name = wiring(stem)
    with pytest.raises(OracleFailure) as failure:
        judge(load(CASES[stem]), load_backend(f"docs.examples.reverts:{name}"), torch.device("cpu"))
    sentence = failure.value.finding.sentence()
    kind, _, rest = ROWS[name].partition(": ")
    assert sentence.startswith(kind)
    for word in re.findall(r"[\w.]+", rest):
        assert word in sentence


@pytest.mark.parametrize("name", ["VectorisedTailFilled", "VectorisedWorking", "BatchedCopy"])
@pytest.mark.parametrize("stem", sorted(CASES))
def test_working_wiring_passes_all_of_them(name: str, stem: str) -> None:
    judge(load(CASES[stem]), load_backend(f"docs.examples.reverts:{name}"), torch.device("cpu"))
