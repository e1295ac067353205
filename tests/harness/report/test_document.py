"""The report of a run for machines: what it holds, and what is refused as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.report.document import (
    PlantedBugs,
    RunVerdict,
    SubjectReport,
    report_as_json,
    report_from_json,
    report_schema,
    verdict_of,
    written_text,
)
from nsa_oracle.harness.report.records import FailureRecord, RunRecord
from nsa_oracle.harness.scenarios.files import from_json
from tests.support.metadata_cases import case
from tests.support.project import PROJECT
from tests.support.reports import HISTORY, PICTURE, failed, reported, subject


def test_schema_in_the_documentation_is_up_to_date() -> None:
    """``nsa-oracle report --schema > docs/report.schema.json`` writes it."""
    assert (PROJECT / "docs/report.schema.json").read_text(encoding="utf-8") == report_schema()


def test_report_survives_its_file() -> None:
    report = reported(subject(failed(), failed(scenario=case())), subject(backend=None))
    assert report_from_json(report_as_json(report), "x") == report


def test_finding_holds_the_case_its_story_and_its_cells() -> None:
    (found,) = subject(failed()).found
    assert from_json(json.dumps(found.case)) == HISTORY
    assert found.story.splitlines()[-1].endswith("<- fails here")
    assert found.check == "metadata"
    assert found.finding is not None
    assert found.finding.picture == PICTURE


def test_cases_that_fail_alike_are_one_finding() -> None:
    small, large = failed(scenario=case()), failed()
    (found,) = subject(large, small).found
    assert from_json(json.dumps(found.case)) == case()
    assert [equal.size for equal in found.equal] == [large.size]
    assert [failure.size for failure in found.failures()] == [small.size, large.size]


def test_case_that_ended_its_process_needs_no_finding() -> None:
    died = FailureRecord("died", "process", "killed by SIGSEGV between two cases", "", "ORACLE FAILURE  killed")
    (found,) = subject(died).found
    assert (found.check, found.case, found.story) == ("process", None, "")


def test_text_that_is_no_unicode_is_kept() -> None:
    odd = FailureRecord("died", "process", "x", "", "", saved="failures/\udcff.json")
    report = reported(subject(odd))
    assert report_from_json(report_as_json(report), "x") == report


def gap_of(*lines: str) -> SubjectReport:
    return subject().model_copy(update={"gaps": lines})


@pytest.mark.parametrize(
    ("subjects", "others", "is_interrupted", "verdict"),
    [
        ([subject()], [], False, RunVerdict.PASSED),
        ([subject(), subject(failed())], [], True, RunVerdict.FAILED),
        ([subject()], ["test_other.py::test_it"], False, RunVerdict.FAILED),
        ([subject()], [], True, RunVerdict.INTERRUPTED),
        ([gap_of("NOT JUDGED: x")], [], False, RunVerdict.NOT_JUDGED),
        ([], [], False, RunVerdict.NOT_JUDGED),
    ],
)
def test_verdict(subjects: list[SubjectReport], others: list[str], is_interrupted: bool, verdict: RunVerdict) -> None:
    assert verdict_of(subjects, PlantedBugs(), others, (), is_interrupted) is verdict


def test_bugs_alone_can_pass_and_fail() -> None:
    assert verdict_of((), PlantedBugs(planted=3, killed=3), (), (), False) is RunVerdict.PASSED
    assert verdict_of((), PlantedBugs(planted=3, killed=2), (), (), False) is RunVerdict.FAILED


def test_subject_is_what_it_was_made_of() -> None:
    run = subject(failed(), failed("out")).run()
    assert isinstance(run, RunRecord)
    again = SubjectReport.of("a:B", "a:B", None, run, ("length 1", "length P"), run.gaps())
    assert again == subject(failed(), failed("out"))
    assert run.verdict.boundary_classes == {"length 1": 1}, "a class that nothing visited is not among them"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "x.json: is not JSON"),
        ("[" * 100_000, "x.json: is not JSON"),
        ("[]", "x.json: is not a report of a run; write one with --oracle-json"),
        ('{"schema_version": 2}', "x.json: is a report of version 2; this is version 1"),
        ('{"schema_version": 1}', "x.json: verdict: Field required"),
    ],
)
def test_whatever_is_no_report_is_refused_in_one_line(text: str, cause: str) -> None:
    with pytest.raises(ScenarioError) as refused:
        report_from_json(text, "x.json")
    assert str(refused.value).startswith(cause)
    assert len(str(refused.value).splitlines()) == 1


def test_file_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b"\xff")
    for name, cause in (("absent.json", "No such file"), ("latin.json", "save it as UTF-8")):
        with pytest.raises(ScenarioError, match=cause):
            written_text(tmp_path / name)
