"""Judges one scenario: runs it twice, with different poison, and stops at the first disagreement."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field

import torch

from harness.boundary import classes_of
from harness.compare import Finding, Kind, Tally, compare, expected_metadata
from harness.engine import Engine
from harness.graph import CaptureError
from harness.interpreter import deep_stack
from harness.poison import SENTINELS
from harness.protocol import BackendError, BackendFactory
from harness.scenario import Scenario


class OracleFailure(AssertionError):
    """The backend disagrees with the reference on ``scenario``.

    event: index of the event at which it shows, or None if it shows before the first.
    """

    def __init__(self, scenario: Scenario, finding: Finding, event: int | None) -> None:
        super().__init__(finding.sentence())
        self.scenario = scenario
        self.finding = finding
        self.event = event


@dataclass
class Verdict:
    """What was covered by scenarios that passed, both runs of each counted."""

    cases: int = 0
    replays: int = 0
    eager_calls: int = 0
    tally: Tally = field(default_factory=Tally)
    boundary_classes: Counter[str] = field(default_factory=Counter)

    def add(self, other: Verdict) -> None:
        self.cases += other.cases
        self.replays += other.replays
        self.eager_calls += other.eager_calls
        self.tally.fields += other.tally.fields
        self.tally.cells += other.tally.cells
        self.boundary_classes.update(other.boundary_classes)


@deep_stack
def judge(scenario: Scenario, factory: BackendFactory, device: torch.device, verdict: Verdict | None = None) -> Verdict:
    """Run ``scenario`` and compare every observation. Raises OracleFailure at the first disagreement.

    Adds to ``verdict`` if one is given, and returns it. BackendError passes through: nothing was judged then.
    """
    covered = Verdict(cases=1, boundary_classes=Counter(classes_of(scenario)))
    for sentinel in SENTINELS:
        _run(scenario, factory, device, sentinel, covered)
    total = verdict or Verdict()
    total.add(covered)
    return total


def _run(scenario: Scenario, factory: BackendFactory, device: torch.device, sentinel: int, verdict: Verdict) -> None:
    number: int | None = None
    try:
        engine = Engine(scenario, factory, device, sentinel)
        for number, event in enumerate(scenario.events):
            for seen in engine.run(event):
                expected = expected_metadata(engine.config, engine.world.req_to_token, seen)
                finding = compare(seen, expected, device, verdict.tally) or _intact(engine)
                if finding is not None:
                    raise OracleFailure(scenario, finding, number)
                if seen.in_graph:
                    verdict.replays += 1
                else:
                    verdict.eager_calls += 1
        finding = _intact(engine)  # a capture alone can write astray, too
        if finding is not None:
            raise OracleFailure(scenario, finding, number)
    except (OracleFailure, BackendError):
        raise
    except CaptureError as error:
        finding = Finding(Kind.CAPTURE, error.operation, error.reason, "a capturable operation", place=error.where)
        raise OracleFailure(scenario, finding, number) from error
    except Exception as error:
        finding = Finding(Kind.CRASH, type(error).__name__, _one_line(error), "no exception", place=_origin(error))
        raise OracleFailure(scenario, finding, number) from error


def _intact(engine: Engine) -> Finding | None:
    """What the backend wrote where it must not, or None."""
    overrun = engine.overrun()
    if overrun is not None:
        buffer = f"buffer of shape {list(overrun.shape)} made by {overrun.operation}"
        return Finding(Kind.GUARD, buffer, "a written guard band", "no write around it")
    modified = engine.modified_input()
    return None if modified is None else Finding(Kind.INPUT, modified, "changed content", "the engine's content")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _origin(error: Exception) -> str:
    """Where the exception came from: the innermost frame that is not a library's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
