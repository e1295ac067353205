"""The generators: what is drawn is within its scale, and failing cases shrink to something a person can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from nsa_oracle.harness.scenarios.calls_again import CALLS_AGAIN
from nsa_oracle.harness.scenarios.classes import all_classes
from nsa_oracle.harness.scenarios.coverage import classes_of
from nsa_oracle.harness.scenarios.goal import ANYTHING
from nsa_oracle.harness.scenarios.limits import Limits
from nsa_oracle.harness.scenarios.scales import LARGE, LARGE_LAYER, SMALL, SMALL_LAYER, Scale
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Finish, Join, Remap, Replay, Scenario
from nsa_oracle.harness.scenarios.script import Script
from nsa_oracle.harness.scenarios.setup import Mirror, Setup
from nsa_oracle.harness.scenarios.simplify import simplify
from nsa_oracle.harness.scenarios.situations import SITUATIONS
from nsa_oracle.harness.scenarios.strategies import scenarios
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.harness.subjects.default import OPTIMIZED_SWITCHES
from nsa_oracle.optimized.optimizations import OPTIMIZATION_NAMES
from nsa_oracle.reference.types import BackendConfig, ForwardMode, StepSemantics

DRAWN = {"small": 120, "large": 30, "small, layer": 40, "large, layer": 30}
ALL_CLASSES = all_classes(OPTIMIZED_SWITCHES)
SCALES = {"small": SMALL, "large": LARGE, "small, layer": SMALL_LAYER, "large, layer": LARGE_LAYER}
quick = settings(
    deadline=None, database=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


@cache
def reached(scale: str) -> Counter[str]:
    """How many of a fixed number of drawn scenarios visit each class."""
    seen: Counter[str] = Counter()

    @settings(quick, max_examples=DRAWN[scale])
    @given(scenarios(SCALES[scale], OPTIMIZED_SWITCHES))
    def sweep(scenario: Scenario) -> None:
        seen.update(classes_of(scenario))

    sweep()
    return seen


@pytest.mark.parametrize("scale", SCALES)
def test_classes_are_those_listed(scale: str) -> None:
    assert set(reached(scale)) <= set(ALL_CLASSES)
    assert len(set(ALL_CLASSES)) == len(ALL_CLASSES)


@pytest.mark.parametrize("name", ALL_CLASSES)
def test_no_class_holds_always(name: str) -> None:
    """A class that every scenario visits would say nothing about coverage."""
    assert reached("small")[name] < DRAWN["small"]


@settings(quick, max_examples=60)
@given(scenarios(LARGE, OPTIMIZED_SWITCHES))
def test_drawn_scenarios_are_within_scale(scenario: Scenario) -> None:
    within(scenario, LARGE)


@settings(quick, max_examples=60)
@given(scenarios(SMALL))
def test_without_switches_none_is_drawn(scenario: Scenario) -> None:
    within(scenario, SMALL)
    assert scenario.optimizations == ()


def within(scenario: Scenario, scale: Scale) -> None:
    assert scenario.setup.max_context_len in scale.max_context_lens
    setup = scenario.setup
    most = scale.most_requests(setup.max_context_len, setup.num_steps * setup.num_draft_tokens)
    assert len(World(scenario, 0).free_rows) <= most + 2
    buckets = [bs for event in scenario.events if isinstance(event, Capture) for bs in event.buckets]
    assert max(buckets) <= most
    assert set(scenario.optimizations) <= set(OPTIMIZATION_NAMES)
    assert scenario.setup.step_semantics is StepSemantics.SHARED or "aliased_steps" not in scenario.optimizations


@settings(quick, max_examples=150)
@given(scenarios(SMALL, OPTIMIZED_SWITCHES))
def test_drawn_switches_can_be_built(scenario: Scenario) -> None:
    from nsa_oracle.optimized.optimizations import Optimizations  # late: the plugin decides first how kernels run

    config: BackendConfig = scenario.setup.backend_config()
    Optimizations.from_names(scenario.optimizations).check(config)


def replays(scenario: Scenario) -> list[tuple[Replay, tuple[int, ...], tuple[int, ...]]]:
    """Each replay with its lengths and accept lengths."""
    world, found = World(scenario, 0), []
    for event in scenario.events:
        batch = world.apply(event)
        if batch is not None and isinstance(event, Replay):
            found.append((event, batch.seq_lens, batch.accept_lengths))
    return found


def no_accept_in_draft_extend(scenario: Scenario) -> bool:
    return any(r.mode is ForwardMode.DRAFT_EXTEND and 0 in accepts for r, _, accepts in replays(scenario))


def two_requests_in_one_replay(scenario: Scenario) -> bool:
    return any(len(lengths) >= 2 for _, lengths, _ in replays(scenario))


def long_request(scenario: Scenario) -> bool:
    return any(max(lengths, default=0) > 10 for _, lengths, _ in replays(scenario))


@pytest.mark.parametrize(
    ("predicate", "wanted"),
    [
        (no_accept_in_draft_extend, Counter({Join: 1, Accept: 1, Replay: 1})),
        (two_requests_in_one_replay, Counter({Join: 2, Replay: 1})),
    ],
)
def test_minimal_case_has_only_the_events_it_needs(
    predicate: Callable[[Scenario], bool], wanted: Counter[type]
) -> None:
    smallest = simplify(minimal(predicate), predicate)  # as a failure is: by Hypothesis, then on the record
    assert Counter(type(event) for event in smallest.events) == wanted
    setup = smallest.setup
    assert (setup.num_steps, setup.page_size, setup.max_context_len) == (1, 1, min(SMALL.max_context_lens))
    assert (setup.paged_mqa_num_sms, setup.flashmla_num_sm_parts, smallest.seed) == (0, 0, 0)
    assert not setup.inputs.strided
    assert not setup.inputs.wide_req_to_token


def test_minimal_numbers_are_small() -> None:
    ((replay, lengths, _),) = replays(simplify(minimal(long_request), long_request))
    assert lengths == (11,)
    assert (replay.times, replay.mirror, replay.bucket) == (1, Mirror.EQUAL, None)


def test_simplest_scenario_of_all() -> None:
    smallest = minimal(lambda _: True)
    assert [type(event) for event in smallest.events] == [Capture, Join, Replay]
    assert smallest.optimizations == ()
    assert smallest.setup.pool_size == 1


def minimal(predicate: Callable[[Scenario], bool]) -> Scenario:
    search = settings(quick, phases=[Phase.generate, Phase.shrink], max_examples=3000)
    return find(scenarios(SMALL, OPTIMIZED_SWITCHES), predicate, settings=search)


def test_every_event_is_drawn() -> None:
    drawn: set[type] = set()

    @hypothesis.seed(0)
    @settings(quick, max_examples=60)
    @given(scenarios(SMALL))
    def sweep(scenario: Scenario) -> None:
        drawn.update(type(event) for event in scenario.events)

    sweep()
    assert drawn == {Capture, Join, Finish, Accept, Remap, Replay, Eager}


@settings(max_examples=20, deadline=None)
@given(st.data())
@pytest.mark.parametrize("name", ["small after large in one bucket", "recycled"])
def test_a_call_that_leaves_no_request_running_is_drawn_on_from(name: str, data: st.DataObject) -> None:
    """A replay of drafts finishes the requests without room for them, all of them here."""
    setup = Setup(page_size=1, max_context_len=20, index_topk=4, num_steps=1, num_draft_tokens=1, pool_size=1)
    scale = replace(SMALL, limits=Limits(modes=(ForwardMode.DECODE,)))
    script = Script(data.draw, setup, 0, scale, ANYTHING)
    script.join(setup.max_seq_len)
    script.accept((1,))
    {**SITUATIONS, **CALLS_AGAIN}[name](script)
    assert any(isinstance(event, Replay) for event in script.events)
