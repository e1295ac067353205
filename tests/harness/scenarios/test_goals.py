"""What each case of a run is built to visit: every class is somebody's goal, and no two goals of a case contradict."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from nsa_oracle.harness.scenarios.calls_again import CALLS_AGAIN
from nsa_oracle.harness.scenarios.classes import LAYER_CLASSES, all_classes
from nsa_oracle.harness.scenarios.goal import SITUATION, Goal, Want
from nsa_oracle.harness.scenarios.goals import FIRST_SITUATIONS, PERIODS, goals, wants
from nsa_oracle.harness.scenarios.scales import LARGE, LARGE_LAYER, SMALL, SMALL_LAYER, Scale, restricted
from nsa_oracle.harness.scenarios.script import Script
from nsa_oracle.harness.scenarios.situations import SITUATIONS
from nsa_oracle.harness.scenarios.switches import NO_SWITCHES
from nsa_oracle.harness.search.drawing import PROFILES
from nsa_oracle.harness.subjects.default import OPTIMIZED_SWITCHES
from tests.support.limits import limits, only
from tests.support.metadata_cases import DECODE, VERIFY, case

ALL = {*SITUATIONS, *CALLS_AGAIN}
SCALES = {"small": SMALL, "large": LARGE, "small, layer": SMALL_LAYER, "large, layer": LARGE_LAYER}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("round_", [0, 1, 250])
def test_every_class_is_the_goal_of_one_case_of_each_round(scale: Scale, round_: int) -> None:
    dealt = Counter(name for goal in goals(scale, OPTIMIZED_SWITCHES, round_) for name in goal.names)
    metadata = [name for name in all_classes(OPTIMIZED_SWITCHES) if name not in LAYER_CLASSES]
    assert dealt == Counter(LAYER_CLASSES if scale.layers else metadata)


def test_a_round_is_over_in_the_shortest_profile_that_is_a_gate() -> None:
    assert PERIODS[False] <= PROFILES["dev"].cases
    assert PERIODS[True] <= PROFILES["dev"].layer_cases


def test_later_rounds_combine_the_same_wants_in_other_ways() -> None:
    first, second = (goals(SMALL, OPTIMIZED_SWITCHES, round_) for round_ in (0, 1))
    assert {goal.pins.get(SITUATION) for goal in first} == {goal.pins.get(SITUATION) for goal in second}
    assert {frozenset(goal.names) for goal in first} != {frozenset(goal.names) for goal in second}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_every_situation_is_known_and_wanted(scale: Scale) -> None:
    named = {name for want in wants(scale, OPTIMIZED_SWITCHES) for name in want.pins.get(SITUATION, ())}
    assert named <= ALL
    if not scale.layers:
        assert named == ALL - {"wide rows", "long prefill"} >= set(FIRST_SITUATIONS)
    else:
        assert {"wide rows", "long prefill"} <= named


def test_what_the_limits_exclude_is_not_wanted() -> None:
    few = restricted(SMALL, limits(page_size=(64,), num_steps=(1, 2)) & only(DECODE, VERIFY))
    names = {want.name for want in wants(few, NO_SWITCHES)}
    assert {"page size 64", "N 1", "replay DECODE", "N 2..8", "eager TARGET_VERIFY, N > 1"} <= names
    assert not {"page size 16", "N over 8", "replay DRAFT_EXTEND", "eager EXTEND", "no switch"} & names
    assert not any(name.startswith("N >= 4") for name in names)


def test_wants_that_contradict_each_other_do_not_share_a_case() -> None:
    goal = Goal().joined(Want("a", {"page_size": (16, 32)}))
    assert goal is not None
    both = goal.joined(Want("b", {"page_size": (32, 64), "num_steps": (1,)}))
    assert both == Goal(("a", "b"), {"page_size": (32,), "num_steps": (1,)})
    assert both.joined(Want("c", {"page_size": (16,)})) is None


def test_nobody_finishes_where_a_call_has_finished_all() -> None:
    def no_choice(strategy: object) -> Any:
        raise AssertionError(strategy)

    script = Script(no_choice, case().setup, 0, SMALL, Goal())
    script.finish(len(script.running) - 1)
    assert script.events == ()
    script.join(3)
    script.finish(0)
    assert [event.event for event in script.events] == ["join", "finish"]
