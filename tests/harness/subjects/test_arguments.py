"""Mistakes in a call of ``judge`` are told in one line: none is a finding, and none is green."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from docs.examples.my_layer import MyAttention
from nsa_oracle.harness import BackendError, OracleFailure, ScenarioError, judge
from nsa_oracle.harness.fields import FIELDS, HOST_SCALARS
from nsa_oracle.harness.scenarios.scenario import Capture, Event, Join
from nsa_oracle.harness.subjects.default import optimized_layer
from nsa_oracle.reference.layer import SparseAttention
from nsa_oracle.reference.multi_step import MultiStepBackend
from nsa_oracle.reference.types import BackendConfig
from tests.support.backends import declared
from tests.support.backends.in_graph import SyncsInCapture
from tests.support.layer_cases import WITH_LAYER
from tests.support.metadata_cases import DECODE, VERIFY, case, one_replay

CPU, CASE = torch.device("cpu"), one_replay(DECODE)
SAVED = "tests/cases/stale-host-mirror-is-not-read.json"
BUILT = MultiStepBackend(CASE.setup.backend_config(), torch.zeros(3, 16, dtype=torch.int32))
GIVE_A_BACKEND, GIVE_A_LAYER = "give a callable of (config, req_to_token)", "give a callable of (config, attention)"
OUT_OF_TESTS = "names are for judged and oracle.judge"


def all_unjudged(config: BackendConfig, req_to_token: torch.Tensor) -> Any:
    return MultiStepBackend(config, req_to_token)


all_unjudged.unjudged = {"*": [*HOST_SCALARS, *(field.name for field in FIELDS)]}  # type: ignore[attr-defined]


class LosesTheFirst(MyAttention):
    def sparse_mla(self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor) -> Any:
        return super().sparse_mla(q, kv_cache, torch.where(indices == indices[:, :1], -1, indices))


@pytest.mark.parametrize("layer", [SparseAttention, MyAttention, optimized_layer])
def test_a_layer_that_a_case_does_not_have_is_refused(layer: Any) -> None:
    with pytest.raises(BackendError) as caught:
        judge(CASE, MultiStepBackend, CPU, layer_factory=layer)
    told = "the case has no layer, so it would not be judged; give a case with one, or leave layer_factory out"
    assert str(caught.value) == f"layer '{layer.__name__}': {told}"


@pytest.mark.parametrize("events", [(), (Join(seq_len=3),)], ids=["nothing", "a request"])
def test_a_case_in_which_nothing_is_called_is_refused(events: tuple[Event, ...]) -> None:
    told = r"^scenario: it has no capture, no replay and no eager call, so nothing would be judged"
    with pytest.raises(ScenarioError, match=told):
        judge(case(*events), MultiStepBackend, CPU)


def test_a_capture_alone_is_judged() -> None:
    """What cannot be captured is found before any call."""
    captured = case(Capture(mode=DECODE, buckets=(1,)))
    assert judge(captured, MultiStepBackend, CPU).cases == 1
    with pytest.raises(OracleFailure, match="capture rejected"):
        judge(captured, SyncsInCapture, CPU)


def test_a_case_of_which_nothing_is_compared_is_refused() -> None:
    with pytest.raises(BackendError, match=r"^no cell of any field was compared; declare fewer fields as unjudged or"):
        judge(CASE, all_unjudged, CPU)


@pytest.mark.parametrize(
    ("given", "kind", "told"),
    [
        (None, TypeError, f"factory is None; {GIVE_A_BACKEND}"),
        ("my_backend:MyBackend", TypeError, f"factory is the name 'my_backend:MyBackend'; {GIVE_A_BACKEND}"),
        ("my_backend:MyBackend", TypeError, OUT_OF_TESTS),
        (BUILT, TypeError, f"factory is an object of class MultiStepBackend; {GIVE_A_BACKEND}, such as a class"),
        (torch, TypeError, "factory is the module torch; give"),
        (lambda: BUILT, BackendError, "cannot be called with (config, req_to_token): too many positional arguments"),
        (lambda a, b, c, d: BUILT, BackendError, "missing a required argument: 'c'"),
        (lambda config, pool: None, BackendError, "returned None; return the backend"),
        (lambda config, pool, switches: None, BackendError, "returned None; return the backend"),
        (lambda config, pool, switches: object(), BackendError, "lacks object.init_forward_metadata"),
        (type("Wrong", (MultiStepBackend,), {"waivers": 3}), BackendError, "backend 'Wrong': waivers must be a list"),
    ],
)
def test_what_builds_no_backend_is_refused(given: Any, kind: type[Exception], told: str) -> None:
    refused(kind, told, CASE, given, CPU)


@pytest.mark.parametrize(
    ("given", "kind", "told"),
    [
        ("my_layer:MyLayer", TypeError, f"layer_factory is the name 'my_layer:MyLayer'; {GIVE_A_LAYER}"),
        (SimpleNamespace(forward=None), TypeError, "layer_factory is an object of class SimpleNamespace; give"),
        (3, TypeError, "layer_factory is an object of class int; give"),
        (lambda config: None, BackendError, "cannot be called with (config, attention): too many positional arguments"),
        (lambda config, attention: None, BackendError, "returned None; return the layer"),
        (lambda config, attention: MyAttention, BackendError, "returned the class MyAttention, not an instance of it"),
        (lambda config, attention: object(), BackendError, "object has none of the methods store_cache, "),
        (type("Odd", (SparseAttention,), {"weaker": {"output": 1}}), BackendError, "layer 'Odd': weaker: 'output'"),
    ],
)
def test_what_builds_no_layer_is_refused(given: Any, kind: type[Exception], told: str) -> None:
    refused(kind, told, WITH_LAYER, MultiStepBackend, CPU, None, given)


@pytest.mark.parametrize(
    ("given", "kind", "told"),
    [
        (None, TypeError, "device is None; give a torch.device, or 'cpu' or 'cuda'"),
        ("gpu", BackendError, "device: there is no 'gpu'; use 'cpu' or 'cuda'"),
        ("meta", BackendError, "device meta: nothing can be judged there; use cpu or cuda"),
        (torch.device("meta"), BackendError, "device meta: nothing can be judged there; use cpu or cuda"),
        ("cuda:99", BackendError, "device cuda:99: torch sees "),
    ],
)
def test_a_device_on_which_nothing_can_be_judged_is_refused(given: Any, kind: type[Exception], told: str) -> None:
    refused(kind, told, CASE, MultiStepBackend, given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("given", ["cuda", torch.device("cuda")])
def test_a_gpu_that_is_not_there_is_refused(given: Any) -> None:
    refused(BackendError, "device cuda: torch sees no CUDA device here; use cpu", CASE, MultiStepBackend, given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (SAVED, f"scenario is a path, {SAVED}; give nsa_oracle.harness.load(path)"),
        (Path(SAVED), f"scenario is a path, {SAVED}; give nsa_oracle.harness.load(path)"),
        ([CASE], "scenario is an object of class list; give a nsa_oracle.harness.Scenario"),
        (None, "scenario is None; give a nsa_oracle.harness.Scenario"),
    ],
)
def test_what_is_no_scenario_is_refused(given: Any, told: str) -> None:
    refused(TypeError, told, given, MultiStepBackend, CPU)


def test_other_arguments_in_the_wrong_place_are_refused() -> None:
    refused(TypeError, "verdict must be a Verdict; it is of type type", CASE, MultiStepBackend, CPU, SparseAttention)
    refused(TypeError, "graphs must be True or False", WITH_LAYER, MultiStepBackend, CPU, None, optimized_layer, "no")


def refused(kind: type[Exception], told: str, *arguments: Any) -> None:
    with pytest.raises(kind) as caught:
        judge(*arguments)
    assert not isinstance(caught.value, OracleFailure)
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_device_may_be_given_by_its_name() -> None:
    assert judge(CASE, MultiStepBackend, "cpu").replays == 2


def test_a_layer_of_single_stages_is_completed() -> None:
    covered = judge(WITH_LAYER, MultiStepBackend, CPU, layer_factory=MyAttention).layers
    assert [*covered.calls] == ["sparse_mla"]
    assert not covered.never_called
    with pytest.raises(OracleFailure, match="out at step 0"):
        judge(WITH_LAYER, MultiStepBackend, CPU, layer_factory=LosesTheFirst)


def test_a_backend_of_several_roles_gets_their_names() -> None:
    assert judge(CASE, declared.Roles, CPU).replays == judge(one_replay(VERIFY), declared.Roles, CPU).replays == 2
