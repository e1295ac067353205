"""A run over a pool: what it hands out, what it makes of failures and deaths, and what a stopped run leaves."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nsa_oracle.harness.cluster.exploring import MOST_DEATHS, Exploring
from nsa_oracle.harness.cluster.pool import PoolLost, WorkersDied
from nsa_oracle.harness.cluster.state import FILE, as_ranges, numbers_in, read_state
from nsa_oracle.harness.cluster.work import (
    Chunk,
    ClusterTask,
    JudgedChunk,
    Smaller,
    drawn_case,
    judge_chunk,
    make_smaller,
)
from nsa_oracle.harness.commands.exploring import _reporter
from nsa_oracle.harness.errors import BackendError, ScenarioError
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.judge import OracleFailure, Verdict
from nsa_oracle.harness.scenarios.files import load
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.search.spec import SubjectSpec
from tests.support.metadata_cases import DECODE, TWO_LENGTHS, one_replay

TASK = ClusterTask(SubjectSpec(), "cpu", 0)
SMALL = one_replay(DECODE)
LARGE = TWO_LENGTHS


class ScriptedPool:
    """Answers the calls in any order. bad: which numbers fail, and how; deadly: how often each kills what judges it."""

    def __init__(self, bad: dict[int, OracleFailure] | None = None, deadly: Counter[int] | None = None) -> None:
        self.bad, self.deadly = bad or {}, deadly or Counter()
        self.judged: Counter[tuple[bool, int]] = Counter()
        self.made_smaller: list[OracleFailure] = []
        self.waiting: dict[int, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
        self.calls = 0
        self.lost_after: int | None = None
        self.order = random.Random(1)
        self.cancelled = False

    def size(self) -> int:
        return 2

    def submit(self, function: Callable[..., Any], *arguments: Any, urgent: bool = False) -> object:
        self.calls += 1
        self.waiting[self.calls] = function, arguments
        return self.calls

    def next(self, timeout: float) -> tuple[object, Any] | None:
        if self.lost_after is not None and self.calls > self.lost_after:
            raise PoolLost("gone")
        key = self.order.choice(list(self.waiting))
        function, arguments = self.waiting.pop(key)
        return key, self.answer(function, *arguments)

    def cancel(self) -> None:
        self.cancelled = True

    def answer(self, function: Callable[..., Any], task: ClusterTask, given: Any) -> Any:
        assert task == TASK
        if function is make_smaller:
            self.made_smaller.append(given)
            return Smaller(OracleFailure(SMALL, given.finding, 2))
        if function is drawn_case:
            return LARGE
        assert function is judge_chunk
        return self.judge(given)

    def judge(self, chunk: Chunk) -> Any:
        for number in chunk.numbers:
            if self.deadly[number]:
                self.deadly[number] -= 1
                return JudgedChunk(died="the process ended (signal SIGKILL)")
        judged = JudgedChunk()
        for number in chunk.numbers:
            self.judged[chunk.with_layer, number] += 1
            judged.verdict.add(Verdict(cases=1, replays=10))
            if number in self.bad:
                judged.failure = self.bad[number]
                return judged
            judged.passed += 1
        return judged


def wrong(field: str) -> OracleFailure:
    return OracleFailure(LARGE, Finding(Kind.VALUE, field, "1", "2"), 3)


def run_of(pool: ScriptedPool, folder: Path, cases: int = 50, layer_cases: int = 7, **more: Any) -> Exploring:
    return Exploring(TASK, pool, cases, layer_cases, folder, **more)


def test_every_case_of_both_streams_is_judged_once(tmp_path: Path) -> None:
    pool = ScriptedPool()
    run = run_of(pool, tmp_path)
    run.run()
    everything = {(False, n) for n in range(50)} | {(True, n) for n in range(7)}
    assert pool.judged == Counter(everything)
    assert (run.judged, run.expected, run.replays, run.found) == (57, 57, 570, [])
    assert pool.cancelled


def test_cases_behind_one_that_fails_are_judged_too_and_each_finding_is_told_once(tmp_path: Path) -> None:
    pool = ScriptedPool({3: wrong("cu_seqlens_k"), 4: wrong("cu_seqlens_k"), 21: wrong("page_table_1")})
    run = run_of(pool, tmp_path, layer_cases=0)
    run.run()
    assert pool.judged == Counter((False, n) for n in range(50))
    assert sorted((found.key[1], found.count) for found in run.found) == [("cu_seqlens_k", 2), ("page_table_1", 1)]
    assert len(pool.made_smaller) == 2
    for found in run.found:
        assert found.saved.name.endswith(".min.json")
        assert load(found.saved).events == SMALL.events
        assert load(found.files.raw).events == LARGE.events


def test_a_failing_case_is_saved_before_it_is_made_smaller(tmp_path: Path) -> None:
    class Looking(ScriptedPool):
        there: tuple[str, ...] = ()

        def answer(self, function: Callable[..., Any], task: ClusterTask, given: Any) -> Any:
            if function is make_smaller:
                self.there = tuple(sorted(path.name.partition(".")[2] for path in tmp_path.glob("*.*.json")))
            return super().answer(function, task, given)

    pool = Looking({0: wrong("page_table_1")})
    run_of(pool, tmp_path).run()
    assert pool.there == ("raw.json",)


def test_how_many_cases_are_being_made_smaller_is_told(tmp_path: Path) -> None:
    pool = ScriptedPool({3: wrong("cu_seqlens_k"), 21: wrong("page_table_1")})
    run = run_of(pool, tmp_path, layer_cases=0)
    told: list[tuple[int, str]] = []
    report = _reporter(run, lambda done, doing: told.append((done, doing)))

    def compare() -> None:
        report()
        out = sum(function is make_smaller for function, _ in pool.waiting.values())
        assert run.shrinking == out
        assert told[-1][1] == ["", "shrinking 1 case", "shrinking 2 cases"][out]

    run.run(report=compare)
    assert "shrinking 1 case" in dict(told).values()
    assert told[-1] == (50, "")


def test_saved_cases_are_judged_first_and_what_fails_is_shared(tmp_path: Path) -> None:
    class Keeping(ScriptedPool):
        handed_out: list[Chunk]
        saved: list[Scenario]

        def submit(self, function: Callable[..., Any], *arguments: Any, urgent: bool = False) -> object:
            if function is judge_chunk:
                self.handed_out.append(arguments[1])
            return super().submit(function, *arguments, urgent=urgent)

        def judge(self, chunk: Chunk) -> Any:
            if not chunk.saved:
                return super().judge(chunk)
            self.saved.append(chunk.saved[0])
            return JudgedChunk(failure=wrong("page_table_1")) if chunk.saved[0] == LARGE else JudgedChunk(1)

    pool, shared = Keeping(), list[Scenario]()
    pool.handed_out, pool.saved = [], []
    run = run_of(pool, tmp_path, known=[LARGE, SMALL, SMALL], share=shared.append)
    run.run()
    assert [chunk.saved for chunk in pool.handed_out[:3]] == [(LARGE, SMALL), (SMALL,), ()]
    assert sorted(case == LARGE for case in pool.saved) == [False, False, True]
    assert (run.judged, len(run.found), run.found[0].count) == (57, 1, 1)
    assert shared == [SMALL]


def test_a_case_that_a_fresh_process_does_not_show_stays_as_it_was_found(tmp_path: Path) -> None:
    class Forgetful(ScriptedPool):
        def answer(self, function: Callable[..., Any], task: ClusterTask, given: Any) -> Any:
            return Smaller(given, depends=True) if function is make_smaller else super().answer(function, task, given)

    run = run_of(Forgetful({0: wrong("page_table_1")}), tmp_path)
    run.run()
    (found,) = run.found
    assert found.depends
    assert found.saved == found.files.raw


@pytest.mark.parametrize("deaths", [1, MOST_DEATHS])
def test_a_case_whose_process_dies_is_judged_again(deaths: int, tmp_path: Path) -> None:
    """What took the others of its chunk down with it does not count against them."""
    pool = ScriptedPool(deadly=Counter({5: deaths}))
    run = run_of(pool, tmp_path, layer_cases=0)
    run.run()
    assert pool.judged == Counter((False, n) for n in range(50))
    assert run.found == []


def test_a_case_that_kills_three_processes_is_a_finding(tmp_path: Path) -> None:
    pool = ScriptedPool(deadly=Counter({5: 1 + MOST_DEATHS}))  # once with the others of its chunk
    run = run_of(pool, tmp_path, layer_cases=0)
    run.run()
    assert pool.judged == Counter((False, n) for n in range(50) if n != 5)
    (found,) = run.found
    assert found.sentence == "the process ended (signal SIGKILL), 3 times"
    assert found.count == 1
    assert load(found.saved).events == LARGE.events
    assert run.judged == 50


def test_workers_that_die_themselves_count_as_processes(tmp_path: Path) -> None:
    class Dying(ScriptedPool):
        def judge(self, chunk: Chunk) -> Any:
            return WorkersDied("3 workers died") if 5 in chunk.numbers else super().judge(chunk)

    run = run_of(Dying(), tmp_path, layer_cases=0)
    run.run()
    assert [found.sentence for found in run.found] == ["3 workers died, 3 times"]
    assert run.judged == 50


def test_a_lost_scheduler_leaves_what_was_found_and_another_run_goes_on(tmp_path: Path) -> None:
    pool = ScriptedPool({7: wrong("page_table_1")})
    pool.lost_after = 6
    first = run_of(pool, tmp_path)
    with pytest.raises(PoolLost):
        first.run()
    assert 0 < first.judged < first.expected
    state = read_state(tmp_path / FILE)
    assert (state.cases, state.replays) == (first.judged, first.replays)

    second_pool = ScriptedPool({7: wrong("page_table_1"), 49: wrong("page_table_1")})
    second = run_of(second_pool, tmp_path, state=state)
    second.run()
    assert not pool.judged & second_pool.judged
    assert pool.judged + second_pool.judged == Counter({(False, n) for n in range(50)} | {(True, n) for n in range(7)})
    assert (second.judged, second.replays) == (57, 570)
    (found,) = second.found
    assert found.count == 2
    assert second_pool.made_smaller == []


def test_behind_the_deadline_nothing_is_begun(tmp_path: Path) -> None:
    pool = ScriptedPool()
    run = run_of(pool, tmp_path)
    run.run(deadline=0.0)
    assert pool.calls == run.judged == 0
    assert read_state(tmp_path / FILE).cases == 0


def test_a_subject_that_cannot_be_judged_ends_the_run(tmp_path: Path) -> None:
    class Refusing(ScriptedPool):
        def judge(self, chunk: Chunk) -> Any:
            return BackendError("backend 'x:y': no module")

    with pytest.raises(BackendError, match="no module"):
        run_of(Refusing(), tmp_path).run()


def test_a_folder_that_vanishes_costs_the_files_alone(tmp_path: Path) -> None:
    folder = tmp_path / "file"
    folder.write_text("in the way")
    run = run_of(ScriptedPool({0: wrong("page_table_1")}), folder)
    run.run()
    assert run.judged == 57
    assert len(run.found) == 1
    assert "file" in run.unsaved


def test_a_state_is_of_its_subject_alone(tmp_path: Path) -> None:
    run_of(ScriptedPool(), tmp_path).run()
    state = read_state(tmp_path / FILE)
    state.check(None, None, "cpu", 0, tmp_path / FILE)
    for other in (("a:b", None, "cpu", 0), (None, "a:b", "cpu", 0), (None, None, "cuda", 0), (None, None, "cpu", 1)):
        with pytest.raises(ScenarioError, match="name that, or another --save"):
            state.check(*other, tmp_path / FILE)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"version": 1}',
        b"\xff\xfe",
        b'{"device": 3, "seed": 0}',
        b'{"version": 2, "device": "cpu", "seed": 0}',
        None,
    ],
)
def test_a_file_that_is_no_state_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ScenarioError) as error:
        read_state(tmp_path / FILE)
    assert str(tmp_path / FILE) in str(error.value)
    assert "\n" not in str(error.value)


def test_ranges() -> None:
    assert as_ranges([5, 1, 2, 3, 9, 3]) == [(1, 4), (5, 6), (9, 10)]
    assert numbers_in([(1, 4), (5, 6)]) == {1, 2, 3, 5}
    assert as_ranges([]) == []


def test_drawn_cases_are_those_of_make_check() -> None:
    """The scenario of a number is that of the stream, whoever draws it."""
    assert isinstance(drawn_case(TASK, Chunk(False, (0,))), Scenario)
