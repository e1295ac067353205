"""Errors of the harness's own classes, raised by judged code: findings of its methods, refusals of its factories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa_oracle.harness.errors import BackendError, ScenarioError
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.reference.layer import SparseAttention as ReferenceLayer
from nsa_oracle.reference.types import AttentionConfig, BackendConfig
from tests.support.backends.clean import Clean
from tests.support.layer_cases import BACKEND, WITH_LAYER
from tests.support.metadata_cases import DECODE, VERIFY, factory_of, one_replay

CASE, OTHER_CASE = one_replay(DECODE), one_replay(VERIFY)
ERRORS: dict[type[Exception], Callable[[], Exception]] = {
    BackendError: lambda: BackendError("mine"),
    ScenarioError: lambda: ScenarioError("mine"),
    OracleFailure: lambda: OracleFailure(OTHER_CASE, Finding(Kind.VALUE, "x", "", ""), 0),
}
METHODS = {
    "init_cuda_graph_state": None,
    "init_forward_metadata_capture_cuda_graph": 0,
    "init_forward_metadata_replay_cuda_graph": 2,
}


def raising(kind: type[Exception]) -> Callable[..., Any]:
    def method(*_: Any, **__: Any) -> None:
        raise ERRORS[kind]()

    return method


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("method", METHODS)
def test_an_error_of_the_harness_that_a_method_raises_is_a_finding(
    method: str, kind: type[Exception], device: torch.device
) -> None:
    backend = type("Raises", (Clean,), {method: raising(kind)})
    with pytest.raises(OracleFailure) as caught:
        judge(CASE, factory_of(backend), device)
    finding = caught.value.finding
    assert (finding.kind, finding.field, caught.value.event) == (Kind.CRASH, kind.__name__, METHODS[method])
    assert "test_raised_errors.py" in finding.place
    assert caught.value.scenario == CASE


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_of_the_harness_that_a_layer_raises_is_a_finding(kind: type[Exception], device: torch.device) -> None:
    layer = type("Raises", (ReferenceLayer,), {"forward": raising(kind)})
    with pytest.raises(OracleFailure) as caught:
        judge(WITH_LAYER, BACKEND, device, layer_factory=layer)
    finding = caught.value.finding
    assert (finding.kind, finding.field) == (Kind.LAYER_CRASH, kind.__name__)
    assert "test_raised_errors.py" in finding.place
    assert caught.value.scenario == WITH_LAYER


@pytest.mark.parametrize("kind", [BackendError, ScenarioError])
def test_a_factory_may_say_that_it_cannot_be_judged(kind: type[Exception], device: torch.device) -> None:
    def factory(config: BackendConfig, pool: torch.Tensor, _: tuple[str, ...]) -> Any:
        raise ERRORS[kind]()

    def layer_factory(config: BackendConfig, attention: AttentionConfig) -> Any:
        raise ERRORS[kind]()

    with pytest.raises(kind, match=r"^mine$"):
        judge(CASE, factory, device)
    with pytest.raises(kind, match=r"^mine$"):
        judge(CASE, factory_of(type("Refuses", (Clean,), {"__init__": raising(kind)})), device)
    with pytest.raises(kind, match=r"^mine$"):
        judge(WITH_LAYER, BACKEND, device, layer_factory=layer_factory)


def test_a_failure_is_not_for_a_factory_to_raise(device: torch.device) -> None:
    with pytest.raises(OracleFailure) as caught:
        judge(CASE, factory_of(type("Fails", (Clean,), {"__init__": raising(OracleFailure)})), device)
    assert caught.value.scenario == CASE
    assert (caught.value.finding.field, caught.value.event) == ("OracleFailure", None)
