"""Surveys a layer or a backend in a fork, so that a case that ends its process costs that case only; what it prints."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
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
from nsa_oracle.harness.search.progress import shrinking_words
from nsa_oracle.harness.search.reach import Reach
from nsa_oracle.harness.search.rows import SHRINKING_BUDGET, Row, save_rows
from nsa_oracle.harness.search.spec import SubjectSpec
from nsa_oracle.harness.search.survey import Survey, SurveyFound, survey_table
from nsa_oracle.harness.subjects.subject import Subject

_CONFIRMING = 30.0  # seconds for the cases of all rows
NO_CASE = "NOT JUDGED: no case was surveyed; give it more time"


_Found = TypeVar("_Found", bound="_IsFound")
_Survey = TypeVar("_Survey", bound="_IsSurvey")
Show = Callable[[int, str], None]
"""Shows how many cases are finished, and in words what is being made smaller; "" if nothing is."""


@dataclass
class Surveyed(Generic[_Found]):
    """What a survey finds, and how far it is.

    left_out: what the limits exclude. device: where it runs, "cpu" or "cuda". began: the case that is being surveyed.
    known: how many saved cases have been begun. shrinking: the row whose case is being made smaller, which has
    ``events`` events by now; ends: the value of ``time.monotonic()`` after which no trial of that begins.
    """

    found: _Found
    left_out: list[str] = field(default_factory=list)
    device: str = "cpu"
    interrupted: bool = False
    began: Scenario | None = None
    known: int = 0
    shrinking: str | Property | None = None
    events: int = 0
    ends: float = 0.0

    def told(self) -> str:
        """What is being made smaller, in words; "" if nothing is."""
        if self.shrinking is None:
            return ""
        name = self.shrinking if isinstance(self.shrinking, str) else " ".join(self.shrinking)
        return shrinking_words(name, self.events, self.ends - time.monotonic())


SurveyedLayer = Surveyed[SurveyFound]
SurveyedBackend = Surveyed[BackendFound]
Begin = Callable[[Scenario], None]


def surveyed_layer(
    layer: str, device: Device, cases: int, seed: int, deadline: float | None, show: Show, timeout: float | None = None
) -> SurveyedLayer:
    """Survey ``layer`` and make the case of each broken row small.

    timeout: of a case, in seconds. show: is told how far it is. Raises BackendError or ValueError if the layer cannot
    be surveyed. The other arguments are those of ``Survey.run``.
    """

    def run(survey: Survey, now: SurveyedLayer, begin: Begin) -> None:
        survey.run(cases, seed, deadline, begin=begin)

    spec, named = SubjectSpec(None, layer, timeout), f"layer '{layer}'"
    return _surveyed(Surveyed(SurveyFound()), Survey, run, SurveyFound.add_lost, spec, named, device, deadline, show)


def surveyed_backend(
    backend: str,
    device: Device,
    cases: int,
    seed: int,
    deadline: float | None,
    show: Show,
    known: Sequence[tuple[Path, Scenario]] = (),
    skip_unfit: bool = False,
    timeout: float | None = None,
) -> SurveyedBackend:
    """Survey ``backend`` and make the case of each broken row small.

    known: saved cases and their files, which are surveyed before the drawn ones and not counted. skip_unfit: leave out
    those that are outside the backend's limits. timeout: of a case, in seconds. show: is told how far it is. A case
    that ends its process is a violation of a row of its own. Raises BackendError, ScenarioError or ValueError if the
    backend cannot be surveyed, or not with these cases. The other arguments are those of ``BackendSurvey.run``.
    """

    def run(survey: BackendSurvey, now: SurveyedBackend, begin: Begin) -> None:
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

    def lost(found: BackendFound, died: str, case: Scenario) -> None:
        found.note_survival(died, case, is_drawn=case not in [other for _, other in known])

    spec, named = SubjectSpec(backend, None, timeout), f"backend '{backend}'"
    return _surveyed(Surveyed(BackendFound()), BackendSurvey, run, lost, spec, named, device, deadline, show)


class _IsFound(Protocol):
    """What ``SurveyFound`` and ``BackendFound`` have in common."""

    cases: int

    @property
    def kept(self) -> set[Any]: ...

    @property
    def broken(self) -> Mapping[Any, Row]: ...


class _IsSurvey(Protocol):
    """What ``Survey`` and ``BackendSurvey`` have in common."""

    left_out: list[str]

    def shrink(self, deadline: float | None, *, begin: Callable[[Any, Row], None]) -> None: ...


def _surveyed(
    last: Surveyed[_Found],
    make: Callable[[Subject, torch.device, _Found], _Survey],
    run: Callable[[_Survey, Surveyed[_Found], Begin], None],
    lost: Callable[[_Found, str, Scenario], None],
    spec: SubjectSpec,
    named: str,
    device: Device,
    deadline: float | None,
    show: Show,
) -> Surveyed[_Found]:
    """Survey in a fork, and in another one what is left whenever a case has ended it.

    make: a survey that goes on from what was found. run: has it survey cases. lost: counts one that ended its process.
    """
    has_begun = False

    def hear(message: Surveyed[_Found]) -> None:
        nonlocal last, has_begun
        last, has_begun = message, True
        show(last.found.cases, last.told())

    def work(tell: Tell) -> Surveyed[_Found]:
        where = torch_device(device)
        survey = make(spec.build(where), where, last.found)
        now = Surveyed(last.found, survey.left_out, where.type, known=last.known)

        def begin(case: Scenario | None = None) -> None:
            now.began, now.shrinking = case, None
            tell(now)

        def shrink(key: str | Property, row: Row) -> None:
            assert row.case is not None
            now.began, now.shrinking, now.events = None, key, len(row.case.events)
            tell(now)

        begin()
        try:
            with ended_by_a_signal():
                run(survey, now, begin)
                latest = time.monotonic() + SHRINKING_BUDGET
                now.ends = latest if deadline is None else min(deadline, latest)
                survey.shrink(now.ends, begin=shrink)
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
                lost(last.found, str(died), last.began)
            else:
                raise BackendError(f"{named}: {died} while it was loaded") from None
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
