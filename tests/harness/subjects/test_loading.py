"""What cannot be judged at all is refused in one line."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path

import pytest
import torch

from nsa_oracle.harness.errors import BackendError, CaseTimeout, ScenarioError
from nsa_oracle.harness.judge import OracleFailure, judge, judge_subject
from nsa_oracle.harness.scenarios.scenario import Eager, Join
from nsa_oracle.harness.subjects.arguments import backend_of
from nsa_oracle.harness.subjects.default import optimized_backend
from nsa_oracle.harness.subjects.loading import LoadedBackend
from nsa_oracle.harness.subjects.subject import Subject, optimized_subject
from nsa_oracle.harness.watching import noted
from nsa_oracle.reference.multi_step import MultiStepBackend
from nsa_oracle.reference.types import BackendConfig, ForwardBatch
from tests.support.metadata_cases import DECODE, case, one_replay

REFUSED_BACKENDS = {
    "NeedsMore": "cannot be called with (config, req_to_token): missing a required argument: 'stream'",
    "NeedsLess": "cannot be called with (config, req_to_token): too many positional arguments",
    "gives_none": "returned None; return the backend",
    "NothingForSteps": "attn_backends must be a list of single-step backends, not NoneType",
    "NumberOfSteps": "attn_backends must be a list of single-step backends, not int",
    "SizesOfAnotherKind": "sizes must map fields to allowed values",
    "SizesOfALayer": "sizes: no backend has 'num_heads'",
    "UnknownMode": "modes: there is no PREFILL",
}
REFUSED_LAYERS = {
    "LayerNeedsMore": "cannot be called with (config, attention): missing a required argument: 'stream'",
    "NumberForAStage": "NumberForAStage.sparse_mla is not a method",
    "no_layer": "returned None; return the layer",
    "WeakerList": "weaker must map stages to a Strictness; it is a list",
    "WeakerText": "weaker: 'out' must be an nsa_oracle.harness.protocol.Strictness",
    "WeakerCache": "weaker: 'kv_cache' cannot be BOUND; it fits logits, out, lse",
    "WeakerNothing": "weaker: there is no stage 'output'; did you mean out?",
    "SetOfOutputs": "weaker: 'out' cannot be SAME_SET; it fits topk_indices, indices, topk_ragged",
}


@pytest.mark.parametrize(("name", "cause"), REFUSED_BACKENDS.items())
def test_backend_is_refused_in_one_line(name: str, cause: str, device: torch.device) -> None:
    with pytest.raises(BackendError) as caught:
        Subject.load(f"tests.support.strangers:{name}", None, device)
    assert str(caught.value).startswith(f"backend 'tests.support.strangers:{name}'")
    assert cause in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("name", "cause"), REFUSED_LAYERS.items())
def test_layer_is_refused_in_one_line(name: str, cause: str, device: torch.device) -> None:
    with pytest.raises(BackendError) as caught:
        Subject.load(None, f"tests.support.strangers:{name}", device)
    assert str(caught.value).startswith(f"layer 'tests.support.strangers:{name}'")
    assert cause in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("what", ["backend", "layer"])
def test_import_that_does_not_end_is_one_line(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"endless_{what}.py").write_text("while True:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = f"endless_{what}:X"
    said = (
        rf"^{what} '{spec}': the import of endless_{what} did not end: still running after 0\.5 seconds, at \S+:[12]$"
    )
    with pytest.raises(BackendError, match=said):
        Subject.load(*((spec, None) if what == "backend" else (None, spec)), torch.device("cpu"), 0.5)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("len", "None", "replaced"),
        ("len", "lambda all: 3", "replaced by "),
        ("isinstance", "lambda *all: 1 / 0", "replaced by "),
        ("next", "None", "replaced"),
    ],
)
def test_functions_of_python_that_an_import_replaces_are_named_and_put_back(
    name: str, value: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, before = f"replaces_{name}_by_{len(value)}", vars(builtins)[name]
    (tmp_path / f"{module}.py").write_text(f"import builtins\nbuiltins.{name} = {value}\nclass X: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(BackendError) as caught:
            Subject.load(f"{module}:X", None, torch.device("cpu"))
        assert vars(builtins)[name] is before
    finally:
        builtins.__dict__[name] = before
    said = f"backend '{module}:X': importing {module}: global state left changed: builtins.{name}: got {told}"
    assert str(caught.value).startswith(said)
    assert len(str(caught.value).splitlines()) == 1


def test_time_that_is_up_in_the_harness_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_slow(*_: object) -> None:
        raise CaseTimeout("still running after 2 seconds")

    monkeypatch.setattr(sys.modules[judge_subject.__module__], "_judged", too_slow)
    with pytest.raises(ScenarioError, match="still running after 2 seconds in the harness, not in the judged code"):
        judge_subject(optimized_subject(), one_replay(DECODE), torch.device("cpu"))


class OfTwoArguments(MultiStepBackend):
    """As authors write it; wrong, so that a verdict shows that it was built."""

    modes = ("DECODE",)

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        super().__init__(config, req_to_token)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self.attn_backends[0].forward_metadata.cache_seqlens_int32.add_(1)


def test_judge_takes_a_backend_as_its_author_wrote_it() -> None:
    cpu, scenario = torch.device("cpu"), case(Join(seq_len=3), Eager(mode=DECODE))
    assert judge(scenario, MultiStepBackend, cpu).eager_calls == 2
    with pytest.raises(OracleFailure, match="cache_seqlens_int32"):
        judge(scenario, OfTwoArguments, cpu)
    assert backend_of(optimized_backend) is optimized_backend
    adapted = backend_of(OfTwoArguments)
    assert isinstance(adapted, LoadedBackend)
    assert backend_of(adapted) is adapted


def test_a_layer_that_flushes_denormals_leaves_them_to_the_reference() -> None:
    def flushing(number: torch.Tensor) -> float:
        torch.set_flush_denormal(True)
        return float(number * 0.5)

    tiny = torch.full((), 2e-40)
    assert noted(flushing)(tiny) == 0
    assert float(tiny * 0.5) > 0
