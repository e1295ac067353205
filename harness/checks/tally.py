"""Counts of what was compared, by field, stage and relation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nsa_oracle.harness.protocol import Strictness


@dataclass
class StageTally:
    """How many numbers of a stage were compared bit for bit, within the error bound, and in a weaker way.

    worst: largest fraction of the error bound that was used. declared: value of the ``Strictness`` of the weaker way.
    """

    exact: int = 0
    bounded: int = 0
    weaker: int = 0
    worst: float = 0.0
    declared: str = ""

    def count_weaker(self, count: int, declared: Strictness) -> None:
        self.weaker += count
        self.declared = declared.value

    def add(self, other: StageTally) -> None:
        self.exact += other.exact
        self.bounded += other.bounded
        self.weaker += other.weaker
        self.worst = max(self.worst, other.worst)
        self.declared = self.declared or other.declared


@dataclass
class LayerTally:
    """Counts of compared numbers by stage, of tried relations, and of replays with a layer.

    selections, keys, scores: number of rows of edge-case logits given to top-k, and of edge-case keys given to the
    store and to the indexer, by kind. calls: number of calls of each method that the judged layer brings itself, by the
    run of the layer.
    """

    stages: dict[str, StageTally] = field(default_factory=dict)
    relations: dict[str, int] = field(default_factory=dict)
    replays: int = 0
    selections: dict[str, int] = field(default_factory=dict)
    keys: dict[str, int] = field(default_factory=dict)
    scores: dict[str, int] = field(default_factory=dict)
    calls: dict[str, dict[str, int]] = field(default_factory=dict)

    def count_calls(self, calls: Mapping[str, Mapping[str, int]]) -> None:
        for method, by_run in calls.items():
            counts = self.calls.setdefault(method, {})
            for run, count in by_run.items():
                counts[run] = counts.get(run, 0) + count

    @property
    def never_called(self) -> list[str]:
        """Methods that the judged layer brings itself and nothing has called: they were not judged."""
        return [method for method, by_run in self.calls.items() if not any(by_run.values())]

    def stage(self, name: str) -> StageTally:
        return self.stages.setdefault(name, StageTally())

    def count(self, relation: str) -> None:
        self.relations[relation] = self.relations.get(relation, 0) + 1

    def add(self, other: LayerTally) -> None:
        for name, tally in other.stages.items():
            self.stage(name).add(tally)
        for counts, others in (
            (self.relations, other.relations),
            (self.selections, other.selections),
            (self.keys, other.keys),
            (self.scores, other.scores),
        ):
            for name, count in others.items():
                counts[name] = counts.get(name, 0) + count
        self.replays += other.replays
        self.count_calls(other.calls)


@dataclass
class Tally:
    """How many fields and cells of metadata were compared."""

    fields: int = 0
    cells: int = 0
