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
from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.engine.expected import expected_metadata
from nsa_oracle.harness.engine.far_memory import memory_for
from nsa_oracle.harness.engine.observations import Conditions, Feed, LayerObservation, Observation
from nsa_oracle.harness.errors import BackendError, ScenarioError, error_line
from nsa_oracle.harness.findings import Finding
from nsa_oracle.harness.interpreter import speed
from nsa_oracle.harness.interruptions import exits_refused, interruptions_noted
from nsa_oracle.harness.judge import sentinels
from nsa_oracle.harness.memory.poison import POISON_BYTES
from nsa_oracle.harness.processes import time_limit
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.search.drawing import OutOfTime
from nsa_oracle.harness.search.stream import CaseStream
from nsa_oracle.harness.subjects.global_state import Streams
from nsa_oracle.harness.subjects.subject import Subject, scale_of

RUNS = "runs every call"


class Record:
    """How often a property was checked and how often it was broken, with the first violation as ``example``."""

    def __init__(self) -> None:
        self.checked = 0
        self.broken = 0
        self.example = ""

    def note(self, finding: Finding | None) -> None:
        """Count one check, with the violation that it found, if any."""
        self.add("" if finding is None else finding.sentence())

    def add(self, fault: str) -> None:
        """Count one check. fault: the violation in one line; empty if there is none."""
        self.checked += 1
        self.broken += bool(fault)
        self.example = self.example or fault


@dataclass
class SurveyFound:
    """What a survey has found, to send to another process, and to go on from. cases: number of cases finished."""

    records: defaultdict[str, Record] = field(default_factory=functools.partial(defaultdict, Record))
    layers: LayerTally = field(default_factory=LayerTally)
    cases: int = 0

    def add_lost(self, how: str) -> None:
        """Count the next case as one that ended its process, as ``how`` says."""
        self.records[RUNS].add(how)
        self.cases += 1

    @property
    def holds(self) -> bool:
        """Whether nothing was broken."""
        return not any(record.broken for record in self.records.values())


class Survey:
    """Draws scenarios within the layer's limits and keeps a record of each property. Metadata is not judged.

    However ``run`` ends, ``records`` holds what was found so far, and ``cases`` the number of cases finished. found: of
    an earlier part of the same survey, after which ``run`` goes on.
    """

    def __init__(self, subject: Subject, device: torch.device, found: SurveyFound | None = None) -> None:
        """Raises ValueError if the limits of the subject leave nothing to draw."""
        found = found or SurveyFound()
        self.subject = subject
        self.device = device
        self.scale = subject.scale(device, with_layer=True)
        self.left_out = subject.all_limits(with_layer=True).excluded(scale_of(device, with_layer=True).drawn())
        self.records = found.records
        self.layers = found.layers  # calls of the layer's own methods
        self.cases = found.cases

    @property
    def found(self) -> SurveyFound:
        """What was found so far."""
        return SurveyFound(self.records, self.layers, self.cases)

    @property
    def holds(self) -> bool:
        """Whether nothing was broken."""
        return self.found.holds

    def run(
        self,
        cases: int,
        seed: int,
        deadline: float | None = None,
        report_progress: Callable[[int], None] = lambda cases: None,
    ) -> None:
        """Run ``cases`` scenarios drawn from ``seed``, and pass the number finished to ``report_progress``
        after each.

        deadline: value of ``time.monotonic()`` after which the survey ends, possibly in the middle of a case.
        Raises BackendError if the layer cannot be judged at all.
        """
        stream = CaseStream(self.scale, self.subject.switches, seed)
        with suppress(OutOfTime):
            for drawn in stream.cases(range(self.cases, cases)):  # those before were surveyed in an earlier part
                self._survey(drawn.scenario, deadline)
                self.cases += 1
                report_progress(self.cases)

    def _survey(self, scenario: Scenario, deadline: float | None) -> None:
        def check_time() -> None:
            if deadline is not None and time.monotonic() > deadline:
                raise OutOfTime

        def build(scenario: Scenario) -> Engine:
            check_time()
            sentinel, poison = sentinels(scenario.setup)[0], POISON_BYTES[0]
            return Engine(scenario, self.subject.backend, self.subject.layer, self.device, Conditions(sentinel, poison))

        streams = Streams()
        with interruptions_noted() as interruptions:
            try:
                far, limit = memory_for(scenario.setup, self.device), time_limit(self.subject.case_timeout)
                with speed.without_warnings(), far, exits_refused() as exits, limit:
                    self._survey_calls(scenario, build, check_time)
                interruptions.check()
                exits.check()
                lost = streams.lost()
            except (BackendError, ScenarioError, OutOfTime):
                raise
            except BaseException as error:  # the layer's code may raise anything, which is then not the user's
                interruptions.check()
                self.records[RUNS].add(f"{type(error).__name__}: {error_line(error, 100)}")
            else:
                self.records[RUNS].note(lost)
            finally:
                streams.put_back()

    def _survey_calls(
        self, scenario: Scenario, build: Callable[[Scenario], Engine], check_time: Callable[[], None]
    ) -> None:
        engine = build(scenario)
        assert engine.layer is not None
        relations = Relations(scenario, build)
        judge = StageJudge(engine.layer.judged(), LayerTally())
        try:
            self._survey_events(scenario, engine, judge, relations, check_time)
        finally:  # a call that raises is a call
            self.layers.count_calls(engine.layer.method_calls.counts)

    def _survey_events(
        self,
        scenario: Scenario,
        engine: Engine,
        judge: StageJudge,
        relations: Relations,
        check_time: Callable[[], None],
    ) -> None:
        regime = judge.layer.content.regime
        for event in scenario.events:
            metadata = []
            for seen in engine.run(event):
                check_time()
                if isinstance(seen, Observation):
                    metadata = expected_metadata(engine.config, engine.world.req_to_token, seen.batch, seen.in_graph)
                    continue
                assert isinstance(seen, LayerObservation)
                if seen.again:
                    continue
                if seen.selected is not None:  # a row for each kind, so that one that is known hides no other
                    for kind, finding in edge_logits_by_kind(seen.selected, judge.layer):
                        self.records[f"made-up logits: {kind.value}"].note(finding)
                    seen = dataclasses.replace(seen, selected=None)
                self.records[f"{regime.value} content: as the reference"].note(judge.compare(seen, metadata))
                if seen.many is not None:
                    finding = differs_among_many(seen, scenario.setup.page_size)
                    self.records[f"same bits: {Relation.MANY.value}"].note(finding)
                if seen.feed is Feed.ISOLATED or regime.is_exact:
                    continue
                for relation, finding in relations.check_all(engine, seen):
                    self.records[f"same bits: {relation.value}"].note(finding)


def survey_table(records: Mapping[str, Record]) -> Table:
    """One line per property."""
    table = Table("property", "checked", "broken", "first violation")
    for name, record in sorted(records.items()):
        table.add_row(name, f"{record.checked:,}", f"{record.broken:,}", record.example)
    return table
