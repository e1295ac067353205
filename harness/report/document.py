"""The report of a run for machines: one JSON document with everything that the run found.

``docs/report.schema.json`` is its schema. ``REPORT_VERSION`` changes whenever an older document would be read wrongly.
"""

from __future__ import annotations

import enum
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.checks.declared import DeclaredTally
from nsa_oracle.harness.checks.tally import LayerTally, Tally
from nsa_oracle.harness.checks.verdict import Verdict
from nsa_oracle.harness.errors import ScenarioError, one_line
from nsa_oracle.harness.findings import Finding
from nsa_oracle.harness.graphs.audit import AuditTally
from nsa_oracle.harness.report.records import FailureRecord, RunRecord, grouped
from nsa_oracle.harness.scenarios.files import from_json
from nsa_oracle.harness.scenarios.story import story

REPORT_VERSION: Literal[1] = 1
MOST_BYTES = 1 << 28  # of a report that is read
PROCESS = "process"  # the check of a case that ended the process which judged it


class ReportPart(BaseModel):
    """A part of a report: frozen, and without fields that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunVerdict(enum.StrEnum):
    """How a run ended. ``NOT_JUDGED``: nothing failed, and not everything that was to be judged was."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_JUDGED = "not judged"
    INTERRUPTED = "interrupted"


class Coverage(ReportPart):
    """What was covered by cases that passed. Both runs of each case count.

    cases, replays, eager_calls: numbers of what was judged. fields, cells: of metadata compared. layers: what was
    compared of attention layers, by stage, with the largest fraction of the error bound that was used; and the calls of
    the layer's own methods. audit: what was inspected in captured graphs. declared: the waivers and other declared
    differences, with their use. interpreted: kernels that could not be compiled for the CPU, and why. thread_errors:
    how often each exception has ended a thread of judged code.
    """

    cases: int
    replays: int
    eager_calls: int
    fields: int
    cells: int
    layers: LayerTally
    audit: AuditTally
    declared: DeclaredTally
    interpreted: dict[str, str]
    thread_errors: dict[str, int]

    @staticmethod
    def of(verdict: Verdict) -> Coverage:
        """What ``verdict`` says, without the classes."""
        return Coverage(
            cases=verdict.cases,
            replays=verdict.replays,
            eager_calls=verdict.eager_calls,
            fields=verdict.tally.fields,
            cells=verdict.tally.cells,
            layers=verdict.layers,
            audit=verdict.audit,
            declared=verdict.declared,
            interpreted=verdict.interpreted,
            thread_errors=verdict.thread_errors,
        )

    def verdict(self, classes: Mapping[str, int]) -> Verdict:
        """The verdict that this is ``of``. classes: how many cases visited each."""
        return Verdict(
            self.cases,
            self.replays,
            self.eager_calls,
            Tally(self.fields, self.cells),
            self.layers,
            self.audit,
            Counter({name: count for name, count in classes.items() if count}),
            self.declared,
            dict(self.interpreted),
            dict(self.thread_errors),
        )


class EqualCase(ReportPart):
    """A further case that fails alike. size: letters of its record. saved: its file. replay: the command line."""

    replay: str
    saved: str = ""
    size: int = 0
    optimizations: tuple[str, ...] = ()


class FoundReport(ReportPart):
    """What is wrong, shown by the smallest case, and the other cases that fail alike.

    check: the check that found it, or "process" for a case that ended its process. story: the case in words. case: the
    saved case itself, to write to a file and replay. event: the index of the event that shows it. text: the report
    that people read. finding: place, values and cells of the wrong field, if a comparison found it.
    """

    kind: str
    field: str
    check: str
    sentence: str
    story: str
    case: dict[str, Any] | None
    event: int | None
    optimizations: tuple[str, ...]
    size: int
    saved: str
    replay: str
    text: str
    finding: Finding | None
    equal: tuple[EqualCase, ...]

    @staticmethod
    def of(group: Sequence[FailureRecord]) -> FoundReport:
        """group: failures that are alike, that of the smallest case first."""
        first, *others = group
        return FoundReport(
            kind=first.kind,
            field=first.field,
            check=PROCESS if first.finding is None else Check.of(first.finding).value,
            sentence=first.sentence,
            story=story(from_json(first.case), first.event) if first.case else "",
            case=json.loads(first.case) if first.case else None,
            event=first.event,
            optimizations=first.optimizations,
            size=first.size,
            saved=first.saved,
            replay=first.command,
            text=first.report,
            finding=first.finding,
            equal=tuple(
                EqualCase(replay=o.command, saved=o.saved, size=o.size, optimizations=o.optimizations) for o in others
            ),
        )

    def failures(self) -> list[FailureRecord]:
        """The records that this is ``of``; those of equal cases without their texts."""
        case = "" if self.case is None else json.dumps(self.case)
        first = FailureRecord(
            self.kind,
            self.field,
            self.sentence,
            self.replay,
            self.text,
            self.optimizations,
            self.size,
            self.saved,
            case,
            self.event,
            self.finding,
        )
        return [
            first,
            *(
                FailureRecord(self.kind, self.field, "", o.replay, "", o.optimizations, o.size, o.saved)
                for o in self.equal
            ),
        ]


class QuotaReport(ReportPart):
    """What was drawn. drawn: cases by test. missing: classes that cases of metadata alone, and those with a layer, were
    to visit and did not, because time was up.
    """

    drawn: dict[str, int]
    seeds: tuple[int, ...]
    missing_of_metadata: tuple[str, ...]
    missing_with_a_layer: tuple[str, ...]


def _missing(run: RunRecord, with_layer: bool) -> tuple[str, ...]:
    return tuple(n for n in dict.fromkeys(run.missing[with_layer]) if n not in run.verdict.boundary_classes)


class SubjectReport(ReportPart):
    """What a run found about one backend and layer; null stands for those of ``optimized/``.

    classes: how many cases visited each boundary class; 0: none did. unfit: saved cases that are outside of declared
    limits. without: why there was no saved case. left_out: what declared limits exclude. options: the options of the
    command line that its tests took. items: number of test items. gaps: why the run proves less than it seems to.
    failed_cases: how many cases failed, by the field or stage that was wrong.
    """

    name: str
    backend: str | None
    layer: str | None
    coverage: Coverage
    classes: dict[str, int]
    quota: QuotaReport
    unfit: tuple[str, ...]
    without: str
    left_out: tuple[str, ...]
    options: tuple[str, ...]
    items: int
    gaps: tuple[str, ...]
    found: tuple[FoundReport, ...]
    failed_cases: dict[str, int]

    @staticmethod
    def of(
        name: str, backend: str | None, layer: str | None, run: RunRecord, known: Sequence[str], gaps: Sequence[str]
    ) -> SubjectReport:
        """known: all classes that cases can visit."""
        return SubjectReport(
            name=name,
            backend=backend,
            layer=layer,
            coverage=Coverage.of(run.verdict),
            classes={name: run.verdict.boundary_classes[name] for name in known},
            quota=QuotaReport(
                drawn=dict(run.drawn),
                seeds=tuple(sorted(run.seeds)),
                missing_of_metadata=_missing(run, with_layer=False),
                missing_with_a_layer=_missing(run, with_layer=True),
            ),
            unfit=tuple(sorted(run.unfit)),
            without=run.without,
            left_out=tuple(run.left_out),
            options=tuple(sorted(run.options)),
            items=run.items,
            gaps=tuple(gaps),
            found=tuple(FoundReport.of(group) for group in grouped(run.failures)),
            failed_cases=dict(Counter(failure.field for failure in run.failures)),
        )

    def run(self) -> RunRecord:
        """The record that this is ``of``."""
        return RunRecord(
            verdict=self.coverage.verdict(self.classes),
            failures=[failure for found in self.found for failure in found.failures()],
            drawn=Counter(self.quota.drawn),
            seeds=set(self.quota.seeds),
            missing={False: list(self.quota.missing_of_metadata), True: list(self.quota.missing_with_a_layer)},
            left_out=list(self.left_out),
            unfit=list(self.unfit),
            without=self.without,
            options=set(self.options),
            items=self.items,
        )


class Environment(ReportPart):
    """Where and how a run judged. gpu: its name, if it judged on one. profile: of the run, unless a test names its own.

    versions: of the packages that a verdict may depend on.
    """

    device: str
    gpu: str
    platform: str
    profile: str
    versions: dict[str, str]


class Totals(ReportPart):
    """Of all subjects. failing_cases: number of cases that failed; findings: of different ones."""

    cases: int
    replays: int
    eager_calls: int
    fields: int
    cells: int
    failing_cases: int
    findings: int

    @staticmethod
    def of(subjects: Sequence[SubjectReport]) -> Totals:
        covered, found = [subject.coverage for subject in subjects], [f for s in subjects for f in s.found]
        return Totals(
            cases=sum(c.cases for c in covered),
            replays=sum(c.replays for c in covered),
            eager_calls=sum(c.eager_calls for c in covered),
            fields=sum(c.fields for c in covered),
            cells=sum(c.cells for c in covered),
            failing_cases=sum(1 + len(f.equal) for f in found),
            findings=len(found),
        )


class PlantedBugs(ReportPart):
    """Bugs of the zoo that were planted, and how many of them were killed."""

    planted: int = 0
    killed: int = 0


class RunReport(ReportPart):
    """The whole of one run, or of several shards of one.

    exit_code: of pytest. failed_otherwise: tests that failed without a finding, such as one that names a backend that
    cannot be judged. started: date and time in UTC. seconds: of the run; durations: the time of tests of the oracle
    by name, summed over processes. unjudged: options that no test took, and shards that are missing. shards: the parts
    of a run that this is, such as "1/3"; empty for a whole one.
    """

    schema_version: Literal[1] = REPORT_VERSION
    verdict: RunVerdict
    exit_code: int
    started: str
    seconds: float
    durations: dict[str, float]
    environment: Environment
    totals: Totals
    bugs: PlantedBugs
    failed_otherwise: tuple[str, ...]
    unjudged: tuple[str, ...]
    shards: tuple[str, ...]
    subjects: tuple[SubjectReport, ...]

    @property
    def gaps(self) -> list[str]:
        """Why the run proves less than it seems to."""
        return [*(gap for subject in self.subjects for gap in subject.gaps), *self.unjudged]


def verdict_of(
    subjects: Sequence[SubjectReport],
    bugs: PlantedBugs,
    failed_otherwise: Sequence[str],
    unjudged: Sequence[str],
    is_interrupted: bool,
) -> RunVerdict:
    """How a run ended. The arguments are those of ``RunReport``."""
    if failed_otherwise or any(subject.found for subject in subjects) or bugs.killed < bugs.planted:
        return RunVerdict.FAILED
    if is_interrupted:
        return RunVerdict.INTERRUPTED
    has_judged = bugs.planted or any(subject.coverage.cases for subject in subjects)
    if unjudged or not has_judged or any(subject.gaps for subject in subjects):
        return RunVerdict.NOT_JUDGED
    return RunVerdict.PASSED


def report_as_json(report: RunReport) -> str:
    """Readable JSON, in ASCII: names of files may be no text."""
    return json.dumps(report.model_dump(mode="json"), indent=1) + "\n"


def report_from_json(text: str, source: str) -> RunReport:
    """Raises ScenarioError, in one line that names ``source``, if ``text`` is not a report of this version."""
    try:
        data = json.loads(text)
        if not isinstance(data, dict) or "schema_version" not in data:
            raise ScenarioError(f"{source}: is not a report of a run; write one with --oracle-json")
        if data["schema_version"] != REPORT_VERSION:
            version = one_line(str(data["schema_version"]), 40)
            raise ScenarioError(f"{source}: is a report of version {version}; this is version {REPORT_VERSION}")
        return RunReport.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ScenarioError(f"{source}: {one_line(place, 80)}: {one_line(first['msg'], 80)}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ScenarioError):
            raise
        raise ScenarioError(f"{source}: is not JSON: {one_line(str(error), 80)}") from None


def report_schema() -> str:
    """The JSON schema of a report."""
    return json.dumps(RunReport.model_json_schema(mode="serialization"), indent=1) + "\n"


def written_text(file: Path) -> str:
    """The text of a file. Raises ScenarioError, in one line, if it cannot be read."""
    source = one_line(str(file))
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ScenarioError(f"{source}: has more than {MOST_BYTES:,} bytes, which no report needs")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ScenarioError(f"{source}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{source}: cannot be read: {error}; save it as UTF-8") from None
