"""Calls of a layer's own methods are counted, and each is judged even if a captured chain does not use it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nsa_oracle.harness.commands import replaying
from nsa_oracle.harness.judge import OracleFailure, Verdict, judge
from nsa_oracle.harness.scenarios.scenario import Capture, Join, Replay
from nsa_oracle.harness.subjects.calls import MethodCalls, calls_counted_as
from nsa_oracle.harness.subjects.loading import load_layer
from nsa_oracle.reference.types import ForwardMode
from tests.support.command_line import FAILS, PASSES, replay, saved
from tests.support.layer_cases import BACKEND, case
from tests.support.metadata_cases import DECODE

ONE_REPLAY = case(Capture(mode=DECODE, buckets=(1,)), Join(seq_len=12), Replay(mode=DECODE))
LAYERS = "tests.support.layers.topk_alone"


def test_calls_are_counted_by_run() -> None:
    calls = MethodCalls(["double", "halve"])
    double = calls.counting("double", lambda number: 2 * number)
    assert double(2) == 4
    with calls_counted_as("eager chain"):
        assert [double(number) for number in (1, 2)] == [2, 4]
    assert calls.counts["double"] == {"elsewhere": 1, "eager chain": 2}
    assert calls.without("eager chain") == ["halve"]
    assert calls.without("isolated stage") == ["double", "halve"]


@pytest.mark.parametrize(
    "name",
    ["ReturnsNone", "Int64", "WrongShape", "WrongArguments", "Raises", "WritesItsInput", "WrongPositions"],
)
def test_wrong_method_that_the_captured_chain_does_not_use_is_found(name: str, device: torch.device) -> None:
    """One DECODE replay: ``optimized/`` selects in one fused transform there, and never calls ``topk_indices``."""
    factory, _ = load_layer(f"{LAYERS}:{name}")
    with pytest.raises(OracleFailure):
        judge(ONE_REPLAY, BACKEND, device, layer_factory=factory)


def test_method_that_cannot_be_captured_is_found(device: torch.device) -> None:
    factory, _ = load_layer(f"{LAYERS}:Synchronises")
    with pytest.raises(OracleFailure, match="capture rejected"):
        judge(ONE_REPLAY, BACKEND, device, layer_factory=factory)


def test_right_method_passes_and_its_calls_are_reported(device: torch.device) -> None:
    factory, _ = load_layer(f"{LAYERS}:Right")
    verdict = judge(ONE_REPLAY, BACKEND, device, Verdict(), factory)
    assert list(verdict.layers.calls) == ["topk_indices"]
    assert verdict.layers.calls["topk_indices"]["isolated stage"] > 0
    assert verdict.layers.calls["topk_indices"]["captured chain"] > 0
    assert verdict.layers.never_called == []


def test_ragged_transform_is_judged_without_a_prefill(device: torch.device) -> None:
    factory, _ = load_layer(f"{LAYERS}:WrongRagged")
    assert all(getattr(event, "mode", None) is not ForwardMode.EXTEND for event in ONE_REPLAY.events)
    with pytest.raises(OracleFailure, match="topk_ragged"):
        judge(ONE_REPLAY, BACKEND, device, layer_factory=factory)


def test_method_that_nothing_calls_fails_a_replay(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    idle = Verdict(cases=1, eager_calls=1)
    idle.layers.count_calls({"topk_indices": {}})
    monkeypatch.setattr(replaying, "judge_subject", lambda *_, **__: idle)
    monkeypatch.setattr(
        replaying, "torch_device", lambda _: device
    )  # the real one chooses how this process runs kernels
    judged = replaying.Replaying((Path(saved(tmp_path, ONE_REPLAY)),), layer=f"{LAYERS}:Right")
    assert judged.run() == FAILS
    assert "NOT JUDGED: topk_indices: no call in this run" in capsys.readouterr().out


def test_methods_that_were_called_are_listed(tmp_path: Path) -> None:
    words = ("--backend", "tests.support.backends.clean:Clean", "--layer", f"{LAYERS}:Right")
    done = replay(saved(tmp_path, ONE_REPLAY), *words)
    assert done.returncode == PASSES, done.stdout
    assert "methods of the layer, calls judged: topk_indices " in done.stdout
