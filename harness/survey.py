"""What a layer holds and what it does not: every property is tried on every call, and none ends the search."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings

from harness.compare import Finding
from harness.engine import Engine, Feed, LayerObservation, Observation
from harness.expected import expected_metadata
from harness.explore import SCALES, no_near_copies
from harness.judge import sentinels
from harness.layer import POISON_BYTES
from harness.protocol import BackendError, LayerFactory, optimized_backend
from harness.relations import Relations
from harness.scenario import Scenario
from harness.stages import LayerTally, StageJudge
from harness.strategies import restricted, scenarios


@dataclass
class Record:
    """How often a property was checked, how often it did not hold, and the first time that it did not."""

    checked: int = 0
    broken: int = 0
    example: str = ""

    def note(self, finding: Finding | None) -> None:
        self.checked += 1
        if finding is not None:
            self.broken += 1
            self.example = self.example or finding.sentence()


def survey_layer(
    layer_factory: LayerFactory, sizes: Mapping[str, Sequence[Any]], device: torch.device, cases: int, seed: int
) -> dict[str, Record]:
    """Records by property, from ``cases`` scenarios of the sizes that the layer is made for.

    Its metadata is that of ``optimized/``. Raises BackendError if it cannot be judged at all, and ValueError if nothing
    that is drawn is of its sizes.
    """
    records: dict[str, Record] = defaultdict(Record)

    def survey_one(scenario: Scenario) -> None:
        def build(scenario: Scenario) -> Engine:
            sentinel, poison = sentinels(scenario.setup)[0], POISON_BYTES[0]
            return Engine(scenario, optimized_backend, layer_factory, device, sentinel, poison)

        try:
            _survey_calls(scenario, build, records)
        except BackendError:
            raise
        except Exception as error:  # whatever a layer does
            raised = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            records["runs every call"].checked += 1
            records["runs every call"].broken += 1
            records["runs every call"].example = records["runs every call"].example or raised
        else:
            records["runs every call"].checked += 1

    scale = restricted(SCALES[device.type, True], sizes)
    search = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )(given(scenarios(scale))(survey_one))
    with no_near_copies():
        hypothesis.seed(seed)(search)()
    return dict(records)


def _survey_calls(scenario: Scenario, build: Any, records: dict[str, Record]) -> None:
    engine = build(scenario)
    assert engine.layer is not None
    relations = Relations(scenario, build)
    regime = engine.cache_state.content.regime
    judge = StageJudge(engine, getattr(engine.layer.layer, "weaker", {}), LayerTally())
    for event in scenario.events:
        metadata = []
        for seen in engine.run(event):
            if isinstance(seen, Observation):
                metadata = expected_metadata(engine.config, engine.world.req_to_token, seen.batch, seen.in_graph)
                continue
            assert isinstance(seen, LayerObservation)
            if seen.again:
                continue
            records[f"{regime.value} content: as the reference"].note(judge.compare(seen, metadata))
            if seen.feed is Feed.ISOLATED or regime.is_exact:
                continue
            for relation, finding in relations.check_all(engine, seen):
                records[f"same bits: {relation.value}"].note(finding)
