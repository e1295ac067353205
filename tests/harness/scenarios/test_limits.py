"""What a backend or a layer is made for: how it says so, what is drawn then, and what is said to be left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.scenarios.limits import BACKEND_FIELDS, EVERYTHING, LAYER_FIELDS, Limits, declared, modes_of
from nsa_oracle.harness.scenarios.regime import Regime
from nsa_oracle.harness.scenarios.scales import LARGE_LAYER, SMALL, SMALL_LAYER, Scale, restricted
from nsa_oracle.harness.scenarios.scenario import (
    Accept,
    Capture,
    Drive,
    Eager,
    Finish,
    Inputs,
    IntDtype,
    Join,
    Layer,
    PageLayout,
    Replay,
    Scenario,
    Setup,
)
from nsa_oracle.harness.scenarios.strategies import scenarios
from nsa_oracle.harness.search import drawing
from nsa_oracle.harness.search.explore import explore
from nsa_oracle.harness.search.survey import Survey
from nsa_oracle.harness.subjects.default import optimized_backend
from nsa_oracle.harness.subjects.subject import SCALES, Subject
from nsa_oracle.reference.types import (
    AttentionCaches,
    AttentionConfig,
    AttentionInputs,
    BackendConfig,
    ForwardMode,
    KVCacheDtype,
    StepSemantics,
)

DECODE, VERIFY, EXTEND, IDLE = ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.EXTEND, ForwardMode.IDLE


def limits(**sizes: Sequence[Any]) -> Limits:
    return declared(SimpleNamespace(sizes=sizes), LAYER_FIELDS, "neither a layer nor its setup")


def only(*modes: ForwardMode) -> Limits:
    return Limits(modes=tuple(mode for mode in ForwardMode if mode in modes))


def drawn(scale: Scale, count: int = 25) -> list[Scenario]:
    return drawing.drawn(scenarios(scale), count, seed=0)


def values(scenario: Scenario) -> dict[str, Any]:
    setup = scenario.setup
    return {**dict(setup), **dict(setup.inputs), **dict(setup.layer or ())}


# What is declared


def test_nothing_declared_is_everything() -> None:
    assert declared(object(), LAYER_FIELDS, "nobody") == EVERYTHING
    assert EVERYTHING.modes == tuple(ForwardMode)


def test_every_field_of_a_case_can_be_named() -> None:
    assert set(BACKEND_FIELDS) == {*Setup.model_fields, *Inputs.model_fields} - {"inputs", "layer"}
    assert set(LAYER_FIELDS) == {*BACKEND_FIELDS, *Layer.model_fields}


def test_values_may_be_given_as_a_file_has_them() -> None:
    found = limits(kv_cache_dtype=["fp8"], page_size=range(1, 17), drive=(Drive.SINGLE_STEP,), strided=[True])
    assert found.sizes == {
        "kv_cache_dtype": (KVCacheDtype.FP8,),
        "page_size": tuple(range(1, 17)),
        "drive": (Drive.SINGLE_STEP,),
        "strided": (True,),
    }
    modes = declared(SimpleNamespace(modes=["TARGET_VERIFY", DECODE]), LAYER_FIELDS, "nobody").modes
    assert modes == (DECODE, VERIFY)


MALFORMED = {
    "a list": ({"sizes": [1, 2]}, "sizes must map fields to allowed values"),
    "a method": ({"sizes": len}, "sizes must map fields to allowed values"),
    "a number": ({"sizes": {"page_size": 64}}, "'page_size' must have a list or tuple of allowed values, not 64"),
    "text": ({"sizes": {"kv_cache_dtype": "fp8"}}, "'kv_cache_dtype' must have a list or tuple of allowed values"),
    "a mapping of a mapping": ({"sizes": {"page_size": {64: 1}}}, "'page_size' must have a list or tuple"),
    "no value": ({"sizes": {"page_size": ()}}, "'page_size' allows no value at all"),
    "unknown field": ({"sizes": {"colour": ("red",)}}, "sizes: nobody has 'colour'; there are page_size, "),
    "unknown field that is no text": ({"sizes": {7: (1,)}}, "sizes: nobody has '7'"),
    "a record of fields": ({"sizes": {"inputs": ({},)}}, "name the fields of 'inputs' themselves"),
    "another type": ({"sizes": {"page_size": ("big",)}}, "'page_size' cannot be big: Input should be a valid integer"),
    "a bool for a number": ({"sizes": {"num_heads": (True,)}}, "'num_heads' cannot be True"),
    "a number for a bool": ({"sizes": {"strided": (1,)}}, "'strided' cannot be 1"),
    "out of range": ({"sizes": {"num_steps": (9,)}}, "'num_steps' cannot be 9"),
    "unknown member": ({"sizes": {"regime": ("easy",)}}, "'regime' cannot be easy; choose from dominating, equal, "),
    "endless": ({"sizes": {"x" * 5000: (1,)}}, "nobody has 'xxx"),
    "several lines": ({"sizes": {"page_size": ("a\nb",)}}, "'page_size' cannot be a\\nb"),
    "modes as text": ({"modes": "DECODE"}, "modes must be a list or tuple of modes, not DECODE"),
    "unknown mode": ({"modes": ("PREFILL",)}, "there is no PREFILL; choose from EXTEND, DECODE, "),
    "mode that is no name": ({"modes": ([],)}, "there is no []"),
    "no mode": ({"modes": ()}, "modes allows no mode at all"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_declaration_is_refused_in_one_line(name: str) -> None:
    attributes, cause = MALFORMED[name]
    with pytest.raises(ValueError, match=r".") as caught:
        declared(SimpleNamespace(**attributes), LAYER_FIELDS, "nobody")
    message = str(caught.value)
    assert cause in message
    assert len(message.splitlines()) == 1
    assert len(message) < 800


def test_both_of_two_must_allow() -> None:
    one = Limits({"page_size": (16, 64), "num_heads": (2,)}, (DECODE, VERIFY))
    other = Limits({"page_size": (64, 32), "index_topk": (4,)}, (VERIFY, EXTEND))
    assert one & other == Limits({"page_size": (64,), "num_heads": (2,), "index_topk": (4,)}, (VERIFY,))
    assert one & EVERYTHING == one
    assert EVERYTHING & one == one


# What does not fit


CASE = Scenario(
    setup=Setup(
        page_size=16,
        max_context_len=33,
        index_topk=8,
        num_steps=2,
        num_draft_tokens=2,
        pool_size=2,
        inputs=Inputs(strided=True),
        layer=Layer(num_heads=3),
    ),
    events=(
        Capture(mode=DECODE, buckets=(2,)),
        Join(seq_len=3),
        Replay(mode=DECODE),
        Eager(mode=VERIFY),
        Finish(request=0),
    ),
)


def test_misfit_is_named() -> None:
    assert EVERYTHING.misfit(CASE) is None
    assert limits(page_size=(16, 64), num_heads=(3,), strided=(True,)).misfit(CASE) is None
    assert limits(page_size=(64,)).misfit(CASE) == "page_size 16"
    assert limits(num_heads=(2,)).misfit(CASE) == "num_heads 3"
    assert limits(strided=(False,)).misfit(CASE) == "strided True"
    assert limits(regime=("random",)).misfit(CASE) == "regime dominating"
    assert only(DECODE, VERIFY).misfit(CASE) is None
    assert only(DECODE).misfit(CASE) == "mode TARGET_VERIFY"
    assert only(VERIFY).misfit(CASE) == "mode DECODE"


def test_layer_that_is_not_there_has_no_size() -> None:
    alone = CASE.model_copy(update={"setup": CASE.setup.model_copy(update={"layer": None})})
    assert limits(num_heads=(2,)).misfit(alone) is None


def test_decode_of_nobody_is_idle() -> None:
    empty = CASE.model_copy(update={"events": (*CASE.events, Replay(mode=DECODE))})
    assert modes_of(empty) == [DECODE, DECODE, VERIFY, IDLE]
    assert only(DECODE, VERIFY).misfit(empty) == "mode IDLE"


def test_layers_limits_do_not_concern_metadata_alone() -> None:
    subject = Subject(optimized_backend, layer_limits=limits(page_size=(64,)))
    assert subject.misfit(CASE) == "page_size 16"
    alone = CASE.model_copy(update={"setup": CASE.setup.model_copy(update={"layer": None})})
    assert subject.misfit(alone) is None
    assert Subject(optimized_backend, limits=limits(page_size=(64,))).misfit(alone) == "page_size 16"


# What is drawn


@pytest.mark.parametrize("name", LAYER_FIELDS)
@pytest.mark.parametrize("scale", [SMALL_LAYER, LARGE_LAYER], ids=["small", "large"])
def test_every_field_restricts_what_is_drawn(name: str, scale: Scale) -> None:
    """To its last value, which is none that anything falls back to."""
    choices = scale.drawn()[name]
    for value in {choices[-1], choices[0]}:
        found = {values(scenario)[name] for scenario in drawn(restricted(scale, limits(**{name: (value,)})), 6)}
        assert found == {value}


def test_what_is_drawn_without_limits_is_listed() -> None:
    listed = SMALL_LAYER.drawn()
    for scenario in drawn(SMALL_LAYER, 40):
        assert all(value in listed[name] for name, value in values(scenario).items() if name in listed)
    assert set(listed) == set(LAYER_FIELDS)
    assert set(SMALL.drawn()) == set(BACKEND_FIELDS)


def test_fields_that_depend_on_others_are_restricted_together() -> None:
    """Eight drafts over eight steps are more rows than are drawn otherwise, and no row exceeds 2,048 keys of 20."""
    few = limits(num_steps=(3,), num_draft_tokens=(8,), max_context_len=(20,), index_topk=(1030,), page_size=(64,))
    for scenario in drawn(restricted(SMALL_LAYER, few), 10):
        assert few.misfit(scenario) is None


@pytest.mark.parametrize("mode", ForwardMode)
def test_one_mode_alone(mode: ForwardMode) -> None:
    met: list[ForwardMode] = []
    for scenario in drawn(restricted(SMALL, only(mode)), 40):
        assert only(mode).misfit(scenario) is None
        met += modes_of(scenario)
    assert set(met) == {mode}
    replayed = mode not in (EXTEND, IDLE)
    assert any(isinstance(event, Replay) for s in drawn(restricted(SMALL, only(mode)), 40) for event in s.events) == (
        replayed
    )


def test_calls_of_other_modes_are_left_out_and_all_else_happens() -> None:
    for scenario in drawn(restricted(SMALL, only(DECODE, VERIFY)), 40):
        assert set(modes_of(scenario)) <= {DECODE, VERIFY}
    kinds = {type(event) for s in drawn(restricted(SMALL, only(DECODE, VERIFY)), 40) for event in s.events}
    assert kinds >= {Capture, Join, Finish, Accept, Replay, Eager}


def test_nothing_to_draw_is_refused_in_one_line() -> None:
    for scale, left, cause in (
        (SMALL_LAYER, limits(num_heads=(7,)), "num_heads may be 7, and is one of 1, 2, 3, 16"),
        (SMALL, limits(max_context_len=(128,)), "max_context_len may be 128, and is one of 20, 33, "),
        (LARGE_LAYER, limits(num_heads=(128,), kv_lora_rank=(64,)), "no layer that is drawn here has all of the sizes"),
        (SMALL, only(DECODE) & only(VERIFY), "no mode in common"),
    ):
        with pytest.raises(ValueError, match=r".") as caught:
            restricted(scale, left)
        assert cause in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_far_slots_begin_at_the_far_end() -> None:
    far = restricted(LARGE_LAYER, limits(far_slots=(True,)))
    assert {scenario.setup.page_layout for scenario in drawn(far)} == {PageLayout.DESCENDING, PageLayout.SHUFFLED}
    as_told = restricted(LARGE_LAYER, limits(far_slots=(True,), page_layout=("contiguous",)))
    assert {scenario.setup.page_layout for scenario in drawn(as_told, 5)} == {PageLayout.CONTIGUOUS}


def test_no_more_slots_are_drawn_than_content_can_tell_apart() -> None:
    """The largest pool of the longest tables has more slots than the narrowest RoPE part has codes."""
    widest = {"max_context_len": (4100,), "page_size": (64,), "qk_rope_head_dim": (16,), "regime": ("dominating",)}
    found = drawn(restricted(LARGE_LAYER, limits(**widest)), 30)
    assert max(scenario.setup.pool_size for scenario in found) == 7


def test_sizes_that_exclude_each_other_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, tmp_path: Path
) -> None:
    monkeypatch.setitem(SCALES, (device.type, True), LARGE_LAYER)
    sizes = {"max_context_len": (4100,), "page_size": (64,), "qk_rope_head_dim": (16,), "regime": ("dominating",)}
    subject = Subject(optimized_backend, layer_limits=limits(**sizes, pool_size=(8, 9, 10)))
    with pytest.raises(BackendError, match=r"^no case that is drawn here has all of the sizes that are declared at "):
        explore(subject, device, 5, 0, tmp_path, with_layer=True)
    with pytest.raises(BackendError, match=r"^no case that is drawn here has all of the sizes that are declared at "):
        Survey(subject, device).run(5, 0)


# What is said to be left out


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


def test_enumerations_are_told_by_their_values() -> None:
    assert limits(step_semantics=(StepSemantics.SHARED,)).misfit(
        CASE.model_copy(update={"setup": CASE.setup.model_copy(update={"step_semantics": StepSemantics.ADVANCING})})
    ) == ("step_semantics advancing")
    assert limits(seq_lens=(IntDtype.INT64,)).excluded(SMALL.drawn()) == ["seq_lens int32"]


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
