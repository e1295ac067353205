"""A mistake in a backend or a layer ends in one line that names the author's code and the remedy, never in silence."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest
import torch

from nsa_oracle.harness.errors import BackendError, ScenarioError
from nsa_oracle.harness.judge import OracleFailure, judge_subject
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Join, Replay, Scenario
from nsa_oracle.harness.subjects.subject import Subject
from tests.support.adapter_mistakes import HEADER, Mistake, mistakes
from tests.support.layer_cases import case as layer_case
from tests.support.layer_cases import lattice
from tests.support.metadata_cases import DECODE, VERIFY
from tests.support.metadata_cases import case as metadata_case

CPU = torch.device("cpu")
EVENTS = (Join(seq_len=6), Eager(mode=VERIFY), Capture(mode=DECODE, buckets=(2,)), Replay(mode=DECODE))
METADATA = metadata_case(*EVENTS, num_steps=2)
LAYER = layer_case(*EVENTS, layer=lattice())
REFERENCE = "nsa_oracle.reference.multi_step:MultiStepBackend"
MISTAKES = {mistake.name: mistake for mistake in mistakes()}
STATE = {
    "folder": Path.cwd,
    "dtype": torch.get_default_dtype,
    "device": torch.get_default_device,
    "threads": torch.get_num_threads,
    "gradients": torch.is_grad_enabled,
    "inference": torch.is_inference_mode_enabled,
    "deterministic": torch.are_deterministic_algorithms_enabled,
    "precision": torch.get_float32_matmul_precision,
    "denormals": lambda: float(torch.full((), 2e-40) * 0.5) > 0,
    "functions": lambda: (torch.cumsum, torch.Tensor.any, builtins.len),
    "seed": lambda: torch.get_rng_state().tolist(),
}


def test_there_are_many() -> None:
    assert len(MISTAKES) == len(mistakes()) >= 140


def verdict(spec: str, is_layer: bool, device: torch.device) -> str | None:
    """The line that the author sees, or None if everything passes."""
    scenario: Scenario = LAYER if is_layer else METADATA
    try:
        subject = Subject.load(*((REFERENCE, spec) if is_layer else (spec, None)), device)
        subject.check(scenario, Path("case.json"))
        judge_subject(subject, scenario, device)
    except (BackendError, ScenarioError, OracleFailure) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.filterwarnings("default:slow")
def test_mistake_is_told_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    mistake: Mistake = MISTAKES[name]
    module = f"adapter_{list(MISTAKES).index(name)}"
    (tmp_path / f"{module}.py").write_text(HEADER + mistake.source.replace("{module}", module))
    monkeypatch.syspath_prepend(str(tmp_path))
    before = {what: state() for what, state in STATE.items()}
    # Kernels run where this session's do; a backend in plain torch is judged on the CPU everywhere.
    where = device if mistake.is_layer else CPU
    line = verdict(mistake.spec.replace("{module}", module), mistake.is_layer, where)
    assert {what: state() for what, state in STATE.items()} == before
    if mistake.passes:
        assert line is None
        return
    assert line is not None, "a pass"
    assert len(line.splitlines()) == 1
    assert all(character.isprintable() for character in line)
    missing = [part for part in (*mistake.says, mistake.names) if part.replace("{module}", module) not in line]
    assert not missing, line
