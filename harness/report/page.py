"""A page to look at, of reports of runs, kills of planted bugs, surveys and benchmarks: one HTML file by itself.

It loads nothing, needs no network, and has no script but the one that copies a line.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.findings import WRONG, Picture
from nsa_oracle.harness.protocol import STAGES
from nsa_oracle.harness.report.document import FoundReport, RunReport, SubjectReport, report_from_json
from nsa_oracle.harness.report.timeline import Timeline, timeline
from nsa_oracle.harness.scenarios.files import from_json

TEMPLATES = Path(__file__).parent / "templates"
MOST_PAGE_BYTES = 2 * 1000 * 1000
NOT_SHOWN = "..."


@dataclass(frozen=True)
class PageLimits:
    """What a page shows at most. cells: of all pictures together. findings: of each subject, with their pictures.

    lines: of a story. events, requests: of a timeline. case_bytes: of a case that is shown as text.
    """

    cells: int = 12_288
    findings: int = 60
    lines: int = 120
    events: int = 100
    requests: int = 24
    case_bytes: int = 20_000

    def half(self) -> PageLimits:
        return PageLimits(**{name: max(1, value // 2) for name, value in vars(self).items()})


class PageInput(BaseModel):
    """Something that another command wrote; what a page does not show is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class KillRow(PageInput):
    """A planted bug and the check that killed it, as ``bugs --json`` writes it."""

    bug: str
    check: str | None
    meant: bool
    cases: int
    seconds: float
    sentence: str = ""
    what: str = ""
    reference: str = ""
    group: str = ""


class SurveyRows(PageInput):
    """A survey of a backend or a layer, as ``survey --json`` writes it."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    cases: int
    rows: tuple[dict[str, Any], ...]

    @property
    def columns(self) -> list[str]:
        """Names of the columns. A row names its case in the line that replays it."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name != "case"))


class TimedRow(PageInput):
    """The median of one benchmark, in microseconds."""

    subject: str
    median: float


@dataclass(frozen=True)
class PageContent:
    """What a page shows. runs, kills, surveys: each with the name of its file. benchmarks: medians by group."""

    runs: tuple[tuple[str, RunReport], ...] = ()
    kills: tuple[tuple[str, tuple[KillRow, ...]], ...] = ()
    surveys: tuple[tuple[str, SurveyRows], ...] = ()
    benchmarks: Mapping[str, Sequence[TimedRow]] = field(default_factory=dict)

    def and_file(self, text: str, source: str) -> PageContent:
        """What this shows, and what ``text`` holds, in any form that a command writes. Raises ScenarioError."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            data = None
        try:
            if isinstance(data, list):
                kills = TypeAdapter(tuple[KillRow, ...]).validate_python(data)
                return replace(self, kills=(*self.kills, (source, kills)))
            if isinstance(data, dict) and "benchmarks" in data:
                return replace(self, benchmarks={**self.benchmarks, **_timed(data["benchmarks"])})
            if isinstance(data, dict) and "rows" in data:
                return replace(self, surveys=(*self.surveys, (source, SurveyRows.model_validate(data))))
        except (ValidationError, LookupError, TypeError, AttributeError):
            raise ScenarioError(f"{source}: is not what bugs, survey or pytest-benchmark write as JSON") from None
        return replace(self, runs=(*self.runs, (source, report_from_json(text, source))))


def _timed(benchmarks: Any) -> dict[str, list[TimedRow]]:
    """Medians by group, of what pytest-benchmark wrote."""
    groups: dict[str, list[TimedRow]] = {}
    for benchmark in benchmarks:
        params, name = benchmark.get("params") or {}, benchmark.get("param") or benchmark["name"]
        subject = str(params.get("name") or str(name).partition("-")[0])
        row = TimedRow(subject=subject, median=benchmark["stats"]["median"] * 1e6)
        groups.setdefault(str(benchmark["group"]), []).append(row)
    return groups


@dataclass(frozen=True)
class StageRow:
    """A stage of a layer. worst: the largest fraction of the error bound that was used, if it has one."""

    name: str
    exact: int
    bounded: int
    weaker: int
    declared: str
    worst: float | None
    failures: int


def stage_rows(subject: SubjectReport) -> list[StageRow]:
    """The stages that were compared, or failed, in order."""
    rows = []
    for name in STAGES:
        stage = subject.coverage.layers.stages.get(name)
        failures = subject.failed_cases.get(name, 0)
        if stage is not None:
            worst = stage.worst if stage.bounded or stage.worst else None
            rows.append(StageRow(name, stage.exact, stage.bounded, stage.weaker, stage.declared, worst, failures))
        elif failures:
            rows.append(StageRow(name, 0, 0, 0, "", None, failures))
    return rows


def cropped(picture: Picture, side: int) -> Picture:
    """At most ``side`` rows and columns of ``picture``, around its first wrong cell."""
    row = next((n for n, r in enumerate(picture.rows) if WRONG in r.states), 0)
    column = max(0, picture.rows[row].states.find(WRONG)) if picture.rows else 0
    width = len(picture.rows[0].states) if picture.rows else 0
    top, left = (max(0, min(at - side // 2, n - side)) for at, n in ((row, len(picture.rows)), (column, width)))
    kept = tuple(
        replace(
            r,
            states=r.states[left : left + side],
            got=r.got[left : left + side],
            expected=r.expected[left : left + side],
        )
        for r in picture.rows[top : top + side]
    )
    return replace(picture, row=picture.row + top, column=picture.column + left, rows=kept)


@dataclass(frozen=True)
class Shown:
    """Makes what templates ask for, within the limits. side: of a picture."""

    limits: PageLimits
    side: int

    def picture(self, found: FoundReport) -> Picture | None:
        """The cells of the wrong field, if they are known."""
        picture = None if found.finding is None else found.finding.picture
        return None if picture is None else cropped(picture, self.side)

    def timeline(self, found: FoundReport) -> Timeline | None:
        """The case of a finding as a timeline, if it is known."""
        if found.case is None:
            return None
        try:
            scenario = from_json(json.dumps(found.case))
        except ScenarioError:  # of another version
            return None
        return timeline(scenario, found.event, self.limits.events, self.limits.requests)

    def story(self, found: FoundReport) -> list[str]:
        """The lines of the story; of a long one those around the event that fails."""
        lines, most = found.story.splitlines(), self.limits.lines
        if len(lines) <= most:
            return lines
        failing = next((n for n, line in enumerate(lines) if line.endswith("<- fails here")), 0)
        head = min(8, most // 2)
        start = max(head, min(failing - most // 2, len(lines) - (most - head)))
        middle = lines[start : start + most - head]
        gaps = [NOT_SHOWN] if start > head else [], [NOT_SHOWN] if start + len(middle) < len(lines) else []
        return [*lines[:head], *gaps[0], *middle, *gaps[1]]

    def case(self, found: FoundReport) -> str:
        """The case as text; empty if it is long, as its file then is."""
        text = "" if found.case is None else json.dumps(found.case, indent=1)
        return text if len(text) <= self.limits.case_bytes else ""


def page(content: PageContent, title: str = "Oracle") -> str:
    """The page as HTML, of less than ``MOST_PAGE_BYTES``."""
    limits = PageLimits()
    while True:
        text = _rendered(content, title, limits)
        if len(text.encode(errors="replace")) < MOST_PAGE_BYTES or limits.cells <= 1:
            return text
        limits = limits.half()


def _rendered(content: PageContent, title: str, limits: PageLimits) -> str:
    pictured = [
        found
        for _, run in content.runs
        for subject in run.subjects
        for found in subject.found[: limits.findings]
        if found.finding is not None and found.finding.picture is not None
    ]
    side = max(3, int((limits.cells / max(1, len(pictured))) ** 0.5))
    shown = Shown(limits, side)
    checks = [list(dict.fromkeys(kill.check for kill in kills if kill.check)) for _, kills in content.kills]
    text = (
        _templates()
        .get_template("page.html")
        .render(content=content, title=title, limits=limits, shown=shown, stage_rows=stage_rows, checks=checks)
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # names of files may be no text


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = "{:,}".format
    environment.filters["percent"] = lambda part: f"{min(100.0, 100 * part):.2f}"
    environment.filters["short"] = "{:.2g}".format
    return environment
