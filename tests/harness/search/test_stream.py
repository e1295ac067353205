"""The cases of a run: each visits what it is drawn for, whatever the seed and whoever asks for it."""

from __future__ import annotations

import pytest

from nsa_oracle.harness.scenarios.classes import LAYER_CLASSES, LONG_PREFILL, all_classes
from nsa_oracle.harness.scenarios.coverage import classes_of
from nsa_oracle.harness.scenarios.goals import PERIODS
from nsa_oracle.harness.scenarios.limits import Limits
from nsa_oracle.harness.scenarios.scales import LARGE, LARGE_LAYER, SMALL, SMALL_LAYER, Scale, restricted
from nsa_oracle.harness.scenarios.scenario import Eager, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Drive
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.harness.search.drawing import PROFILES, SHARDS
from nsa_oracle.harness.search.stream import CaseStream, Drawn
from nsa_oracle.harness.subjects.default import OPTIMIZED_SWITCHES
from nsa_oracle.reference.types import ForwardMode, StepSemantics
from tests.support.limits import limits, only
from tests.support.metadata_cases import DECODE, EXTEND, IDLE, VERIFY

DEV = PROFILES["dev"]


def stream(scale: Scale, count: int, seed: int = 0) -> list[Drawn]:
    return list(CaseStream(scale, OPTIMIZED_SWITCHES, seed).cases(range(count)))


def calls(scenario: Scenario) -> list[tuple[ForwardMode, int]]:
    """Mode and number of requests of each call."""
    world, found = World(scenario, 0), []
    for event in scenario.events:
        batch = world.apply(event)
        if batch is not None:
            found += [(batch.mode, batch.size)] * (event.times if isinstance(event, Replay) else 1)
    return found


@pytest.mark.parametrize("seed", [0, 1, 1 << 47])
@pytest.mark.parametrize(
    "scale", [SMALL, LARGE, SMALL_LAYER, LARGE_LAYER], ids=["small", "large", "layer", "large layer"]
)
def test_dev_visits_every_class(scale: Scale, seed: int) -> None:
    visited = set[str]()
    for drawn in stream(scale, DEV.layer_cases if scale.layers else DEV.cases, seed):
        visited |= classes_of(drawn.scenario)
        assert set(drawn.goal.names) <= classes_of(drawn.scenario), "each case visits what it was drawn for"
    wanted = LAYER_CLASSES if scale.layers else set(all_classes(OPTIMIZED_SWITCHES)) - set(LAYER_CLASSES)
    assert visited >= set(wanted)
    assert visited <= set(all_classes(OPTIMIZED_SWITCHES))


def test_a_case_depends_on_its_number_and_its_seed_alone() -> None:
    whole = [drawn.scenario for drawn in stream(SMALL, 2 * SHARDS)]
    for shard in (0, 5):
        share = CaseStream(SMALL, OPTIMIZED_SWITCHES, 0).cases(PROFILES["smoke"].share(shard, with_layer=False))
        assert [drawn.scenario for drawn in share] == whole[shard::SHARDS]
    assert not {drawn.scenario for drawn in stream(SMALL, 2 * SHARDS, seed=1)} & set(whole)
    assert len(set(whole)) == len(whole)


def test_shards_divide_the_cases() -> None:
    for profile in PROFILES.values():
        for with_layer, count in ((False, profile.cases), (True, profile.layer_cases)):
            shares = [number for shard in range(SHARDS) for number in profile.share(shard, with_layer)]
            assert sorted(shares) == list(range(count))


@pytest.mark.parametrize(("scale", "rounds"), [(SMALL, 3), (SMALL_LAYER, 8)], ids=["metadata", "layer"])
def test_few_batches_are_empty(scale: Scale, rounds: int) -> None:
    made = [call for drawn in stream(scale, rounds * PERIODS[bool(scale.layers)]) for call in calls(drawn.scenario)]
    assert 0 < sum(size == 0 for _, size in made) < len(made) / 8


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("scale", "most"), [(SMALL, 65), (LARGE, 65)], ids=["small", "large"])
def test_dev_has_more_requests_than_two_warps_have_lanes(scale: Scale, most: int, seed: int) -> None:
    """In a prefill and in a graph of each mode, and then fewer than one warp has."""
    throngs = [drawn.scenario for drawn in stream(scale, DEV.cases, seed) if drawn.scenario.setup.pool_size > most]
    assert len(throngs) == 1
    sizes: dict[ForwardMode, set[int]] = {}
    for mode, size in calls(throngs[0]):
        sizes.setdefault(mode, set()).add(size)
    for mode in (DECODE, VERIFY, ForwardMode.DRAFT_EXTEND, ForwardMode.DRAFT_EXTEND_V2):
        assert max(sizes[mode]) >= 33
        assert len(sizes[mode]) > 1
    assert max(sizes[EXTEND]) >= 2


def test_limits_on_the_pool_leave_the_requests_that_fit() -> None:
    small = restricted(SMALL, limits(pool_size=tuple(range(1, 15))))
    assert all(drawn.scenario.setup.pool_size < 15 for drawn in stream(small, DEV.cases))
    assert max(size for drawn in stream(small, DEV.cases) for _, size in calls(drawn.scenario)) > 8


def test_a_layer_is_drawn_without_a_schedule_unless_the_backend_has_one() -> None:
    assert {drawn.scenario.setup.paged_mqa_num_sms for drawn in stream(SMALL_LAYER, 20)} == {0}
    required = restricted(SMALL_LAYER, limits(paged_mqa_num_sms=(3, 6, 132)))
    assert {drawn.scenario.setup.paged_mqa_num_sms for drawn in stream(required, 20)} == {3, 6}


def test_dev_prefills_through_the_layer() -> None:
    prefills = [
        event
        for drawn in stream(SMALL_LAYER, DEV.layer_cases)
        for event, (mode, size) in zip(_calling(drawn.scenario), calls(drawn.scenario), strict=False)
        if mode is EXTEND and size and isinstance(event, Eager)
    ]
    assert len(prefills) >= 3


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("scale", "declared"),
    [
        (SMALL_LAYER, limits()),
        (LARGE_LAYER, limits()),
        (SMALL_LAYER, limits(kv_lora_rank=(512,), num_heads=(20,), num_steps=(2,))),
        (SMALL_LAYER, limits(max_context_len=(1100,))),
    ],
    ids=["small", "large", "large heads", "wide"],
)
def test_dev_has_a_long_prefill_among_few_rows(scale: Scale, declared: Limits, seed: int) -> None:
    found = []
    for drawn in stream(restricted(scale, declared), DEV.layer_cases, seed):
        if LONG_PREFILL in drawn.goal.names:
            world = World(drawn.scenario, 0)
            batches = [batch for event in drawn.scenario.events if (batch := world.apply(event)) is not None]
            found.append([batch.extend_lens for batch in batches if batch.mode is EXTEND])
    (prefills,) = found
    first, second = prefills[:2]
    assert max(first) >= min(scale.long_prefills) > 128
    assert len(first) > 1
    assert sum(second) <= 3 * len(first)


def _calling(scenario: Scenario) -> list[Replay | Eager]:
    return [
        event
        for event in scenario.events
        if isinstance(event, Replay | Eager)
        for _ in range(event.times if isinstance(event, Replay) else 1)
    ]


def test_a_schedule_that_stays_as_captured_is_drawn_for() -> None:
    """A defect that was shipped: N > 3, all steps refreshed together, a paged-MQA schedule, more than one segment."""
    (drawn,) = CaseStream(SMALL, OPTIMIZED_SWITCHES, 0).cases([0])
    setup = drawn.scenario.setup
    assert setup.num_steps >= 4
    assert setup.drive is Drive.MULTI_STEP
    assert setup.paged_mqa_num_sms
    world = World(drawn.scenario, 0)
    batches = [batch for event in drawn.scenario.events if (batch := world.apply(event)) is not None]
    assert batches[0].mode is DECODE
    assert min(batches[0].seq_lens) > 256


def test_goals_that_exclude_each_other_under_the_limits_give_way() -> None:
    """Whatever is declared, cases are within it, and what can be reached is reached."""
    for scale, declared in (
        (SMALL, limits(page_size=(64,)) & only(DECODE, VERIFY)),
        (SMALL, only(EXTEND)),
        (SMALL, only(IDLE)),
        (SMALL, limits(page_size=(1,), pool_size=(1,), max_context_len=(20,), step_semantics=("shared",))),
        (SMALL_LAYER, limits(kv_lora_rank=(512,), regime=("random",), max_context_len=(33,))),
    ):
        for drawn in stream(restricted(scale, declared), PERIODS[bool(scale.layers)]):
            assert declared.misfit(drawn.scenario) is None
            if declared.sizes.get("step_semantics"):
                assert drawn.scenario.setup.step_semantics is StepSemantics.SHARED
