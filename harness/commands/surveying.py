"""Surveys a layer or a backend in a fork, so that a case that ends its process costs that case only; what it prints."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import typer

from nsa_oracle.harness.commands.app import Device, torch_device
from nsa_oracle.harness.commands.terminal import ended_by_a_signal
from nsa_oracle.harness.errors import BackendError, ScenarioError
from nsa_oracle.harness.forks import Tell, forked
from nsa_oracle.harness.judge import OracleFailure, judge_subject
from nsa_oracle.harness.processes import ChildDied
from nsa_oracle.harness.report.declared import declared_lines, unneeded_declarations
from nsa_oracle.harness.report.records import NOTHING_COMPARED
from nsa_oracle.harness.report.summary import methods_report
from nsa_oracle.harness.report.text import render, wrapped
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.search.backend_survey import BackendFound, BackendSurvey, Property, backend_table
from nsa_oracle.harness.search.reach import Reach
from nsa_oracle.harness.search.rows import Row, save_rows
from nsa_oracle.harness.search.spec import SubjectSpec
from nsa_oracle.harness.search.survey import Survey, SurveyFound, survey_table

_CONFIRMING = 30.0  # seconds for the cases of all rows
NO_CASE = "NOT JUDGED: no case was surveyed; give it more time"


@dataclass
class SurveyedLayer:
    """What a survey of a layer finds, and how far it is; as ``SurveyedBackend``. shrinking: the name of a row."""

    found: SurveyFound = field(default_factory=SurveyFound)
    left_out: list[str] = field(default_factory=list)
    device: str = "cpu"
    interrupted: bool = False
    began: Scenario | None = None
    shrinking: str | None = None


def surveyed(
    layer: str,
    device: Device,
    cases: int,
    seed: int,
    deadline: float | None,
    report_progress: Callable[[int], None],
    timeout: float | None = None,
) -> SurveyedLayer:
    """Survey ``layer`` and make the case of each broken row small.

    timeout: of a case, in seconds. Raises BackendError or ValueError if the layer cannot be surveyed. The other
    arguments are those of ``Survey.run``.
    """
    last, has_begun, spec = SurveyedLayer(), False, SubjectSpec(None, layer, timeout)

    def hear(message: SurveyedLayer) -> None:
        nonlocal last, has_begun
        last, has_begun = message, True
        report_progress(last.found.cases)

    def work(tell: Tell) -> SurveyedLayer:
        where = torch_device(device)
        survey = Survey(spec.build(where), where, last.found)
        now = SurveyedLayer(survey.found, survey.left_out, where.type)

        def begin(case: Scenario | None = None, row: str | None = None) -> None:
            now.began, now.shrinking = case, row
            tell(now)

        begin()
        try:
            with ended_by_a_signal():
                survey.run(cases, seed, deadline, begin=begin)
                survey.shrink(deadline, begin=lambda row: begin(row=row))
        except KeyboardInterrupt:
            now.interrupted = True
        return now

    while True:
        has_begun = False
        try:
            last = forked(work, hear)
            if not last.interrupted:
                _confirm(last.found.broken.values(), spec, device, deadline)
            return last
        except ChildDied as died:
            if has_begun and last.shrinking is not None:
                last.found.kept.add(last.shrinking)
            elif has_begun and last.began is not None:
                last.found.add_lost(str(died), last.began)
            else:
                raise BackendError(f"layer '{layer}': {died} while it was loaded") from None
        except KeyboardInterrupt:  # of a process that did not answer any more
            if not has_begun:
                raise
            last.interrupted = True
            return last


@dataclass
class SurveyedBackend:
    """What a survey of a backend finds, and how far it is.

    left_out: what the backend's limits exclude. device: where it runs, "cpu" or "cuda". began: the case that is being
    surveyed. shrinking: the row whose case is being made smaller. known: how many saved cases have been begun.
    """

    found: BackendFound = field(default_factory=BackendFound)
    left_out: list[str] = field(default_factory=list)
    device: str = "cpu"
    interrupted: bool = False
    began: Scenario | None = None
    shrinking: Property | None = None
    known: int = 0


def surveyed_backend(
    backend: str,
    device: Device,
    cases: int,
    seed: int,
    deadline: float | None,
    report_progress: Callable[[int], None],
    known: Sequence[tuple[Path, Scenario]] = (),
    skip_unfit: bool = False,
    timeout: float | None = None,
) -> SurveyedBackend:
    """Survey ``backend`` and make the case of each broken row small.

    known: saved cases and their files, which are surveyed before the drawn ones and not counted. skip_unfit: leave out
    those that are outside the backend's limits. timeout: of a case, in seconds. A case that ends its process is a
    violation of a row of its own. Raises BackendError, ScenarioError or ValueError if the backend cannot be surveyed,
    or not with these cases. The other arguments are those of ``BackendSurvey.run``.
    """
    last, has_begun, spec = SurveyedBackend(), False, SubjectSpec(backend, None, timeout)

    def hear(message: SurveyedBackend) -> None:
        nonlocal last, has_begun
        last, has_begun = message, True
        report_progress(last.found.cases)

    def work(tell: Tell) -> SurveyedBackend:
        where = torch_device(device)
        survey = BackendSurvey(spec.build(where), where, last.found)
        now = SurveyedBackend(survey.found, survey.left_out, where.type, known=last.known)

        def begin(case: Scenario | None = None, row: Property | None = None) -> None:
            now.began, now.shrinking = case, row
            tell(now)

        begin()
        try:
            with ended_by_a_signal():
                for file, case in known[now.known :]:
                    if deadline is not None and time.monotonic() > deadline:
                        break
                    now.known += 1
                    if not skip_unfit:
                        survey.subject.check(case, file)
                    if survey.subject.misfit(case) is None:
                        begin(case)
                        survey.survey(case)
                survey.run(cases, seed, deadline, begin=begin)
                survey.shrink(deadline, begin=lambda row: begin(row=row))
        except KeyboardInterrupt:
            now.interrupted = True
        return now

    while True:
        has_begun = False
        try:
            last = forked(work, hear)
            if not last.interrupted:
                _confirm(last.found.broken.values(), spec, device, deadline)
            return last
        except ChildDied as died:
            if has_begun and last.shrinking is not None:
                last.found.kept.add(last.shrinking)
            elif has_begun and last.began is not None:
                is_drawn = last.began not in [case for _, case in known]
                last.found.note_survival(str(died), last.began, is_drawn)
            else:
                raise BackendError(f"backend '{backend}': {died} while it was loaded") from None
        except KeyboardInterrupt:  # of a process that did not answer any more
            if not has_begun:
                raise
            last.interrupted = True
            return last


def backend_report(found: BackendFound, save: Path, replay: Callable[[Path], str]) -> list[str]:
    """Print the broken rows, and save the case of each. Returns why the survey proves less than it seems to.

    Raises ScenarioError if the cases cannot be saved; the table has been printed then.
    """
    if not found.rows:
        return [NO_CASE]
    typer.echo(render(backend_table(found.broken)) if found.broken else "no row is broken")
    typer.echo(f"{len(found.rows)} rows, {sum(row.checked for row in found.rows.values()):,} checks")
    _show_reach(found.reach)
    _save(list(found.broken.values()), save, replay)
    _show_replays({" ".join(key): row for key, row in found.broken.items()})
    for line in declared_lines(found.declared):
        typer.echo(line)
    gaps = unneeded_declarations(found.declared)
    return gaps if found.broken or found.has_compared else [*gaps, NOTHING_COMPARED]


def layer_report(found: SurveyFound, save: Path, replay: Callable[[Path], str]) -> list[str]:
    """Print all rows, and save the case of each broken one; as ``backend_report``."""
    if not found.cases:
        return [NO_CASE]
    typer.echo(render(survey_table(found.rows)))
    if found.layers.calls:
        typer.echo(methods_report(found.layers))
    _show_reach(found.reach)
    _save(list(found.broken.values()), save, replay)
    _show_replays(found.broken)
    return []


def _show_reach(reach: Reach) -> None:
    if reach.largest:
        typer.echo(wrapped("reached: ", reach.largest))
        typer.echo(wrapped("judged: ", reach.calls))


def _save(rows: Sequence[Row], folder: Path, replay: Callable[[Path], str]) -> None:
    try:
        save_rows(rows, folder, replay)
    except OSError as error:
        raise ScenarioError(f"{folder}: cannot be written: {error.strerror or error}; choose another --save") from None


def _show_replays(broken: Mapping[str, Row]) -> None:
    """The commands that replay the cases of rows, which may have one case; last the rows whose cases pass alone."""
    for command in dict.fromkeys(row.replay for row in broken.values() if row.replay):
        shown = [name for name, row in broken.items() if row.replay == command]
        typer.echo(f"{'; '.join(shown)}\n  replay: {command}")
    for name, row in broken.items():
        if not row.replay:
            typer.echo(f"{name}\n  case: {row.saved} (passes by itself)")


def _confirm(rows: Iterable[Row], spec: SubjectSpec, device: Device, deadline: float | None) -> None:
    """Note which cases pass if a process of its own judges each, so that no command is printed that shows nothing.

    Judged code may count calls over all cases, in a class or a module. A case that does not end is not tried again, and
    none is after ``deadline`` or ``_CONFIRMING`` seconds.
    """
    latest = time.monotonic() + _CONFIRMING
    ends = latest if deadline is None else min(latest, deadline)
    groups: dict[str, tuple[Scenario, list[Row]]] = {}
    for row in rows:
        if row.case is not None and not row.has_hung and not row.passes_alone:
            groups.setdefault(row.case.model_dump_json(), (row.case, []))[1].append(row)
    for case, group in groups.values():
        left = ends - time.monotonic()
        if left <= 0:
            return
        with suppress(ChildDied):  # which replays as it died here
            passes = forked(functools.partial(_passes, spec, device, case), timeout=left)
            for row in group:
                row.passes_alone = passes


def _passes(spec: SubjectSpec, device: Device, case: Scenario, tell: Tell) -> bool:
    """Whether the case passes; one that cannot be judged does."""
    where = torch_device(device)
    try:
        judge_subject(spec.build(where), case, where)
    except OracleFailure:
        return False
    except (BackendError, ScenarioError):
        pass
    return True
