"""Reports of runs, made by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nsa_oracle.harness.checks.tally import Tally
from nsa_oracle.harness.findings import Finding, Kind, Owner, Picture, PictureRow
from nsa_oracle.harness.judge import OracleFailure, Verdict
from nsa_oracle.harness.report.document import Environment, PlantedBugs, RunReport, SubjectReport, Totals, verdict_of
from nsa_oracle.harness.report.records import FailureRecord, ItemRecord, RunRecord
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Finish, Join, Replay, Scenario
from tests.support.metadata_cases import DECODE, case

PICTURE = Picture(
    shape=(2, 3),
    row=0,
    column=0,
    axis="page column",
    rows=(
        PictureRow("row 0 (request 0, draft token 0)", Owner.REQUEST, ".x-", ("1", "1515870810", "0"), ("1", "2", "7")),
        PictureRow("row 1 (padding request 1, draft token 0)", Owner.PADDING, "...", ("4",) * 3, ("4",) * 3),
    ),
)
HISTORY = case(
    Capture(mode=DECODE, buckets=(2,)),
    Join(seq_len=3),
    Join(seq_len=5),
    Replay(mode=DECODE),
    Accept(accept_lengths=(1, 2)),
    Finish(request=0),
    Replay(mode=DECODE),
)


def failed(
    field: str = "real_page_table", scenario: Scenario = HISTORY, picture: Picture | None = PICTURE
) -> FailureRecord:
    """The record of a wrong value in ``field``, at the last event of ``scenario``."""
    finding = Finding(
        Kind.VALUE, field, "1515870810", "2", 0, "row 0, page column 1", differing=1, compared=5, picture=picture
    )
    failure = OracleFailure(scenario, finding, len(scenario.events) - 1)
    return FailureRecord.of(failure, f"nsa-oracle replay {field}.json", f"ORACLE FAILURE  {finding.sentence()}")


def subject(
    *failures: FailureRecord,
    backend: str | None = "a:B",
    cases: int = 2,
    classes: Sequence[str] = ("length 1",),
    known: Sequence[str] = ("length 1", "length P"),
) -> SubjectReport:
    """A subject of whose cases all visited ``classes``."""
    verdict = Verdict(cases, 3 * cases, cases, Tally(cases, 100 * cases), boundary_classes=Counter(classes))
    run = RunRecord()
    run.add(ItemRecord(verdict, failures, backend, drawn_by="test_scenarios", seed=0))
    return SubjectReport.of(backend or "optimized/", backend, None, run, known, run.gaps())


def reported(
    *subjects: SubjectReport,
    shard: str = "",
    profile: str = "dev",
    failed_otherwise: Sequence[str] = (),
    is_interrupted: bool = False,
) -> RunReport:
    """The report of a run on ``subjects``."""
    verdict = verdict_of(subjects, PlantedBugs(), failed_otherwise, (), is_interrupted)
    return RunReport(
        verdict=verdict,
        exit_code=0 if verdict == "passed" else 1,
        started="2030-01-01T00:00:00+00:00",
        seconds=2.5,
        durations={"test_scenarios": 1.5},
        environment=Environment(device="cpu", gpu="", platform="x", profile=profile, versions={"torch": "2"}),
        totals=Totals.of(subjects),
        bugs=PlantedBugs(),
        failed_otherwise=tuple(failed_otherwise),
        unjudged=(),
        shards=(shard,) if shard else (),
        subjects=tuple(subjects),
    )
