"""Events that name rows, pages, lengths and mirrors: what the world makes of them, and how they are written and cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.judge import judge
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.coverage import classes_of
from nsa_oracle.harness.scenarios.files import from_json, to_json
from nsa_oracle.harness.scenarios.scenario import Eager, Event, Finish, Join, Replay, Scenario, SetLengths
from nsa_oracle.harness.scenarios.setup import Layer, Mirror, Order
from nsa_oracle.harness.scenarios.simplify import simplify
from nsa_oracle.harness.scenarios.story import story
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.harness.subjects.default import optimized_backend
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND, EXTEND, VERIFY, case

EVERYTHING = case(
    Join(seq_len=3, pool_row=2, pages=(5, 2, 9)),
    Join(seq_len=6, pool_row=0),
    SetLengths(pool_rows=(2, 1), seq_lens=(7, 9), accept_lengths=(2, 1)),
    Eager(mode=EXTEND, pool_rows=(0,), extend_lens=(2,)),
    Replay(mode=DECODE, pool_rows=(0, 2), mirror=Mirror.AHEAD, seq_lens_cpu=(8, 1)),
)


def played(*events: Event, **setup: Any) -> tuple[World, list[Batch]]:
    world = World(case(*events, **setup), poison=-1)
    return world, [batch for event in events if (batch := world.apply(event)) is not None]


def test_requests_lie_where_the_record_says() -> None:
    world, (eager, replay) = played(*EVERYTHING.events)
    assert world.req_to_token[2, :10].tolist() == [20, 21, 22, 23, 8, 9, 10, 11, 36, -1]
    assert (eager.pool_rows, eager.seq_lens, eager.extend_lens) == ((0,), (6,), (2,))
    assert (replay.pool_rows, replay.seq_lens, replay.seq_lens_cpu) == ((0, 2), (6, 7), (8, 1))
    assert replay.accept_lengths == (1, 2)


def test_named_pages_are_not_handed_out_otherwise_and_come_back() -> None:
    world, _ = played(Join(seq_len=14, pages=(1, 2)), Join(seq_len=14), Join(seq_len=14))
    held = [page for request in world.running for page in request.pages]
    assert len(held) == len(set(held)) == 12
    world.apply(Finish(request=0, count=3))
    assert sorted(world.pages.free) == list(range(1, 13))


def test_pages_may_be_those_of_another_request() -> None:
    world, _ = played(Join(seq_len=3, pages=(4, 5)), Join(seq_len=3, pages=(4, 6)), Finish(request=0))
    assert world.running[0].pages.tolist() == [4, 6]
    assert 4 not in world.pages.free
    assert 5 in world.pages.free


def test_a_taken_row_and_a_row_without_a_request_change_nothing() -> None:
    world, (batch,) = played(
        Join(seq_len=3, pool_row=1),
        Join(seq_len=4, pool_row=1),
        Join(seq_len=5, pool_row=1, count=3),
        SetLengths(pool_rows=(0,), seq_lens=(9,), accept_lengths=(1,)),
        Replay(mode=VERIFY, pool_rows=(0, 1, 1), order=Order.REVERSED),
    )
    assert [(request.pool_row, request.seq_len) for request in world.running] == [(1, 3), (2, 6)]
    assert batch.pool_rows == (1,)


def test_no_request_shrinks_or_is_accepted_more_than_it_drafted() -> None:
    _, (batch,) = played(
        Join(seq_len=5),
        SetLengths(pool_rows=(0,), seq_lens=(2,), accept_lengths=(8,)),
        Replay(mode=DRAFT_EXTEND, mirror=Mirror.STALE, seq_lens_cpu=(4,)),
    )
    assert (batch.seq_lens, batch.accept_lengths, batch.seq_lens_cpu) == ((5,), (2,), (4,))


def test_others_do_not_finish_for_lack_of_room() -> None:
    full = SetLengths(pool_rows=(0,), seq_lens=(16,), accept_lengths=(1,))
    world, (batch,) = played(Join(seq_len=5), Join(seq_len=6), full, Replay(mode=DECODE, pool_rows=(1,)))
    assert (batch.seq_lens, len(world.running)) == ((6,), 2)
    world, (batch,) = played(Join(seq_len=5), Join(seq_len=6), full, Replay(mode=DECODE, pool_rows=(1, 0)))
    assert (batch.seq_lens, len(world.running)) == ((6,), 1)


def test_they_are_written_read_and_told() -> None:
    text = to_json(EVERYTHING)
    assert from_json(text) == EVERYTHING
    assert '{"event": "set", "pool_rows": [2, 1], "seq_lens": [7, 9], "accept_lengths": [2, 1]}' in text
    told = story(EVERYTHING)
    assert "A request of 3 tokens joins, on pool row 2, on pages 5 2 9; 1 running." in told
    assert "Requests on pool rows 2 1 have 7 9 tokens now, accepted 2 1." in told
    assert "lengths 6 7, pool rows 0 2, host mirror ahead at 8 1" in told
    assert {"accept all", "mirror ahead", "cached prefix extended"} <= classes_of(EVERYTHING)


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([Join(seq_len=3, pool_row=3)], "events[0].pool_row: must be below 3, not 3"),
        ([Join(seq_len=3, pages=(13,))], "events[0].pages: must be at most 4 different pages of 1..12"),
        ([Join(seq_len=3, pages=(2, 2))], "different pages"),
        ([Join(seq_len=3, pages=(1, 2, 3, 4, 5))], "events[0].pages: must be at most 4"),
        ([SetLengths(pool_rows=(0,), seq_lens=(17,), accept_lengths=(1,))], "events[0].seq_lens: must be at most 16"),
    ],
)
def test_places_that_the_pool_does_not_have_are_refused(events: list[Event], reason: str) -> None:
    document = to_json(case()).replace('"events": []', '"events": [' + events[0].model_dump_json() + "]")
    with pytest.raises(ScenarioError) as refused:
        from_json(document)
    assert reason in str(refused.value)


def test_each_request_needs_its_numbers() -> None:
    with pytest.raises(ValidationError, match="as many numbers as pool_rows"):
        SetLengths(pool_rows=(0, 1), seq_lens=(4,), accept_lengths=(1, 1))
    with pytest.raises(ValidationError, match="in a case without a layer"):
        case(Join(seq_len=3, pages=(1,)), layer=Layer())


def test_a_layer_runs_on_some_of_the_requests(device: torch.device) -> None:
    events = [event if not isinstance(event, Join) else Join(seq_len=event.seq_len) for event in EVERYTHING.events]
    with_layer = case(*events, Eager(mode=DECODE), layer=Layer())
    assert judge(with_layer, optimized_backend, device).eager_calls == 6


def test_what_a_failure_does_not_need_goes() -> None:
    def needs_a_length(scenario: Scenario) -> bool:
        return any(isinstance(event, SetLengths) and 7 in event.seq_lens for event in scenario.events)

    assert simplify(EVERYTHING, needs_a_length).events == (
        SetLengths(pool_rows=(2,), seq_lens=(7,), accept_lengths=(2,)),
    )

    def needs_a_join_and_a_call(scenario: Scenario) -> bool:
        kinds = {type(event) for event in scenario.events}
        return {Join, Replay, Eager} <= kinds

    *_, eager, replay = simplify(EVERYTHING, needs_a_join_and_a_call).events
    assert isinstance(eager, Eager)
    assert isinstance(replay, Replay)
    assert (eager.pool_rows, replay.pool_rows, replay.seq_lens_cpu, replay.mirror) == ((), (), (), Mirror.EQUAL)


def test_a_long_record_is_cut_in_stretches() -> None:
    events = (*[Join(seq_len=3)] * 900, Eager(mode=DECODE), *[Finish(request=0)] * 900)
    long, trials = case(*events), 0

    def calls(scenario: Scenario) -> bool:
        nonlocal trials
        trials += 1
        return any(isinstance(event, Eager) for event in scenario.events)

    assert simplify(long, calls).events == (Eager(mode=DECODE),)
    assert trials < 200
