"""What items report and what a run adds up to."""

from __future__ import annotations

from nsa_oracle.harness.checks.tally import Tally
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.judge import OracleFailure, Verdict
from nsa_oracle.harness.report.records import NOTHING_COMPARED, FailureRecord, ItemRecord, RunRecord, grouped
from nsa_oracle.harness.report.summary import stories
from tests.support.layer_cases import WITH_LAYER, case


def failure(field: str, kind: Kind = Kind.VALUE, long: bool = False) -> FailureRecord:
    scenario = WITH_LAYER if long else case()
    finding = Finding(kind, field, "1", "2")
    return FailureRecord.of(OracleFailure(scenario, finding, 0), f"replay {field}", f"report of {field} {long}")


def test_failure_survives_the_way_from_a_worker() -> None:
    failures = (failure("out"), failure("lse", long=True))
    again = ItemRecord.from_json(ItemRecord(Verdict(cases=2), failures, "test_layers").to_json())
    assert again == ItemRecord(Verdict(cases=2), failures, "test_layers")


def test_failures_alike_are_one_group_with_the_smallest_case_first() -> None:
    long, short, other = failure("out", long=True), failure("out"), failure("out", Kind.SHAPE)
    assert grouped([long, other, short]) == [[short, long], [other]]


def test_each_group_is_reported_once() -> None:
    text = stories([failure("out", long=True), failure("lse"), failure("out")])
    assert text == "report of out False\n\n1 more case fails alike (-v lists them)\n\nreport of lse False"
    assert "1 more case fails alike:\n  replay out" in stories(
        [failure("out", long=True), failure("out")], verbose=True
    )


def passed(cases: int) -> Verdict:
    return Verdict(cases=cases, tally=Tally(fields=cases, cells=cases))


def run_of(*items: ItemRecord) -> RunRecord:
    run = RunRecord()
    for item in items:
        run.add(item)
    return run


def test_run_without_a_case_has_a_gap() -> None:
    assert run_of().gaps() == [], "no item of the oracle was run at all"
    assert run_of(ItemRecord(Verdict())).gaps() == ["NOT JUDGED: no case at all was judged"]
    assert run_of(ItemRecord(passed(1))).gaps() == []


def test_run_that_compared_no_cell_has_a_gap() -> None:
    assert run_of(ItemRecord(Verdict(cases=1))).gaps() == [NOTHING_COMPARED]
    assert run_of(ItemRecord(Verdict(cases=1)), ItemRecord(passed(1))).gaps() == []


def test_test_that_drew_nothing_is_a_gap() -> None:
    saved, drawn = ItemRecord(passed(1)), ItemRecord(Verdict(cases=0), drawn_by="test_layers")
    assert run_of(saved, drawn).gaps() == ["NOT JUDGED: test_layers drew no case; give it more time"]
    assert run_of(drawn, ItemRecord(passed(3), drawn_by="test_layers")).gaps() == []


def test_method_that_nothing_called_is_a_gap() -> None:
    verdict = passed(1)
    verdict.layers.count_calls({"sparse_mla": {"isolated stage": 2}, "topk_indices": {}})
    (gap,) = run_of(ItemRecord(verdict)).gaps()
    assert gap.startswith("NOT JUDGED: topk_indices: no call in this run")
    verdict.layers.count_calls({"topk_indices": {"isolated stage": 1}})
    assert run_of(ItemRecord(verdict)).gaps() == []


def test_layer_that_no_case_judged_is_a_gap() -> None:
    verdict = passed(1)
    assert run_of(ItemRecord(verdict)).gaps("a:B") == ["NOT JUDGED: layer 'a:B': no case of this run has a layer"]
    verdict.layers.count_calls({"sparse_mla": {"isolated stage": 2}})
    assert run_of(ItemRecord(verdict)).gaps("a:B") == []


def test_failing_run_needs_no_gaps() -> None:
    assert run_of(ItemRecord(Verdict(), (failure("out"),))).gaps() == []
