"""Cases of a record make the calls that were recorded; what no case can have is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from docs.examples.my_backend import MyBrokenBackend
from docs.examples.staging import main as serve
from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.recorder.wrapper import flush
from nsa_oracle.harness.scenarios.files import from_json, to_json
from nsa_oracle.harness.scenarios.goals import PERIODS
from nsa_oracle.harness.scenarios.recorded import read_record
from nsa_oracle.harness.scenarios.scales import SMALL
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Finish, Join, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import IntDtype, Mirror, Reuse
from nsa_oracle.harness.scenarios.simplify import simplify
from nsa_oracle.harness.scenarios.story import story
from nsa_oracle.harness.scenarios.switches import NO_SWITCHES
from nsa_oracle.harness.scenarios.translation import Import, imported
from nsa_oracle.harness.search.stream import CaseStream
from nsa_oracle.reference.multi_step import MultiStepBackend as Reference
from tests.support.metadata_cases import factory_of
from tests.support.recordings import CONFIG, CPU, HEAD, called, calls, recorded_run, written


def of_one_server(scenario: Scenario) -> Scenario:
    """The case of one backend that prepares each batch once, as a server does.

    An eager call is not padded with a single request: that one looks like a request on pool row 0.
    """
    padding = scenario.setup.eager_padding if scenario.setup.eager_padding > 1 else 0
    setup = scenario.setup.model_copy(update={"neighbour_context_len": 0, "eager_padding": padding})
    once = {"preparations": 1}
    events = [e.model_copy(update=once) if isinstance(e, Replay | Eager) else e for e in scenario.events]
    return scenario.model_copy(update={"setup": setup, "events": tuple(events)})


CASES = {
    drawn.number: of_one_server(drawn.scenario)
    for drawn in CaseStream(SMALL, NO_SWITCHES, 0).cases(range(PERIODS[False]))
}
REFERENCE, BROKEN = factory_of(Reference), factory_of(MyBrokenBackend)


def case_of(file: Path, **how: Any) -> Scenario:
    (case,), _ = imported(read_record(file), Import(**how))
    return case


def refusal(file: Path, **how: Any) -> str:
    with pytest.raises(ScenarioError) as refused:
        imported(read_record(file), Import(**how))
    (line,) = str(refused.value).splitlines()
    return line


@pytest.mark.parametrize("tables", ["none", "whole"])
@pytest.mark.parametrize("number", CASES)
def test_a_recorded_case_is_the_same_calls(number: int, tables: Any, tmp_path: Path) -> None:
    first = recorded_run(CASES[number], REFERENCE, tmp_path / "first.jsonl", tables)
    case = case_of(first)
    assert from_json(to_json(case)) == case
    assert case == case_of(first)
    again = recorded_run(case, REFERENCE, tmp_path / "again.jsonl", tables)
    assert calls(again) == calls(first)
    assert len(calls(first)) == CASES[number].calls
    assert case.setup.drive is CASES[number].setup.drive
    assert case.setup.inputs.seq_lens is CASES[number].setup.inputs.seq_lens


def test_a_bug_is_found_from_the_record_alone(tmp_path: Path) -> None:
    first = recorded_run(CASES[3], BROKEN, tmp_path / "server.jsonl")
    case = case_of(first)
    assert judge(case, REFERENCE, CPU).replays
    with pytest.raises(OracleFailure, match="real_page_table"):
        judge(case, BROKEN, CPU)

    def still_fails(smaller: Scenario) -> bool:
        try:
            judge(smaller, BROKEN, CPU)
        except OracleFailure as failure:
            return failure.finding.field == "real_page_table"
        except ScenarioError:  # nothing is left to judge
            pass
        return False

    smallest = simplify(case, still_fails, 100)
    assert len(smallest.events) <= 3 < len(case.events)


def test_a_server_of_which_some_requests_are_prefilled(tmp_path: Path) -> None:
    file = tmp_path / "server.jsonl"
    assert flush(serve(str(file)).backend)
    case = case_of(file)
    assert calls(recorded_run(case, REFERENCE, tmp_path / "again.jsonl"))
    assert [event.pool_rows for event in case.events if isinstance(event, Eager)] == [(), (2,), (7,)]
    assert "joins, on pool row 5, on pages 41 42 43; 1 running" in story(case)
    assert judge(case, REFERENCE, CPU).replays == 18


def test_requests_are_told_apart(tmp_path: Path) -> None:
    """By fewer tokens, by a longer prefill, and by other pages of the same length."""
    digests = [{"digest": [1]}, {"digest": [2]}]
    file = written(
        tmp_path,
        called("DECODE", [0], [9]),
        called("DECODE", [0], [5]),
        called("EXTEND", [0], [7], extend_lens=[7]),
        called("DECODE", [0], [7], **digests[0]),
        called("DECODE", [0], [7], **digests[1]),
        called("EXTEND", [0], [9], extend_lens=[2]),
    )
    case = case_of(file)
    assert [event.seq_len for event in case.events if isinstance(event, Join)] == [9, 5, 7, 7]
    assert sum(isinstance(event, Finish) for event in case.events) == 3
    assert case.setup.reuse is Reuse.QUEUE


def test_numbers_that_do_not_follow_are_named(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        called("DECODE", [3, 6], [9, 5], 4, seq_lens_cpu=[7, 8, 1, 1], pool_rows=[3, 6, 0, 0], seq_lens=[9, 5, 1, 1]),
        called("DECODE", [6, 3], [5, 14]),
        called("DECODE", [6], [6]),
    )
    case = case_of(file)
    assert '{"event": "set", "pool_rows": [3], "seq_lens": [14], "accept_lengths": [1]}' in to_json(case)
    replay = next(event for event in case.events if isinstance(event, Replay))
    assert (replay.mirror, replay.seq_lens_cpu) == (Mirror.AHEAD, (7, 8))
    assert (case.events[0], replay.bucket) == (Capture(mode=replay.mode, buckets=(4,)), None)
    assert judge(case, REFERENCE, CPU).replays == 2
    _, notes = imported(read_record(file), Import())
    assert notes == ["the record has no capture of 1 graph (DECODE 4): added"]


def test_the_last_calls_and_cases_of_some(tmp_path: Path) -> None:
    file = written(tmp_path, *(called("DECODE", [1], [3 + number]) for number in range(7)))
    (last,), _ = imported(read_record(file), Import(last=2))
    assert [event.seq_len for event in last.events if isinstance(event, Join)] == [8]
    cases, _ = imported(read_record(file), Import(per_case=3))
    assert [case.calls for case in cases] == [3, 3, 1]
    assert cases[2].note == "calls 6 to 6 of server.jsonl"


def test_the_same_replay_is_one_event(tmp_path: Path) -> None:
    case = case_of(written(tmp_path, *[called("TARGET_VERIFY", [0], [5], 1)] * 20))
    assert [event.times for event in case.events if isinstance(event, Replay)] == [16, 4]


def test_a_large_pool_is_made_to_fit(tmp_path: Path) -> None:
    config = CONFIG | {"page_size": 64, "max_context_len": 1 << 17}
    head = HEAD | {"config": config, "pool": [4096, 1 << 17], "tables": "whole"}
    table = [[[64 * 9000, 200]], [[64 * 100, 100]]]
    file = written(tmp_path, called("DECODE", [4000, 17], [130, 70], table=table), head=head)
    assert "cells in req_to_token; at most 8,388,608" in refusal(file)
    assert "import with --compact" in refusal(file)
    (case,), notes = imported(read_record(file), Import(compact=True))
    assert (case.setup.pool_size, case.setup.max_context_len) == (3, 192)
    assert [(event.pool_row, event.pages) for event in case.events if isinstance(event, Join)] == [
        (2, (3, 4, 5)),
        (1, (1, 2)),
    ]
    assert notes == ["sizes are not those of the server: its pool rows are renumbered, its tables narrower"]


UNFIT = {
    "mode": (called("MIXED", [0], [3]), "there is no such mode; known are EXTEND"),
    "no graph": ({"call": "c", "act": "capture", "mode": "EXTEND", "bs": 2}, "EXTEND has no graph"),
    "no numbers": ({"call": "c", "act": "replay", "mode": "DECODE", "bs": 2}, "it has no numbers"),
    "row twice": (called("DECODE", [3, 3], [4, 5]), "two of its requests are on pool row 3"),
    "row beyond": (called("DECODE", [9], [4]), "is on pool row 9, and the pool has 8"),
    "no room": (called("DECODE", [1], [31]), "has 31 tokens; a request of this mode has 1 to 30"),
    "no tokens": (called("DECODE", [1], [0]), "has 0 tokens"),
    "accepts": (called("DRAFT_EXTEND", [1], [4], accept_lengths=[3]), "was accepted 3 of 2 draft tokens"),
    "no accepts": (called("DRAFT_EXTEND", [1], [4]), "it has no accept_lengths"),
    "new tokens": (called("EXTEND", [1], [4], extend_lens=[5]), "has 5 new tokens, of 4"),
    "mirror": (called("DECODE", [1, 2], [4, 4], seq_lens_cpu=[4]), "it has 1 seq_lens_cpu for 2 requests"),
    "few lengths": (called("DECODE", [1], [4], 2), "it has 1 pool_rows for 2 requests"),
    "few lengths, eager": (called("DECODE", [1, 2], [4], bs=None), "it has 1 seq_lens for 2 requests"),
    "many rows": (called("DECODE", [1, 2], [4]) | {"bs": None}, "it has 2 pool_rows for 1 request"),
    "few accepts": (called("DRAFT_EXTEND", [1, 2], [4, 5], accept_lengths=[1]), "it has 1 accept_lengths for 2"),
    "few new tokens": (called("EXTEND", [1, 2], [4, 5], extend_lens=[4]), "it has 1 extend_lens for 2 requests"),
    "idle": (called("IDLE", [1, 2], [4, 5], 2), "is IDLE"),
    "empty": (called("DECODE", [], []), "its mode should be IDLE"),
    "huge": (called("DECODE", [1], [2**31 - 1]), "has 2,147,483,647 tokens"),
    "pages": (called("DECODE", [1], [4], table=[[[5, 9]]]), "slot 5 of request 0, position 0, belongs to no page of 4"),
    "dummy page": (called("DECODE", [1], [4], table=[[[0, 9]]]), "belongs to no page"),
    "short table": (called("DECODE", [1], [4], table=[[[4, 3]]]), "its table has 3 of the 4 slots"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_call_that_no_case_can_have_is_named(name: str, tmp_path: Path) -> None:
    call, reason = UNFIT[name]
    file = written(tmp_path, called("DECODE", [2], [3]), call)
    line = refusal(file)
    assert line.startswith(f"{file}, line 3: call 1 (")
    assert line.endswith("; or leave it out with --skip")
    assert reason in line
    (case,), notes = imported(read_record(file), Import(skip=True))
    assert case.calls == 1
    assert [note for note in notes if reason in note and note.startswith("left out: call 1 (")]


def test_buffers_of_the_largest_bucket_are_cut(tmp_path: Path) -> None:
    """Engines pass them whole. What is behind the batch may be anything, such as what an earlier one left there."""
    whole = called("DRAFT_EXTEND", [3, 0, 9, 9], [6, 1, 0, 0], 2, accept_lengths=[2, 1, 7, 7])
    case = case_of(written(tmp_path, whole))
    assert calls(recorded_run(case, REFERENCE, tmp_path / "again.jsonl"))[0]["seq_lens"] == [6, 1]
    assert case.setup.padding_len == 1


def test_dtypes_are_those_of_the_first_call_that_has_them(tmp_path: Path) -> None:
    first = called("DECODE", [1], [4], dtypes={"seq_lens": "int32", "seq_lens_cpu": "float64"})
    file = written(tmp_path, first, called("DECODE", [1], [5], dtypes={"seq_lens": "int64", "pool_rows": "int32"}))
    (case,), notes = imported(read_record(file), Import())
    assert (case.setup.inputs.seq_lens, case.setup.inputs.req_pool_indices) == (IntDtype.INT32, IntDtype.INT32)
    assert notes == ["seq_lens is not of the same dtype in all calls; cases have int32, as the first one"]


def test_padding_of_another_kind_is_said(tmp_path: Path) -> None:
    file = written(tmp_path, called("DECODE", [3, 0, 0], [9, 4, 4], 3))
    (case,), notes = imported(read_record(file), Import())
    assert "padding of length 4 on pool row 0: the backend must declare it in its attribute 'padding'" in notes
    assert sum(isinstance(event, Join) for event in case.events) == 1


def test_an_idle_rank_and_an_empty_batch(tmp_path: Path) -> None:
    padding = ([0, 0], [1, 1], 2)
    file = written(
        tmp_path,
        called("DECODE", [0], [5]),
        called("IDLE", *padding),
        called("TARGET_VERIFY", *padding),
        called("DECODE", [0], [5]),
    )
    case = case_of(file)
    assert judge(case, REFERENCE, CPU).replays == 4
    again = recorded_run(case, REFERENCE, tmp_path / "again.jsonl")
    assert [call["seq_lens"] for call in calls(again)] == [[5], [1, 1], [1, 1], [5]]


def test_sizes_that_the_record_does_not_say(tmp_path: Path) -> None:
    head = HEAD | {"config": {"page_size": 4}}
    file = written(tmp_path, called("DECODE", [1], [4]), head=head)
    assert "does not say max_context_len, index_topk, num_steps, num_draft_tokens: add --size" in refusal(file)
    sizes = {"max_context_len": "32", "index_topk": "8", "num_steps": "1", "num_draft_tokens": "2"}
    assert case_of(file, sizes=sizes).setup.max_context_len == 32
    assert "its sizes: index_topk: " in refusal(file, sizes=sizes | {"index_topk": "many"})


def test_a_record_without_a_call(tmp_path: Path) -> None:
    assert "nothing would be judged" in refusal(written(tmp_path))
