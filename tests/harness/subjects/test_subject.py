"""What a subject is made for: its backend's limits and its layer's, and what is left out because of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from nsa_oracle.harness.errors import BackendError, ScenarioError
from nsa_oracle.harness.scenarios.scales import LARGE_LAYER
from nsa_oracle.harness.scenarios.setup import Layer, Regime
from nsa_oracle.harness.subjects.default import check_optimizations, optimized_backend
from nsa_oracle.harness.subjects.subject import Subject, optimized_subject
from nsa_oracle.reference.types import AttentionCaches, AttentionConfig, AttentionInputs, BackendConfig, StepSemantics
from tests.support.limits import CASE, limits
from tests.support.metadata_cases import DECODE, VERIFY


def test_layers_limits_do_not_concern_metadata_alone() -> None:
    subject = Subject(optimized_backend, layer_limits=limits(page_size=(64,)))
    assert subject.misfit(CASE) == "page_size 16"
    alone = CASE.model_copy(update={"setup": CASE.setup.model_copy(update={"layer": None})})
    assert subject.misfit(alone) is None
    assert Subject(optimized_backend, limits=limits(page_size=(64,))).misfit(alone) == "page_size 16"


def test_what_is_left_out_is_reported() -> None:
    device = torch.device("cpu")
    assert Subject(optimized_backend).not_judged(device) == []
    reported = Subject(
        optimized_backend,
        limits=dataclasses.replace(limits(page_size=(16, 64)), modes=(DECODE, VERIFY)),
        layer_limits=limits(kv_cache_dtype=("fp8",), regime=(Regime.RANDOM,)),
    ).not_judged(device)
    assert reported == [
        "page_size 1, 32",
        "modes EXTEND, IDLE, DRAFT_EXTEND, DRAFT_EXTEND_V2",
        "kv_cache_dtype bf16 (with a layer)",
        "regime dominating, equal, lattice (with a layer)",
    ]


class WideStore:
    """A layer with a stage of its own, for a rank that no attention of ours is made for."""

    sizes: ClassVar[dict[str, tuple[int, ...]]] = {"kv_lora_rank": (64, 320)}

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        pass

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        pass


class WideAttention(WideStore):
    def sparse_mla(self, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError


class WideOnly(WideStore):
    sizes: ClassVar[dict[str, tuple[int, ...]]] = {"kv_lora_rank": (320,)}


def test_attention_that_a_layer_lacks_brings_its_own_sizes(device: torch.device) -> None:
    setup = CASE.setup.model_copy(update={"layer": Layer(kv_lora_rank=320)})
    case = CASE.model_copy(update={"setup": setup})
    assert Subject.load(None, f"{__name__}:WideStore", device).misfit(case) == "kv_lora_rank 320"
    assert Subject.load(None, f"{__name__}:WideAttention", device).misfit(case) is None
    with pytest.raises(BackendError) as caught:
        Subject.load(None, f"{__name__}:WideOnly", device)
    assert str(caught.value) == (
        f"layer '{__name__}:WideOnly' has kv_lora_rank 320 and no sparse_mla; "
        "that of optimized/ is made for 64, 128, 256, 512"
    )


@pytest.mark.parametrize("size", [{"kv_lora_rank": 320}, {"qk_rope_head_dim": 48}])
def test_sizes_that_attention_of_optimized_is_not_made_for(size: dict[str, int], device: torch.device) -> None:
    """They are no failure of it, and none of them is drawn."""
    subject = Subject.load(None, None, device)
    setup = CASE.setup.model_copy(update={"layer": Layer(**size)})
    ((name, value),) = size.items()
    assert subject.misfit(CASE.model_copy(update={"setup": setup})) == f"{name} {value}"
    assert subject.not_judged(torch.device("cpu")) == []
    assert not subject.layer_limits.excluded(LARGE_LAYER.drawn())


UNKNOWN_SWITCHES = ["teleport", "a\nb", "\r", "\u2028", "x" * 5000, "\x1b[31mred"]


@pytest.mark.parametrize("name", UNKNOWN_SWITCHES)
def test_unknown_switch_is_refused_in_one_line(name: str) -> None:
    """Its name comes from a file."""
    scenario, file = CASE.model_copy(update={"optimizations": ("one_launch", name)}), Path("case.json")
    with pytest.raises(ScenarioError) as caught:
        optimized_subject().check(scenario, file)
    message = str(caught.value)
    assert message.startswith("case.json: optimizations: unknown optimization '")
    assert "\x1b" not in message
    assert len(message.splitlines()) == 1
    assert len(message) < 300


@pytest.mark.parametrize(
    ("names", "changes", "cause"),
    [
        (("in_graph",), {}, "in_graph"),
        (("aliased_steps",), {"step_semantics": StepSemantics.ADVANCING}, "aliased_steps"),
    ],
)
def test_switches_that_do_not_go_together_are_refused(
    names: tuple[str, ...], changes: dict[str, object], cause: str
) -> None:
    scenario = CASE.model_copy(update={"optimizations": names, "setup": CASE.setup.model_copy(update=changes)})
    with pytest.raises(ScenarioError, match=rf"^case\.json: optimizations: .*{cause}"):
        optimized_subject().check_switches(scenario, Path("case.json"))
    with pytest.raises(ScenarioError, match=rf"^optimizations: .*{cause}"):
        check_optimizations(names, scenario.setup.backend_config())


def test_switches_of_a_case_do_not_concern_a_backend_that_has_none() -> None:
    scenario = CASE.model_copy(update={"optimizations": ("teleport",)})
    Subject(optimized_backend).check(scenario, Path("case.json"))
