"""What a subject is made for: its backend's limits and its layer's, and what is left out because of them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch

from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.scenarios.regime import Regime
from nsa_oracle.harness.scenarios.scales import LARGE_LAYER
from nsa_oracle.harness.scenarios.scenario import (
    Layer,
)
from nsa_oracle.harness.subjects.default import optimized_backend
from nsa_oracle.harness.subjects.subject import Subject
from nsa_oracle.reference.types import (
    AttentionCaches,
    AttentionConfig,
    AttentionInputs,
    BackendConfig,
)
from tests.support.limits import CASE, limits
from tests.support.metadata_cases import DECODE, VERIFY


def test_layers_limits_do_not_concern_metadata_alone() -> None:
    subject = Subject(optimized_backend, layer_limits=limits(page_size=(64,)))
    assert subject.misfit(CASE) == "page_size 16"
    alone = CASE.model_copy(update={"setup": CASE.setup.model_copy(update={"layer": None})})
    assert subject.misfit(alone) is None
    assert Subject(optimized_backend, limits=limits(page_size=(64,))).misfit(alone) == "page_size 16"


def test_what_is_left_out_is_told() -> None:
    device = torch.device("cpu")
    assert Subject(optimized_backend).not_judged(device) == []
    told = Subject(
        optimized_backend,
        limits=dataclasses.replace(limits(page_size=(16, 64)), modes=(DECODE, VERIFY)),
        layer_limits=limits(kv_cache_dtype=("fp8",), regime=(Regime.RANDOM,)),
    ).not_judged(device)
    assert told == [
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
