"""What a layer holds and what it does not: every property is tried on every call, and none ends the search."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from rich.table import Table

from nsa_oracle.harness.checks.layer import StageJudge
from nsa_oracle.harness.checks.relations import Relations
from nsa_oracle.harness.checks.tally import LayerTally
from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.engine.expected import expected_metadata
from nsa_oracle.harness.engine.observations import Conditions, Feed, LayerObservation, Observation
from nsa_oracle.harness.errors import BackendError, ScenarioError, error_line
from nsa_oracle.harness.findings import Finding
from nsa_oracle.harness.interpreter import speed
from nsa_oracle.harness.judge import sentinels
from nsa_oracle.harness.memory.far_apart import memory_for
from nsa_oracle.harness.memory.poison import POISON_BYTES
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.scenarios.strategies import scenarios
from nsa_oracle.harness.search.drawing import OutOfTime, draw
from nsa_oracle.harness.subjects.subject import Subject, scale_of

RUNS = "runs every call"


class Record:
    """How often a property was checked, how often it did not hold, and the first time that it did not."""

    def __init__(self) -> None:
        self.checked = 0
        self.broken = 0
        self.example = ""

    def note(self, finding: Finding | None) -> None:
        self.add("" if finding is None else finding.sentence())

    def add(self, fault: str) -> None:
        """Count one check, and the ``fault`` that it found, if any."""
        self.checked += 1
        self.broken += bool(fault)
        self.example = self.example or fault


class Survey:
    """Records by property, as scenarios of the sizes that the layer is made for are drawn. Metadata is not judged.

    What has been found by then is in ``records``, and how many cases it took in ``cases``, however ``run`` ends.
    """

    def __init__(self, subject: Subject, device: torch.device) -> None:
        """Raises ValueError if nothing that is drawn is of its sizes."""
        self.subject = subject
        self.device = device
        self.scale = subject.scale(device, with_layer=True)
        self.left_out = subject.all_limits(with_layer=True).excluded(scale_of(device, with_layer=True).drawn())
        self.records: defaultdict[str, Record] = defaultdict(Record)
        self.cases = 0

    @property
    def holds(self) -> bool:
        return not any(record.broken for record in self.records.values())

    def run(
        self,
        cases: int,
        seed: int,
        deadline: float | None = None,
        tell: Callable[[int], None] = lambda cases: None,
    ) -> None:
        """Try ``cases`` scenarios drawn from ``seed``, and ``tell`` after each how many that were.

        deadline: value of ``time.monotonic()`` at which it ends, in the middle of a case if need be.
        Raises BackendError if the layer cannot be judged at all.
        """

        def survey_one(scenario: Scenario) -> None:
            self._survey(scenario, deadline)
            self.cases += 1
            tell(self.cases)

        draw(scenarios(self.scale, switches=self.subject.switches), cases, seed, survey_one)

    def _survey(self, scenario: Scenario, deadline: float | None) -> None:
        def in_time() -> None:
            if deadline is not None and time.monotonic() > deadline:
                raise OutOfTime

        def build(scenario: Scenario) -> Engine:
            in_time()
            sentinel, poison = sentinels(scenario.setup)[0], POISON_BYTES[0]
            return Engine(scenario, self.subject.backend, self.subject.layer, self.device, Conditions(sentinel, poison))

        try:
            with speed.without_warnings(), memory_for(scenario.setup.is_far, self.device):
                self._survey_calls(scenario, build, in_time)
        except (BackendError, ScenarioError):
            raise
        except (Exception, SystemExit) as error:  # whatever a layer does
            self.records[RUNS].add(f"{type(error).__name__}: {error_line(error, 100)}")
        else:
            self.records[RUNS].add("")

    def _survey_calls(
        self, scenario: Scenario, build: Callable[[Scenario], Engine], in_time: Callable[[], None]
    ) -> None:
        engine = build(scenario)
        assert engine.layer is not None
        relations = Relations(scenario, build)
        judge = StageJudge(engine.layer.judged(), LayerTally())
        regime = judge.layer.content.regime
        for event in scenario.events:
            metadata = []
            for seen in engine.run(event):
                in_time()
                if isinstance(seen, Observation):
                    metadata = expected_metadata(engine.config, engine.world.req_to_token, seen.batch, seen.in_graph)
                    continue
                assert isinstance(seen, LayerObservation)
                if seen.again:
                    continue
                self.records[f"{regime.value} content: as the reference"].note(judge.compare(seen, metadata))
                if seen.feed is Feed.ISOLATED or regime.is_exact:
                    continue
                for relation, finding in relations.check_all(engine, seen):
                    self.records[f"same bits: {relation.value}"].note(finding)


def survey_table(records: Mapping[str, Record]) -> Table:
    """One line a property."""
    table = Table("property", "checked", "broken", "first case of it")
    for name, record in sorted(records.items()):
        table.add_row(name, f"{record.checked:,}", f"{record.broken:,}", record.example)
    return table
