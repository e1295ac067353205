"""What is drawn from a seed."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path

import pytest
import torch

from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.judge import Verdict
from nsa_oracle.harness.scenarios.scales import LARGE_LAYER
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.search import explore
from nsa_oracle.harness.search.survey import Survey
from nsa_oracle.harness.subjects.default import optimized_backend
from nsa_oracle.harness.subjects.subject import SCALES, Subject, optimized_subject
from tests.support.limits import limits


def test_one_seed_draws_the_same_whatever_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypothesis would draw from the constants of a module that somebody has imported in between."""
    before = drawn_from_one_seed()
    (tmp_path / "full_of_constants.py").write_text(f"CONSTANTS = {list(range(200, 9000, 7))}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("full_of_constants")
    assert drawn_from_one_seed() == before


def drawn_from_one_seed() -> list[Scenario]:
    drawn: list[Scenario] = []

    def note(subject: Subject, scenario: Scenario, *_: object) -> Verdict:
        drawn.append(scenario)
        return Verdict()

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(explore, "judge_subject", note)
        explore.explore(optimized_subject(), torch.device("cpu"), 40, 1, Path(folder))
    assert len(drawn) == 40
    return drawn


def test_sizes_that_exclude_each_other_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, tmp_path: Path
) -> None:
    monkeypatch.setitem(SCALES, (device.type, True), LARGE_LAYER)
    sizes = {"max_context_len": (4100,), "page_size": (64,), "qk_rope_head_dim": (16,), "regime": ("dominating",)}
    subject = Subject(optimized_backend, layer_limits=limits(**sizes, pool_size=(8, 9, 10)))
    with pytest.raises(BackendError, match=r"^no case drawn on this device has all of the declared sizes at once$"):
        explore.explore(subject, device, 5, 0, tmp_path, with_layer=True)
    with pytest.raises(BackendError, match=r"^no case drawn on this device has all of the declared sizes at once$"):
        Survey(subject, device).run(5, 0)
