"""What is drawn within declared sizes and modes."""

from __future__ import annotations

import pytest

from nsa_oracle.harness.scenarios.limits import BACKEND_FIELDS, LAYER_FIELDS, modes_of
from nsa_oracle.harness.scenarios.scales import LARGE_LAYER, SMALL, SMALL_LAYER, Scale, restricted
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Finish, Join, Replay
from nsa_oracle.harness.scenarios.setup import Layer, PageLayout
from nsa_oracle.reference.types import ForwardMode
from tests.support.limits import drawn, limits, only, values
from tests.support.metadata_cases import DECODE, EXTEND, IDLE, VERIFY, case


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
        (SMALL_LAYER, limits(num_heads=(7,)), "num_heads may be 7, but is drawn from 1, 2, 3, 16"),
        (SMALL, limits(max_context_len=(128,)), "max_context_len may be 128, but is drawn from 20, 33, "),
        (
            LARGE_LAYER,
            limits(num_heads=(128,), kv_lora_rank=(64,)),
            "no layer drawn on this device has all of",
        ),
        (SMALL, only(DECODE) & only(VERIFY), "no mode in common"),
    ):
        with pytest.raises(ValueError, match=r".") as caught:
            restricted(scale, left)
        assert cause in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_kernels_that_may_be_interpreted_get_few_new_tokens_of_many_keys() -> None:
    def most(scale: Scale, rank: int, steps: int, keys: int) -> int | None:
        setup = case(num_steps=steps, index_topk=keys, max_context_len=1100, layer=Layer(kv_lora_rank=rank)).setup
        return scale.most_new_tokens_of(setup)

    assert [most(SMALL_LAYER, 512, 3, keys) for keys in (17, 64, 200, 1030)] == [16, 16, 6, 1]
    assert most(SMALL_LAYER, 512, 1, 1030) == 3
    assert most(SMALL_LAYER, 128, 3, 1030) == 16
    assert most(LARGE_LAYER, 512, 3, 1030) == 64
    assert SMALL.most_new_tokens_of(case().setup) is None


def test_far_slots_begin_at_the_far_end() -> None:
    far = restricted(LARGE_LAYER, limits(far_slots=(True,)))
    assert {scenario.setup.page_layout for scenario in drawn(far)} == {PageLayout.DESCENDING, PageLayout.SHUFFLED}
    as_reported = restricted(LARGE_LAYER, limits(far_slots=(True,), page_layout=("contiguous",)))
    assert {scenario.setup.page_layout for scenario in drawn(as_reported, 5)} == {PageLayout.CONTIGUOUS}


def test_no_more_slots_are_drawn_than_content_can_tell_apart() -> None:
    """The largest pool of the longest tables has more slots than the narrowest RoPE part has codes."""
    widest = {"max_context_len": (4100,), "page_size": (64,), "qk_rope_head_dim": (16,), "regime": ("dominating",)}
    found = drawn(restricted(LARGE_LAYER, limits(**widest)), 30)
    assert max(scenario.setup.pool_size for scenario in found) == 7
