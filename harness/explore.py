"""Searches for a failing scenario with Hypothesis, saves it before shrinking, and shrinks it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Flaky
from hypothesis.internal.conjecture.engine import ConjectureRunner

from harness.compare import Finding, Kind
from harness.judge import OracleFailure, Verdict, judge
from harness.minimise import MOST_TRIALS, minimise
from harness.protocol import BackendFactory, LayerFactory, optimized_layer
from harness.scenario import Scenario
from harness.seeds import FailureFiles
from harness.strategies import LARGE, LARGE_LAYER, SMALL, SMALL_LAYER, restricted, scenarios


@dataclass(frozen=True)
class Profile:
    """How much one run explores. ``fresh``: draw new cases in every run instead of the same ones.

    cases: of metadata alone. layer_cases: of metadata and the attention layer behind it.
    """

    cases: int
    layer_cases: int
    fresh: bool


PROFILES = {
    "dev": Profile(48, 24, False),
    "pr": Profile(200, 64, False),
    "nightly": Profile(10_000, 5_000, True),
}
SHARDS = 8  # one test item each, so that pytest-xdist can spread them and progress shows
SCALES = {("cpu", False): SMALL, ("cpu", True): SMALL_LAYER, ("cuda", False): LARGE, ("cuda", True): LARGE_LAYER}


@dataclass(frozen=True)
class Subject:
    """What is judged. ``layer_sizes``: all that its layer is made for; see ``harness.strategies.restricted``."""

    backend: BackendFactory
    layer: LayerFactory = optimized_layer
    layer_sizes: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def judge(self, scenario: Scenario, device: torch.device, verdict: Verdict | None = None) -> Verdict:
        return judge(scenario, self.backend, device, verdict, self.layer)

    def fits(self, scenario: Scenario) -> bool:
        """Whether the layer is made for the sizes of ``scenario``; without a layer, all are."""
        layer = scenario.setup.layer
        known = {**dict(scenario.setup), **dict(layer)} if layer is not None else {}
        return layer is None or all(known[name] in allowed for name, allowed in self.layer_sizes.items())


class DeviceLost(BaseException):
    """A kernel fault left the GPU unusable for this process. Not an Exception: nothing may try to shrink it.

    failure: what was judged when it happened, saved as ``saved``. cases: how many had passed before.
    """

    def __init__(self, failure: OracleFailure, saved: Path, cases: int) -> None:
        super().__init__(f"the GPU faulted ({failure.finding.got}); case saved as {saved}")
        self.failure = failure
        self.saved = saved
        self.cases = cases


def has_lost_the_device(finding: Finding, device: torch.device) -> bool:
    """Whether after this nothing more can be judged on ``device`` in this process."""
    return device.type == "cuda" and finding.kind is Kind.CRASH and "CUDA error" in finding.got


class _OutOfTime(BaseException):
    """Ends a search. Not an Exception: Hypothesis would take it for a failure of the scenario at hand."""


@dataclass
class Exploration:
    """Outcome of one search. ``failure`` is the smallest failing case found, in the files ``saved``.

    lost: whether that failure left the device unusable for the process that judged it.
    """

    verdict: Verdict = field(default_factory=Verdict)
    failure: OracleFailure | None = None
    saved: Path | None = None
    flaky: bool = False
    lost: bool = False


def explore(
    subject: Subject,
    device: torch.device,
    cases: int,
    seed: int,
    save_dir: Path,
    deadline: float | None = None,
    switches: bool = True,
    with_layer: bool = False,
    most_shrinking: int | None = None,
) -> Exploration:
    """Judge ``cases`` scenarios drawn from ``seed``; stop at the first failure and shrink it.

    deadline: value of ``time.monotonic()`` after which no further scenario is judged. switches: draw the optimisations
    of ``optimized/`` too. with_layer: draw scenarios with an attention layer behind the metadata.
    most_shrinking: so many trials at most, of whole records, instead of as many as Hypothesis likes, which with a layer
    behind would take it many minutes.
    Raises DeviceLost, with the raw case saved, if the GPU faults.
    """
    outcome = Exploration()
    files = FailureFiles(save_dir)
    scale = SCALES[device.type, with_layer]
    if with_layer:
        scale = restricted(scale, subject.layer_sizes)
        most_shrinking = most_shrinking or MOST_TRIALS // 4

    def judge_one(scenario: Scenario) -> None:
        if deadline is not None and time.monotonic() > deadline and outcome.failure is None:
            raise _OutOfTime
        try:
            # What shrinking tries is not coverage.
            subject.judge(scenario, device, outcome.verdict if outcome.failure is None else None)
        except OracleFailure as failure:
            files.record(scenario, failure.finding.sentence())
            outcome.failure, outcome.saved = failure, files.minimal
            if has_lost_the_device(failure.finding, device):
                raise DeviceLost(failure, files.raw, outcome.verdict.cases) from failure
            raise

    search = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink) if most_shrinking is None else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )(given(scenarios(scale, switches=switches))(judge_one))
    try:
        with no_near_copies():
            hypothesis.seed(seed)(search)()
    except OracleFailure as failure:
        outcome.failure = minimised(failure, subject, device, most_shrinking or MOST_TRIALS)
        files.record(outcome.failure.scenario, outcome.failure.finding.sentence())
    except _OutOfTime:
        pass
    except Flaky:  # it failed once and passed when repeated: a race, or state that survives between backends
        outcome.flaky, outcome.saved = True, files.raw
    return outcome


def minimised(failure: OracleFailure, subject: Subject, device: torch.device, most: int) -> OracleFailure:
    """The failure of the simplest scenario, near that of ``failure``, which fails in the same way."""
    smallest = failure

    def still_fails(scenario: Scenario) -> bool:
        nonlocal smallest
        if not subject.fits(scenario):
            return False
        try:
            subject.judge(scenario, device)
        except OracleFailure as other:
            if (other.finding.kind, other.finding.field) == (failure.finding.kind, failure.finding.field):
                smallest = other
                return True
        return False

    minimise(failure.scenario, still_fails, most)
    return smallest


@contextmanager
def no_near_copies() -> Iterator[None]:
    """Keep Hypothesis from following each example by up to five copies of it with one part repeated elsewhere.

    Scenarios are full of parts of one kind (joins, replays), so five in six would be such copies, each as costly to
    judge as a new case. There is no setting for it; a Hypothesis without the method is left as it is.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConjectureRunner, "generate_mutations_from", lambda runner, data: None, raising=False)
        yield
