"""Surveys a backend's metadata: judges every field of every call and goes on after a failure.

There is one row for each combination of graph or eager call, mode, and field or property. A row counts calls, and a
call is broken however many steps and cells of it differ. After an exception the case continues on a new backend, which
captures the same graphs. What a survey has found can be sent to another process, which goes on from there.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from rich.table import Table

from nsa_oracle.harness.checks.declared import Declared, DeclaredTally
from nsa_oracle.harness.checks.frozen import frozen_value
from nsa_oracle.harness.checks.metadata import differing_fields
from nsa_oracle.harness.checks.tally import Tally
from nsa_oracle.harness.checks.uncapturable import capture_finding
from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.engine.expected import expected_metadata
from nsa_oracle.harness.engine.far_memory import memory_for
from nsa_oracle.harness.engine.observations import Conditions, LayerObservation, Observation
from nsa_oracle.harness.engine.writes import modified_input, stray_write
from nsa_oracle.harness.errors import BackendError, CaptureError, CaseTimeout, ScenarioError, error_line
from nsa_oracle.harness.fields import FIELDS, HOST_SCALARS
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.graphs.callers import judged_frames
from nsa_oracle.harness.interpreter import speed
from nsa_oracle.harness.interruptions import Interruptions, RefusedExits, exits_refused, interruptions_noted
from nsa_oracle.harness.judge import sentinels
from nsa_oracle.harness.memory.poison import POISON_BYTES
from nsa_oracle.harness.processes import time_limit
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Replay, Scenario
from nsa_oracle.harness.search.reach import Reach
from nsa_oracle.harness.search.rows import Row, in_turn, up_to
from nsa_oracle.harness.search.stream import CaseStream
from nsa_oracle.harness.subjects.global_state import Streams
from nsa_oracle.harness.subjects.result_checks import WrongResult
from nsa_oracle.harness.subjects.subject import Subject, scale_of
from nsa_oracle.harness.subjects.warning_filters import shown_warnings

_FIELDS = {field.name for field in FIELDS}
BUILDS, NO_EXCEPTION, CAPTURES = "is built", "runs", "can be captured"
UNMODIFIED, WITHIN, FREEZES_NOTHING = "leaves inputs alone", "writes within its buffers", "freezes no host value"
SURVIVES = "keeps its process alive"
KEEPS_STREAMS = "leaves sys.stdout and sys.stderr open"
SHOWN = "shows what the graph reads"  # addresses; one defect moves many fields, whose content is judged all the same


class Property(NamedTuple):
    """What a row counts. call: "graph", "eager" or "-"; mode: a forward mode or "-"; name: a field or a property."""

    call: str
    mode: str
    name: str


@dataclasses.dataclass
class BackendFound:
    """What a survey has found. cases: number of cases finished; kept: broken rows whose case stays as it is."""

    rows: dict[Property, Row] = dataclasses.field(default_factory=dict)
    declared: DeclaredTally = dataclasses.field(default_factory=DeclaredTally)
    cases: int = 0
    kept: set[Property] = dataclasses.field(default_factory=set)
    reach: Reach = dataclasses.field(default_factory=Reach)

    @property
    def holds(self) -> bool:
        """Whether nothing was broken."""
        return not self.broken

    @property
    def broken(self) -> dict[Property, Row]:
        """The rows that were broken."""
        return {key: row for key, row in self.rows.items() if row.broken}

    @property
    def has_compared(self) -> bool:
        """Whether a tensor of the metadata was compared in any call."""
        return any(key.name in self.declared.own or key.name in _FIELDS for key in self.rows)

    def note_survival(self, fault: str, case: Scenario, is_drawn: bool = True) -> None:
        """Count a case that left its process alive, or ended it as ``fault`` says. is_drawn: it is one of ``cases``."""
        key = Property("-", "-", SURVIVES)
        found = [Finding(Kind.CRASH, "process", fault, "a process that goes on")] if fault else []
        self.rows.setdefault(key, Row()).note(found, case)
        self.kept.add(key)  # a smaller case would have to end as many processes
        self.cases += is_drawn


class BackendSurvey:
    """Draws scenarios within the backend's limits and keeps a row for each property.

    However ``run`` ends, ``found`` holds what was found so far. found: of an earlier part of the same survey, after
    which ``run`` goes on.
    """

    def __init__(self, subject: Subject, device: torch.device, found: BackendFound | None = None) -> None:
        """Raises ValueError if the limits of the subject leave nothing to draw."""
        self.subject = subject
        self.device = device
        self.scale = subject.scale(device, with_layer=False)
        self.left_out = subject.limits.excluded(scale_of(device, with_layer=False).drawn())
        self.found = found or BackendFound()

    def run(
        self,
        cases: int,
        seed: int,
        deadline: float | None = None,
        report_progress: Callable[[int], None] = lambda cases: None,
        begin: Callable[[Scenario], None] = lambda case: None,
    ) -> None:
        """Survey ``cases`` scenarios drawn from ``seed``, and pass the number finished to ``report_progress``.

        deadline: value of ``time.monotonic()`` after which no further case begins. begin: is called with each case
        before it begins. Raises BackendError if the backend cannot be judged at all.
        """
        stream = CaseStream(self.scale, self.subject.switches, seed)
        for drawn in stream.cases(range(self.found.cases, cases)):  # those before were surveyed in an earlier part
            if deadline is not None and time.monotonic() > deadline:
                return
            begin(drawn.scenario)
            self.survey(drawn.scenario)
            self.found.note_survival("", drawn.scenario)
            report_progress(self.found.cases)

    def survey(self, scenario: Scenario) -> None:
        """Judge every call of one scenario."""
        self.found.reach.cases += 1
        with interruptions_noted() as interruptions, exits_refused() as exits:
            surveyed = _Case(scenario, self.subject, self.device, self.found, interruptions, exits)
            streams = Streams()
            try:
                far = memory_for(scenario.setup, self.device)
                with shown_warnings(), speed.without_warnings(), far, time_limit(self.subject.case_timeout):
                    surveyed.run()
                lost = streams.lost()
            except CaseTimeout as error:  # between calls of the backend
                raise _too_slow(error) from None
            finally:
                streams.put_back()
            surveyed.note_streams(lost)
            interruptions.check()

    def shrink(
        self,
        deadline: float | None = None,
        most_trials: int = 150,
        begin: Callable[[Property, Row], None] = lambda key, row: None,
    ) -> None:
        """Replace the case of each broken row by a smaller one that breaks it, with up to ``most_trials`` trials each.

        deadline: value of ``time.monotonic()`` after which no trial begins; SHRINKING_BUDGET from now at the latest.
        begin: is called with each row before its trials, and when its case has become smaller. Rows that are ``kept``
        already stay as they are.
        """
        for key, row, ends in in_turn(self.found.broken, self.found.kept, deadline, begin):

            def breaks(case: Scenario, key: Property = key) -> str | None:
                trial = BackendSurvey(self.subject, self.device)
                try:
                    trial.survey(case)
                except (BackendError, ScenarioError):  # a trial that cannot be judged counts as passed
                    return None
                found = trial.found.rows.get(key, Row())
                return found.finding if found.case == case else None

            row.shrink(breaks, self.subject, ends, most_trials, functools.partial(begin, key, row))


class _SpoiltMemory(Exception):
    """Memory that is compared after every event is not as it should be; the case needs a new engine."""


class _Case:
    """The survey of one scenario."""

    def __init__(
        self,
        scenario: Scenario,
        subject: Subject,
        device: torch.device,
        found: BackendFound,
        interruptions: Interruptions,
        exits: RefusedExits,
    ) -> None:
        self.scenario = scenario
        self.subject = subject
        self.device = device
        self.found = found
        self.interruptions = interruptions
        self.exits = exits
        self._is_built = False
        self._uncapturable: set[int] = set()  # indices of captures that failed

    @speed.deep_stack
    def run(self) -> None:
        """Judge all events."""
        engine = self._engine()
        if engine is None:
            return
        self._is_built = True
        for number in range(len(self.scenario.events)):
            try:
                self._judge_event(engine, number)
            except (BackendError, ScenarioError):
                raise
            except BaseException as error:  # the backend's code may raise anything
                self.interruptions.check()
                if not isinstance(error, _SpoiltMemory):
                    self._note(self._property_of(engine, number), [_finding_of(error)], number)
                if isinstance(error, CaseTimeout):
                    return
                if isinstance(self.scenario.events[number], Capture):
                    self._uncapturable.add(number)
                rebuilt = self._rebuilt(number)
                if rebuilt is None:
                    return
                engine = rebuilt
        self.found.declared.count_stand_ins(engine.declarations)
        frozen = frozen_value(engine, self.scenario, self._build)
        self._note(Property("graph", "-", FREEZES_NOTHING), [frozen] if frozen else [], len(self.scenario.events) - 1)

    def note_streams(self, lost: Finding | None) -> None:
        """Count a case in which a stream of the process was lost, or none, unless the backend could not be built."""
        if lost is not None or self._is_built:
            self._note(Property("-", "-", KEEPS_STREAMS), [lost] if lost else [], len(self.scenario.events) - 1)

    def _build(self, scenario: Scenario) -> Engine:
        conditions = Conditions(sentinels(scenario.setup)[0], POISON_BYTES[0])
        return Engine(scenario, self.subject.backend, self.subject.layer, self.device, conditions)

    def _engine(self) -> Engine | None:
        try:
            engine = self._build(self.scenario)
            self.exits.check_forks()
        except (BackendError, ScenarioError):
            raise
        except BaseException as error:
            self.interruptions.check()
            self._note(Property("-", "-", BUILDS), [_finding_of(error)], -1)
            return None
        self._note(Property("-", "-", BUILDS), [], -1)
        return engine

    def _rebuilt(self, number: int) -> Engine | None:
        """A new engine in the state behind event ``number``, with the captures that succeed and without any call."""
        try:
            engine = self._build(self.scenario)
            for index, event in enumerate(self.scenario.events[: number + 1]):
                if isinstance(event, Replay | Eager):
                    engine.world.apply(event)  # it may finish requests
                elif index not in self._uncapturable:
                    list(engine.run(event))
        except BaseException:
            self.interruptions.check()
            return None
        return engine

    def _judge_event(self, engine: Engine, number: int) -> None:
        event = self.scenario.events[number]
        for seen in engine.run(event):
            assert not isinstance(seen, LayerObservation)
            self._judge_call(engine, seen, number)
        self.exits.check_forks()
        if isinstance(event, Capture):
            self._note(Property("graph", event.mode.value, CAPTURES), [], number)
        stray, modified = stray_write(engine), modified_input(engine, event)
        self._note(Property("-", "-", WITHIN), [] if stray is None else [stray], number)
        self._note(Property("-", "-", UNMODIFIED), [] if modified is None else [modified], number)
        if stray or modified:  # it would be found again after every later event
            raise _SpoiltMemory

    def _judge_call(self, engine: Engine, seen: Observation, number: int) -> None:
        mode, table = seen.batch.mode, engine.world.req_to_token
        reference = expected_metadata(engine.config, table, seen.batch, seen.in_graph, engine.num_steps(seen.batch))
        self.found.reach.note(seen.batch, seen.raw_bs, seen.in_graph, reference)
        declared = Declared(engine.config, engine.declarations, self.found.declared)
        found = list(differing_fields(seen, reference, self.device, Tally(), declared))
        call = _called(seen.in_graph)
        self._note(Property(call, mode.value, NO_EXCEPTION), [], number)
        if seen.in_graph:
            moved = [finding for finding in found if finding.kind is Kind.ADDRESS]
            self._note(Property(call, mode.value, SHOWN), moved, number)
        found = [finding for finding in found if finding.kind is not Kind.ADDRESS]
        for name in dict.fromkeys([*HOST_SCALARS, *declared.compared(seen, reference), *(f.field for f in found)]):
            self._note(Property(call, mode.value, name), [f for f in found if f.field == name], number)

    def _property_of(self, engine: Engine, number: int) -> Property:
        """The property that an exception in event ``number`` breaks."""
        event = self.scenario.events[number]
        if isinstance(event, Capture):
            return Property("graph", event.mode.value, CAPTURES)
        if engine.calling is None:
            return Property("-", "-", NO_EXCEPTION)
        return Property(_called(engine.calling.in_graph), engine.calling.mode.value, NO_EXCEPTION)

    def _note(self, key: Property, findings: list[Finding], number: int) -> None:
        case = up_to(self.scenario, number) if findings else self.scenario
        self.found.rows.setdefault(key, Row()).note(findings, case)


def _called(in_graph: bool) -> str:
    return "graph" if in_graph else "eager"


def _finding_of(error: BaseException) -> Finding:
    if isinstance(error, WrongResult):
        return error.finding
    if isinstance(error, CaptureError):
        return capture_finding(error)
    if isinstance(error, CaseTimeout):
        frames = judged_frames(error.__traceback__) or error.stack
        if not frames:
            raise _too_slow(error) from None
        place = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}"
        return Finding(Kind.TIMEOUT, "case", str(error), "an end", place=place)
    return Finding(Kind.CRASH, type(error).__name__, error_line(error), "no exception")


def _too_slow(error: CaseTimeout) -> ScenarioError:
    return ScenarioError(f"a case is {error} in the harness, not in the judged code: allow it more")


def backend_table(rows: Mapping[Property, Row]) -> Table:
    """One line per property, those that were broken first."""
    table = Table("call", "mode", "field or property", "checked", "broken", "steps", "first violation")
    for key, row in sorted(rows.items(), key=lambda item: (not item[1].broken, item[0])):
        steps = ", ".join(map(str, sorted(row.steps)))
        table.add_row(*key, f"{row.checked:,}", f"{row.broken:,}", steps, row.finding)
    return table


def rows_as_json(rows: Mapping[Property, Row]) -> list[dict[str, Any]]:
    """The rows, each as one JSON object."""
    return [
        {
            **key._asdict(),
            "checked": row.checked,
            "broken": row.broken,
            "steps": sorted(row.steps),
            "finding": row.finding,
            "case": None if row.saved is None else str(row.saved),
            "replay": row.replay,
        }
        for key, row in sorted(rows.items())
    ]
