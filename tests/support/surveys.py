"""Surveys of a layer by one case, in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_oracle.harness.scenarios.limits import LAYER_FIELDS, declared
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.search import survey
from nsa_oracle.harness.search.rows import Row
from nsa_oracle.harness.search.survey import Survey
from nsa_oracle.harness.subjects.loading import completed
from nsa_oracle.harness.subjects.subject import Subject, optimized_subject


def surveyed(layer: Any, device: torch.device, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> dict[str, Row]:
    """By one case."""
    draw_only(scenario, monkeypatch)
    found = Survey(subject_of(layer), device)
    found.run(cases=1, seed=0)
    assert found.found.cases == 1
    return dict(found.found.rows)


def draw_only(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every case of a survey be ``scenario``."""
    stream = SimpleNamespace(cases=lambda numbers: [SimpleNamespace(scenario=scenario) for _ in numbers])
    monkeypatch.setattr(survey, "CaseStream", lambda scale, switches, seed: stream)


def subject_of(layer: Any, **sizes: Sequence[Any]) -> Subject:
    limits = declared(SimpleNamespace(sizes=sizes), LAYER_FIELDS, "nobody")
    return dataclasses.replace(optimized_subject(factory_of(layer)), layer_limits=limits)


def factory_of(layer: Any) -> Any:
    return lambda config, attention: completed(layer(config, attention), config, attention, layer.__name__)


def broken(records: dict[str, Row]) -> set[str]:
    assert all(
        record.checked >= record.broken and bool(record.finding) == bool(record.broken) for record in records.values()
    )
    return {name for name, record in records.items() if record.broken}
