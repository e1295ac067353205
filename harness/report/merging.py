"""Merges reports of parts of a run into one, as if one run had judged all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.report.document import (
    PlantedBugs,
    RunReport,
    RunVerdict,
    SubjectReport,
    Totals,
    verdict_of,
)
from nsa_oracle.harness.report.records import RunRecord

FAILED_RUN = 1  # exit code
LOST = "NOT JUDGED: shard"


def merged(reports: Sequence[RunReport]) -> RunReport:
    """The report of all ``reports``, at least one: counts and findings add up, and findings that are alike are one.

    What only a whole run can show not to be judged is asked of the whole. Raises ScenarioError if they are of
    different devices or profiles, or if a shard is given twice.
    """
    first = reports[0]
    for what in ("device", "profile"):
        values = list(dict.fromkeys(getattr(report.environment, what) for report in reports))
        if len(values) > 1:
            raise ScenarioError(f"the reports are of different {what}s: {', '.join(values)}; merge those of one")
    shards = sorted(shard for report in reports for shard in report.shards)
    if twice := [shard for shard, count in Counter(shards).items() if count > 1]:
        raise ScenarioError(f"shard {twice[0]} is given twice; name each report once")
    lost = _lost(shards)
    subjects = _subjects(reports, is_part=bool(lost))
    bugs = PlantedBugs(planted=sum(r.bugs.planted for r in reports), killed=sum(r.bugs.killed for r in reports))
    known = (line for report in reports for line in report.unjudged if not line.startswith(LOST))
    unjudged = tuple(dict.fromkeys([*known, *lost]))
    is_interrupted = any(report.verdict is RunVerdict.INTERRUPTED for report in reports)
    failed = tuple(dict.fromkeys(test for report in reports for test in report.failed_otherwise))
    verdict = verdict_of(subjects, bugs, failed, unjudged, is_interrupted)
    durations: dict[str, float] = {}
    for name, seconds in (pair for report in reports for pair in report.durations.items()):
        durations[name] = durations.get(name, 0.0) + seconds
    return RunReport(
        verdict=verdict,
        exit_code=0 if verdict is RunVerdict.PASSED else max(FAILED_RUN, *(report.exit_code for report in reports)),
        started=min(report.started for report in reports),
        seconds=max(report.seconds for report in reports),
        durations=durations,
        environment=first.environment,
        totals=Totals.of(subjects),
        bugs=bugs,
        failed_otherwise=failed,
        unjudged=unjudged,
        shards=tuple(shards) if lost else (),
        subjects=tuple(subjects),
    )


def _lost(shards: Sequence[str]) -> list[str]:
    """A line for each shard of ``shards`` that is missing. Raises ScenarioError if they are of several runs."""
    counts = {shard.partition("/")[2] for shard in shards}
    if len(counts) > 1:
        raise ScenarioError(f"the shards are of different runs: {', '.join(shards)}; merge those of one")
    every = [f"{number}/{count}" for count in counts for number in range(1, int(count) + 1)]
    return [f"{LOST} {shard} is not among the reports" for shard in every if shard not in shards]


def _subjects(reports: Sequence[RunReport], is_part: bool) -> list[SubjectReport]:
    parts: dict[tuple[str | None, str | None], list[SubjectReport]] = {}
    for report in reports:
        for subject in report.subjects:
            parts.setdefault((subject.backend, subject.layer), []).append(subject)
    subjects = []
    for (backend, layer), alike in parts.items():
        run = RunRecord()
        for part in alike:
            run.join(part.run())
        known = max((part.classes for part in alike), key=len)  # a part without a layer knows no classes of one
        gaps = run.gaps(layer if backend is None else None, is_part)
        subjects.append(SubjectReport.of(alike[0].name, backend, layer, run, list(known), gaps))
    return subjects
