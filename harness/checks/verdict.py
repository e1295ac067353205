"""What judging a scenario gives: a failure, or what was covered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

from nsa_oracle.harness.checks.declared import DeclaredTally
from nsa_oracle.harness.checks.tally import LayerTally, Tally
from nsa_oracle.harness.findings import Finding
from nsa_oracle.harness.graphs.audit import AuditTally
from nsa_oracle.harness.scenarios.scenario import Scenario


class OracleFailure(AssertionError):
    """The backend or the layer disagrees with the reference on ``scenario``.

    event: index of the event that shows it, or None if it shows before the first event. raised: how often ``judge`` has
    raised one in this process.
    """

    raised: ClassVar[int] = 0

    def __init__(self, scenario: Scenario, finding: Finding, event: int | None) -> None:
        super().__init__(finding.sentence())
        self.scenario = scenario
        self.finding = finding
        self.event = event

    def __reduce__(self) -> tuple[type[OracleFailure], tuple[Scenario, Finding, int | None]]:
        return type(self), (self.scenario, self.finding, self.event)  # to pickle a failure of another process


@dataclass
class Verdict:
    """What was covered by scenarios that passed. Both runs of each scenario count.

    interpreted: by the name of a kernel that could not be compiled for the CPU, so that races in it are not found: why.
    thread_errors: how often each exception has ended a thread of judged code.
    """

    cases: int = 0
    replays: int = 0
    eager_calls: int = 0
    tally: Tally = field(default_factory=Tally)
    layers: LayerTally = field(default_factory=LayerTally)
    audit: AuditTally = field(default_factory=AuditTally)
    boundary_classes: Counter[str] = field(default_factory=Counter)
    declared: DeclaredTally = field(default_factory=DeclaredTally)
    interpreted: dict[str, str] = field(default_factory=dict)
    thread_errors: dict[str, int] = field(default_factory=dict)

    def add(self, other: Verdict) -> None:
        self.cases += other.cases
        self.replays += other.replays
        self.eager_calls += other.eager_calls
        self.tally.fields += other.tally.fields
        self.tally.cells += other.tally.cells
        self.layers.add(other.layers)
        self.audit.add(other.audit)
        self.boundary_classes.update(other.boundary_classes)
        self.declared.add(other.declared)
        self.interpreted.update(other.interpreted)
        for line, count in other.thread_errors.items():
            self.thread_errors[line] = self.thread_errors.get(line, 0) + count
