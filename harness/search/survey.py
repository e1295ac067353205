"""Surveys a layer: checks every property on every call and counts violations, without stopping at the first."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from rich.table import Table

from nsa_oracle.harness.checks.layer import StageJudge
from nsa_oracle.harness.checks.relations import Relation, Relations, differs_among_many
from nsa_oracle.harness.checks.selection import edge_logits_by_kind
from nsa_oracle.harness.checks.tally import LayerTally
from nsa_oracle.harness.checks.uncapturable import capture_finding
from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.engine.expected import expected_metadata
from nsa_oracle.harness.engine.far_memory import memory_for
from nsa_oracle.harness.engine.observations import Conditions, Feed, LayerObservation, Observation
from nsa_oracle.harness.errors import BackendError, CaptureError, CaseTimeout, ScenarioError, error_line
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.interpreter import speed
from nsa_oracle.harness.interruptions import exits_refused, interruptions_noted
from nsa_oracle.harness.judge import OracleFailure, judge_subject, sentinels
from nsa_oracle.harness.memory.poison import POISON_BYTES
from nsa_oracle.harness.processes import time_limit
from nsa_oracle.harness.scenarios.scenario import Event, Scenario
from nsa_oracle.harness.scenarios.setup import Regime
from nsa_oracle.harness.scenarios.simplify import MOST_TRIALS
from nsa_oracle.harness.search.drawing import OutOfTime
from nsa_oracle.harness.search.explore import has_lost_the_device
from nsa_oracle.harness.search.reach import Reach
from nsa_oracle.harness.search.rows import Row, in_turn, up_to
from nsa_oracle.harness.search.stream import CaseStream
from nsa_oracle.harness.subjects.global_state import Streams
from nsa_oracle.harness.subjects.subject import Subject, scale_of
from nsa_oracle.reference.types import Metadata

RUNS = "runs every call"
_SAME_BITS, _MADE_UP, _AS_THE_REFERENCE = "same bits: ", "made-up logits: ", " content: as the reference"
_RAISED = (Kind.CRASH, Kind.LAYER_CRASH, Kind.CAPTURE, Kind.TIMEOUT, Kind.STATE, Kind.RESULT)
MOST_RELATIONS = 7  # that a replay checks in turn


@dataclass
class SurveyFound:
    """What a survey has found, to send to another process, and to go on from.

    cases: number of cases finished. kept: broken rows whose case stays as it is.
    """

    rows: defaultdict[str, Row] = field(default_factory=functools.partial(defaultdict, Row))
    layers: LayerTally = field(default_factory=LayerTally)  # calls of the layer's own methods
    cases: int = 0
    kept: set[str] = field(default_factory=set)
    reach: Reach = field(default_factory=Reach)

    def add_lost(self, how: str, case: Scenario) -> None:
        """Count a case that ended its process, as ``how`` says."""
        self.rows[RUNS].add(how, case)
        self.kept.add(RUNS)  # a smaller case would have to end as many processes
        self.note_end()

    def note_end(self) -> None:
        """Count a case that has ended."""
        self.cases += 1
        self.reach.cases += 1

    @property
    def holds(self) -> bool:
        """Whether nothing was broken."""
        return not self.broken

    @property
    def broken(self) -> dict[str, Row]:
        """The rows that were broken."""
        return {name: row for name, row in sorted(self.rows.items()) if row.broken}


class Survey:
    """Draws scenarios within the layer's limits and keeps a row for each property. Metadata is not judged.

    However ``run`` ends, ``found`` holds what was found so far. found: of an earlier part of the same survey, after
    which ``run`` goes on.
    """

    def __init__(self, subject: Subject, device: torch.device, found: SurveyFound | None = None) -> None:
        """Raises ValueError if the limits of the subject leave nothing to draw."""
        self.subject = subject
        self.device = device
        self.scale = subject.scale(device, with_layer=True)
        self.left_out = subject.all_limits(with_layer=True).excluded(scale_of(device, with_layer=True).drawn())
        self.found = found or SurveyFound()

    def run(
        self,
        cases: int,
        seed: int,
        deadline: float | None = None,
        report_progress: Callable[[int], None] = lambda cases: None,
        begin: Callable[[Scenario], None] = lambda case: None,
    ) -> None:
        """Run ``cases`` scenarios drawn from ``seed``, and pass the number finished to ``report_progress``
        after each.

        deadline: value of ``time.monotonic()`` after which the survey ends, possibly in the middle of a case. begin: is
        called with each case before it begins. Raises BackendError if the layer cannot be judged at all.
        """
        stream = CaseStream(self.scale, self.subject.switches, seed)
        with suppress(OutOfTime):
            for drawn in stream.cases(range(self.found.cases, cases)):  # those before were surveyed in an earlier part
                begin(drawn.scenario)
                self._survey(drawn.scenario, deadline)
                self.found.note_end()
                report_progress(self.found.cases)

    def shrink(
        self,
        deadline: float | None = None,
        most_trials: int = MOST_TRIALS // 4,
        begin: Callable[[str, Row], None] = lambda name, row: None,
    ) -> None:
        """Replace the case of each broken row by a smaller one that fails in the same way when it is replayed.

        As ``BackendSurvey.shrink``. A case that passes, fails in another way first, or costs the device stays as it is.
        """
        for name, row, ends in in_turn(self.found.broken, self.found.kept, deadline, begin):
            assert row.case is not None
            longest = self.subject.case_timeout or 0.0 if row.has_hung else 0.0
            if time.monotonic() + longest > ends:
                continue
            first = self._failure(row.case)
            if first is None:
                row.passes_alone = True
            elif shows(first, name) and not has_lost_the_device(first, self.device):

                def breaks(case: Scenario, name: str = name, first: Finding = first) -> str | None:
                    layer, failure = case.setup.layer, self._failure(case)
                    if failure is None or layer is None or not shows(failure, name, layer.regime):
                        return None
                    if has_lost_the_device(failure, self.device):  # which would fail any further case
                        return None
                    return failure.sentence() if name != RUNS or failure.is_like(first) else None

                row.shrink(breaks, self.subject, ends, most_trials, functools.partial(begin, name, row))

    def _failure(self, case: Scenario) -> Finding | None:
        """How the case fails when it is replayed, or None."""
        try:
            judge_subject(self.subject, case, self.device)
        except OracleFailure as failure:
            return failure.finding
        except (BackendError, ScenarioError):  # a trial that cannot be judged counts as passed
            pass
        return None

    def _survey(self, scenario: Scenario, deadline: float | None) -> None:
        def check_time() -> None:
            if deadline is not None and time.monotonic() > deadline:
                raise OutOfTime

        def build(scenario: Scenario) -> Engine:
            check_time()
            sentinel, poison = sentinels(scenario.setup)[0], POISON_BYTES[0]
            return Engine(scenario, self.subject.backend, self.subject.layer, self.device, Conditions(sentinel, poison))

        def note(name: str, finding: Finding | None, number: int) -> None:
            self.found.rows[name].note([] if finding is None else [finding], _case_of(name, scenario, number))

        surveyed, streams = _Surveyed(scenario, build, check_time, note, self.found), Streams()
        with interruptions_noted() as interruptions:
            try:
                far, limit = memory_for(scenario.setup, self.device), time_limit(self.subject.case_timeout)
                with speed.without_warnings(), far, exits_refused() as exits, limit:
                    surveyed.run()
                interruptions.check()
                exits.check()
                lost = streams.lost()
            except (BackendError, ScenarioError, OutOfTime):
                raise
            except BaseException as error:  # the layer's code may raise anything, which is then not the user's
                interruptions.check()
                case = _case_of(RUNS, scenario, surveyed.number)
                fault = f"{type(error).__name__}: {error_line(error, 100)}"
                fault = capture_finding(error).sentence() if isinstance(error, CaptureError) else fault
                self.found.rows[RUNS].add(fault, case, isinstance(error, CaseTimeout))
            else:
                note(RUNS, lost, surveyed.number)
            finally:
                streams.put_back()


class _Surveyed:
    """The survey of one scenario. number: of the event that runs, or ran last. found: counts the layer's calls."""

    def __init__(
        self,
        scenario: Scenario,
        build: Callable[[Scenario], Engine],
        check_time: Callable[[], None],
        note: Callable[[str, Finding | None, int], None],
        found: SurveyFound,
    ) -> None:
        self.scenario = scenario
        self.number = len(scenario.events) - 1
        self._build = build
        self._check_time = check_time
        self._note = note
        self._found = found

    def run(self) -> None:
        """Judge every call of the layer."""
        engine = self._build(self.scenario)
        assert engine.layer is not None
        relations = Relations(self.scenario, self._build)
        judge = StageJudge(engine.layer.judged(), LayerTally())
        try:
            for number, event in enumerate(self.scenario.events):
                self.number = number
                self._judge_event(engine, event, judge, relations)
        finally:  # a call that raises is a call
            self._found.layers.count_calls(engine.layer.method_calls.counts)

    def _judge_event(self, engine: Engine, event: Event, judge: StageJudge, relations: Relations) -> None:
        regime, number = judge.layer.content.regime, self.number
        metadata: list[Metadata] = []
        for seen in engine.run(event):
            self._check_time()
            if isinstance(seen, Observation):
                metadata = expected_metadata(engine.config, engine.world.req_to_token, seen.batch, seen.in_graph)
                continue
            assert isinstance(seen, LayerObservation)
            if seen.again:
                continue
            if seen.selected is not None:  # a row for each kind, so that one that is known hides no other
                for kind, finding in edge_logits_by_kind(seen.selected, judge.layer):
                    self._note(f"{_MADE_UP}{kind.value}", finding, number)
                seen = dataclasses.replace(seen, selected=None)
            if seen.feed is not Feed.ISOLATED:
                self._found.reach.note(seen.batch, seen.raw_bs, seen.feed is Feed.GRAPH, metadata)
                self._found.reach.note_layer(self.scenario.setup)
            self._note(f"{regime.value}{_AS_THE_REFERENCE}", judge.compare(seen, metadata), number)
            if seen.many is not None:
                finding = differs_among_many(seen, self.scenario.setup.page_size)
                self._note(f"{_SAME_BITS}{Relation.MANY.value}", finding, number)
            if seen.feed is Feed.ISOLATED or regime.is_exact:
                continue
            for relation, finding in relations.check_all(engine, seen):
                self._note(f"{_SAME_BITS}{relation.value}", finding, number)


def _case_of(name: str, scenario: Scenario, number: int) -> Scenario:
    """The events up to ``number``, with which a replay shows the row ``name``.

    A replay checks one relation after each call, in turn, so the last event is repeated until each has had its turn.
    """
    case = up_to(scenario, number)
    if name.startswith(_SAME_BITS) and name != f"{_SAME_BITS}{Relation.MANY.value}":
        return case.model_copy(update={"events": (*case.events, *case.events[-1:] * MOST_RELATIONS)})
    return case


def shows(finding: Finding, name: str, regime: Regime | None = None) -> bool:
    """Whether what a replay found belongs to the row ``name``. regime: of the case; None for that of the row."""
    if name == RUNS:
        return finding.kind in _RAISED
    if name.startswith(_SAME_BITS):
        return finding.kind is Kind.RELATION and finding.how.startswith(name.removeprefix(_SAME_BITS))
    if name.startswith(_MADE_UP):
        return name in finding.sentence()
    is_of_regime = regime is None or name == f"{regime.value}{_AS_THE_REFERENCE}"
    return is_of_regime and finding.kind not in (*_RAISED, Kind.RELATION) and _MADE_UP not in finding.sentence()


def survey_table(rows: Mapping[str, Row]) -> Table:
    """One line per property."""
    table = Table("property", "checked", "broken", "first violation")
    for name, row in sorted(rows.items()):
        table.add_row(name, f"{row.checked:,}", f"{row.broken:,}", row.finding)
    return table
