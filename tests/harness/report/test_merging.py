"""Reports of shards become the report of the whole run."""

from __future__ import annotations

import pytest

from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.report.document import RunReport, RunVerdict, SubjectReport, Totals
from nsa_oracle.harness.report.merging import merged
from tests.support.metadata_cases import case
from tests.support.reports import failed, reported, subject


def test_counts_and_classes_add_up() -> None:
    one, two = subject(cases=2), subject(cases=3, classes=("length P",))
    whole = merged([reported(one, shard="1/2"), reported(two, shard="2/2")])
    assert whole.totals == Totals(cases=5, replays=15, eager_calls=5, fields=5, cells=500, failing_cases=0, findings=0)
    (both,) = whole.subjects
    assert both.classes == {"length 1": 1, "length P": 1}
    assert both.quota.drawn == {"test_scenarios": 5}
    assert (whole.durations, whole.verdict, whole.exit_code) == ({"test_scenarios": 3.0}, RunVerdict.PASSED, 0)
    assert whole.shards == ()


def test_findings_alike_are_one_with_the_smallest_case() -> None:
    large, small = subject(failed()), subject(failed(scenario=case()), failed("out"))
    whole = merged([reported(large), reported(small)])
    first, second = whole.subjects[0].found
    assert (first.field, len(first.equal), second.field, second.equal) == ("real_page_table", 1, "out", ())
    assert first.size == failed(scenario=case()).size
    assert whole.subjects[0].failed_cases == {"real_page_table": 2, "out": 1}
    assert (whole.totals.findings, whole.totals.failing_cases) == (2, 3)
    assert (whole.verdict, whole.exit_code) == (RunVerdict.FAILED, 1)


def test_subjects_stay_apart() -> None:
    whole = merged([reported(subject()), reported(subject(backend="c:D"))])
    assert [(s.backend, s.coverage.cases) for s in whole.subjects] == [("a:B", 2), ("c:D", 2)]


def test_a_shard_that_is_missing_is_not_judged() -> None:
    whole = merged([reported(subject(), shard="1/3"), reported(subject(), shard="3/3")])
    assert whole.verdict is RunVerdict.NOT_JUDGED
    assert whole.gaps == ["NOT JUDGED: shard 2/3 is not among the reports"]
    assert whole.shards == ("1/3", "3/3")
    again = merged([whole, reported(subject(), shard="2/3")])
    assert (again.shards, again.gaps, again.verdict) == ((), [], RunVerdict.PASSED)


def test_what_no_shard_judged_is_a_gap_of_the_whole() -> None:
    def part(calls: int) -> SubjectReport:
        layer = subject()
        layer.coverage.layers.count_calls({"topk_indices": {"isolated stage": calls} if calls else {}})
        return layer

    lacking = [reported(part(0), shard=f"{n}/2") for n in (1, 2)]
    assert merged(lacking).gaps[0].startswith("NOT JUDGED: topk_indices: no call in this run")
    given = [reported(part(n), shard=f"{n + 1}/2") for n in (0, 1)]
    assert merged(given).verdict is RunVerdict.PASSED


def test_failures_and_interruptions_of_one_are_of_the_whole() -> None:
    assert merged([reported(subject()), reported(subject(), failed_otherwise=["t"])]).verdict is RunVerdict.FAILED
    whole = merged([reported(subject()), reported(subject(), is_interrupted=True)])
    assert whole.verdict is RunVerdict.INTERRUPTED
    assert whole.exit_code == 1


@pytest.mark.parametrize(
    ("second", "cause"),
    [
        (reported(subject(), profile="pr"), "of different profiles: dev, pr"),
        (reported(subject(), shard="1/3"), "shard 1/3 is given twice"),
        (reported(subject(), shard="2/4"), "the shards are of different runs: 1/3, 2/4"),
    ],
)
def test_reports_of_different_runs_are_refused(second: RunReport, cause: str) -> None:
    with pytest.raises(ScenarioError, match=cause):
        merged([reported(subject(), shard="1/3"), second])
