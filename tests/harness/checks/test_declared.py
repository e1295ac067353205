"""Declared differences: they hide exactly what they name, they are counted, and none is silent."""

from __future__ import annotations

import pytest
import torch

from nsa_oracle.harness.checks.declared import AbsentTally, DeclaredTally, WaiverTally
from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.judge import OracleFailure, Verdict, judge
from nsa_oracle.harness.report.declared import declared_lines, unneeded_declarations
from nsa_oracle.harness.report.records import ItemRecord, RunRecord
from nsa_oracle.harness.report.summary import how_exact
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Join, Replay
from nsa_oracle.harness.subjects.declarations import OwnField, everywhere, read_declarations
from nsa_oracle.harness.subjects.loading import LoadedBackend, load_backend
from tests.support.backends import declared
from tests.support.backends.seams import all_but
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND, VERIFY, case, one_replay

CPU = torch.device("cpu")
PARTIAL = case(
    Capture(mode=DRAFT_EXTEND, buckets=(2,)),
    Join(seq_len=6),
    Join(seq_len=5),
    Accept(accept_lengths=(1, 1)),
    Replay(mode=DRAFT_EXTEND),
)
WITH_SCHEDULE = one_replay(DECODE, paged_mqa_num_sms=2)


def verdict_of(name: str, scenario: object = PARTIAL) -> Verdict:
    return judge(scenario, load_backend(f"{declared.__name__}:{name}"), CPU)  # type: ignore[arg-type]


def test_a_difference_that_is_not_declared_fails() -> None:
    with pytest.raises(OracleFailure, match=r"wrong value: seqlens_expanded at step 0, row 3 \(unused tail\)"):
        verdict_of("TailUndeclared")


def test_a_waiver_hides_its_cells_and_says_how_often() -> None:
    verdict = verdict_of("TailDeclared")
    name = "seqlens_expanded in DRAFT_EXTEND in graphs, behind last token"
    assert verdict.declared.waivers[name] == WaiverTally("nothing reads them", reached=2, needed=2, cells=2)
    assert verdict.declared.never_needed == []
    line = f"waived: {name}: needed in 2 of 2 comparisons, 2 cells (nothing reads them)"
    assert line in declared_lines(verdict.declared)
    assert how_exact(verdict) == "bit-exact but for 8 cells waived as declared"


def test_a_waiver_hides_no_other_cell() -> None:
    with pytest.raises(OracleFailure, match=r"wrong value: seqlens_expanded at step 0, row 0 \(request 0"):
        verdict_of("TailDeclaredWrongly")


def test_a_waiver_that_is_never_needed_makes_a_run_fail() -> None:
    verdict = verdict_of("WaivesForNothing", one_replay(DECODE))
    (line,) = unneeded_declarations(verdict.declared)
    name = "cache_seqlens_int32 in DECODE, everywhere"
    assert line == f"WAIVER NOT NEEDED: {name}: 2 comparisons and no difference; remove or narrow it"
    run = RunRecord()
    run.add(ItemRecord(verdict))
    assert run.gaps() == [line]


def test_a_waiver_that_is_not_reached_is_no_gap() -> None:
    assert unneeded_declarations(verdict_of("WaivesForNothing", PARTIAL).declared) == []


def test_an_absent_field_is_counted() -> None:
    verdict = verdict_of("LeavesScheduleToTheIndexer", WITH_SCHEDULE)
    assert verdict.declared.left_out == {"paged_mqa_schedule_metadata absent in DECODE": 2}
    assert declared_lines(verdict.declared) == [
        "not judged, as declared (calls): paged_mqa_schedule_metadata absent in DECODE 2"
    ]
    undeclared = LoadedBackend(
        type("Undeclared", (declared.LeavesScheduleToTheIndexer,), {"absent": {}}), "it", read_declarations(object())
    )
    with pytest.raises(OracleFailure, match="missing field: paged_mqa_schedule_metadata"):
        judge(WITH_SCHEDULE, undeclared, CPU)


def test_an_absent_field_that_is_always_there_makes_a_run_fail() -> None:
    verdict = verdict_of("DeclaresAbsentForNothing", WITH_SCHEDULE)
    (line,) = unneeded_declarations(verdict.declared)
    name = "paged_mqa_schedule_metadata in DECODE"
    assert line == f"ABSENT NOT NEEDED: {name}: there in all 2 comparisons; remove it from 'absent'"
    run = RunRecord()
    run.add(ItemRecord.from_json(ItemRecord(verdict).to_json()))
    assert run.gaps() == [line]


def test_an_absent_field_that_is_there_is_judged() -> None:
    stale = all_but("paged_mqa_schedule_metadata")
    loaded = LoadedBackend(stale, "it", read_declarations(declared.DeclaresAbsentForNothing))
    with pytest.raises(OracleFailure, match="wrong value: paged_mqa_schedule_metadata"):
        judge(one_replay(DECODE, seq_len=400, max_context_len=520, paged_mqa_num_sms=2), loaded, CPU)


def test_an_absent_field_that_is_not_reached_is_no_gap() -> None:
    """Neither in another mode, nor where the configuration asks for no schedule."""
    for scenario in (PARTIAL, one_replay(VERIFY, paged_mqa_num_sms=2), one_replay(DECODE)):
        assert unneeded_declarations(verdict_of("DeclaresAbsentForNothing", scenario).declared) == []


def test_a_field_declared_absent_in_every_mode_is_one_declaration() -> None:
    verdict = verdict_of("LeavesScheduleToTheIndexer", WITH_SCHEDULE)
    assert verdict.declared.absent == {"paged_mqa_schedule_metadata in every mode": AbsentTally(2, 2)}
    assert unneeded_declarations(verdict.declared) == []


def test_a_field_that_is_present_and_unjudged_is_counted() -> None:
    shows = type("Shows", (declared.OwnWrong,), {"unjudged": {"DECODE": ("doubled_lengths",)}})
    verdict = judge(one_replay(DECODE), LoadedBackend(shows, "it", read_declarations(shows)), CPU)
    assert verdict.declared.left_out == {"doubled_lengths not judged in DECODE": 2}


def test_a_field_of_the_author_is_judged_like_any_other() -> None:
    verdict = verdict_of("OwnRight", one_replay(DECODE))
    assert verdict.declared.own == {"doubled_lengths": 2}
    assert "judged by the author's own reference (calls): doubled_lengths 2" in declared_lines(verdict.declared)
    with pytest.raises(OracleFailure, match="wrong value: doubled_lengths at step 0, request 0: got 9, expected 6"):
        verdict_of("OwnWrong", one_replay(DECODE))


def test_a_field_of_the_author_that_never_has_a_value_is_not_judged() -> None:
    own = OwnField("doubled_lengths", lambda metadata, call: None)
    shows = type("Never", (declared.OwnRight,), {"step": declared.Step, "own_fields": (own,)})
    verdict = judge(one_replay(DECODE), LoadedBackend(shows, "it", read_declarations(shows)), CPU)
    assert verdict.declared.own == {"doubled_lengths": 0}
    assert declared_lines(verdict.declared) == ["without a value in the author's own reference: doubled_lengths"]
    line = (
        "NOT JUDGED: own field doubled_lengths: its reference gave None in every call; mend or remove it, or "
        "declare it absent"
    )
    saved, drawn = RunRecord(), RunRecord()
    saved.add(ItemRecord(verdict))
    assert saved.gaps() == [], "a saved case may just not have it"
    drawn.add(ItemRecord(verdict, drawn_by="test_scenarios"))
    assert drawn.gaps() == [line]
    drawn.add(ItemRecord(verdict_of("OwnRight", one_replay(DECODE)), drawn_by="test_scenarios"))
    assert drawn.gaps() == []


def test_dead_cells_of_a_field_of_the_author_are_not_compared() -> None:
    own = declared.OwnWrong.own_fields[0]
    dead = OwnField(own.name, own.reference, axes=own.axes, dead=everywhere)
    shows = type("Dead", (declared.OwnWrong,), {"own_fields": (dead,)})
    assert judge(one_replay(DECODE), LoadedBackend(shows, "it", read_declarations(shows)), CPU).replays == 2


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (lambda metadata, call: 1 / 0, "the reference of 'doubled_lengths' raised ZeroDivisionError"),
        (lambda metadata, call: metadata.cache_seqlens_int32.long(), "must give an int32 tensor or None"),
        (lambda metadata, call: metadata.page_table_1, "gives 2 dimensions, axes names 1"),
    ],
)
def test_a_reference_that_fails_ends_the_run_in_one_line(reference: object, message: str) -> None:
    own = OwnField("doubled_lengths", reference)  # type: ignore[arg-type]
    shows = type("Fails", (declared.OwnRight,), {"own_fields": (own,)})
    with pytest.raises(BackendError, match="own_fields: ") as caught:
        judge(one_replay(DECODE), LoadedBackend(shows, "it", read_declarations(shows)), CPU)
    assert message in str(caught.value)


def test_counts_survive_the_way_from_a_worker_and_add_up() -> None:
    verdict = verdict_of("TailDeclared")
    verdict.declared.stand_ins["a.b"] = 1
    again = ItemRecord.from_json(ItemRecord(verdict).to_json())
    assert again.verdict.declared == verdict.declared
    total = DeclaredTally()
    total.add(verdict.declared)
    total.add(again.verdict.declared)
    assert {waiver.cells for waiver in total.waivers.values()} == {4, 8}
    assert total.stand_ins == {"a.b": 2}


def test_stand_ins_are_listed_by_module() -> None:
    tally = DeclaredTally(stand_ins={"a.b": 1, "a.c": 2, "d.e": 1})
    assert declared_lines(tally) == ["stand-ins, not judged: a: b c, d: e"]
