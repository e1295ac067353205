"""Searches for a failing scenario with Hypothesis, saves it before shrinking, and shrinks it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Flaky

from harness.compare import Kind
from harness.judge import OracleFailure, Verdict, judge
from harness.protocol import BackendFactory
from harness.scenario import Scenario
from harness.seeds import FailureFiles
from harness.strategies import LARGE, SMALL, scenarios


@dataclass(frozen=True)
class Profile:
    """How much one run explores. ``fresh``: draw new cases in every run instead of the same ones."""

    cases: int
    fresh: bool


PROFILES = {"dev": Profile(48, False), "pr": Profile(360, False), "nightly": Profile(10_000, True)}
SHARDS = 8  # one test item each, so that pytest-xdist can spread them and progress shows


class DeviceLost(BaseException):
    """A kernel fault left the GPU unusable for this process. Not an Exception: nothing may try to shrink it."""


@dataclass
class Exploration:
    """Outcome of one search. ``failure`` is the smallest failing case found, in the files ``saved``."""

    verdict: Verdict = field(default_factory=Verdict)
    failure: OracleFailure | None = None
    saved: Path | None = None
    flaky: bool = False


def explore(
    factory: BackendFactory,
    device: torch.device,
    cases: int,
    seed: int,
    save_dir: Path,
    deadline: float | None = None,
    switches: bool = True,
) -> Exploration:
    """Judge ``cases`` scenarios drawn from ``seed``; stop at the first failure and shrink it.

    deadline: value of ``time.monotonic()`` after which no further scenario is judged. switches: draw the optimisations
    of ``optimized/`` too. Raises DeviceLost, with the raw case saved, if the GPU faults.
    """
    outcome = Exploration()
    files = FailureFiles(save_dir)

    def judge_one(scenario: Scenario) -> None:
        out_of_time = deadline is not None and time.monotonic() > deadline
        if out_of_time and outcome.failure is None:
            return
        try:
            judge(scenario, factory, device, outcome.verdict)
        except OracleFailure as failure:
            files.record(scenario, failure.finding.sentence())
            outcome.failure, outcome.saved = failure, files.minimal
            if device.type == "cuda" and failure.finding.kind is Kind.CRASH and "CUDA error" in failure.finding.got:
                raise DeviceLost(f"the GPU faulted ({failure.finding.got}); case saved as {files.raw}") from failure
            raise

    search = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )(given(scenarios(SMALL if device.type == "cpu" else LARGE, switches=switches))(judge_one))
    try:
        hypothesis.seed(seed)(search)()
    except OracleFailure as failure:
        outcome.failure = failure
    except Flaky:  # it failed once and passed when repeated: a race, or state that survives between backends
        outcome.flaky, outcome.saved = True, files.raw
    return outcome
