"""Searches for a failing scenario with Hypothesis, saves it before shrinking, and shrinks it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Flaky, Unsatisfiable
from hypothesis.internal.conjecture.engine import ConjectureRunner
from hypothesis.internal.conjecture.providers import HypothesisProvider

from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.judge import OracleFailure, Verdict, judge
from nsa_oracle.harness.memory import far_apart
from nsa_oracle.harness.protocol import (
    BackendError,
    BackendFactory,
    LayerFactory,
    limits_of_backend,
    limits_of_optimized_layer,
    load_backend,
    load_layer,
    optimized_backend,
    optimized_layer,
    try_out,
    try_out_layer,
)
from nsa_oracle.harness.scenarios.files import FailureFiles, kept_while_judged
from nsa_oracle.harness.scenarios.limits import EVERYTHING, Limits
from nsa_oracle.harness.scenarios.scenario import Scenario, ScenarioError
from nsa_oracle.harness.scenarios.simplify import MOST_TRIALS, minimise
from nsa_oracle.harness.scenarios.strategies import LARGE, LARGE_LAYER, SMALL, SMALL_LAYER, Scale, restricted, scenarios


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
    "pr": Profile(200, 48, False),
    "nightly": Profile(10_000, 5_000, True),
}
SHARDS = 8  # one test item each, so that pytest-xdist can spread them and progress shows
SCALES = {("cpu", False): SMALL, ("cpu", True): SMALL_LAYER, ("cuda", False): LARGE, ("cuda", True): LARGE_LAYER}


@dataclass(frozen=True)
class Subject:
    """What is judged, and what it says it is made for. layer_limits: of the layer, where there is one."""

    backend: BackendFactory
    layer: LayerFactory = optimized_layer
    limits: Limits = EVERYTHING
    layer_limits: Limits = EVERYTHING

    @staticmethod
    def load(backend: str | None, layer: str | None, device: torch.device) -> Subject:
        """What ``module:attribute`` names, or ``optimized/``. Raises BackendError if it cannot be judged at all."""
        subject = Subject(optimized_backend)
        if backend is not None:
            subject = Subject(load_backend(backend), limits=limits_of_backend(backend))
        try_out(subject.backend, device, subject.limits)
        if layer is not None:
            layer_factory, layer_limits = load_layer(layer)
            layer_limits = try_out_layer(layer_factory, layer_limits, layer)
            return replace(subject, layer=layer_factory, layer_limits=layer_limits)
        return replace(subject, layer_limits=limits_of_optimized_layer())

    def judge(
        self, scenario: Scenario, device: torch.device, verdict: Verdict | None = None, graphs: bool = True
    ) -> Verdict:
        return judge(scenario, self.backend, device, verdict, self.layer, graphs)

    def misfit(self, scenario: Scenario) -> str | None:
        """What of ``scenario`` the backend, or the layer if there is one, is not made for; or None."""
        return self.all_limits(with_layer=scenario.setup.layer is not None).misfit(scenario)

    def check(self, scenario: Scenario, file: Path) -> None:
        """Raises BackendError if ``scenario``, of a file, is not what it is made for."""
        misfit = self.misfit(scenario)
        if misfit is not None:
            raise BackendError(f"{file}: {misfit} is not among the sizes and modes that are declared")

    def all_limits(self, with_layer: bool) -> Limits:
        return self.limits & self.layer_limits if with_layer else self.limits

    def scale(self, device: torch.device, with_layer: bool) -> Scale:
        """What is drawn for it. Raises ValueError if nothing is."""
        return restricted(scale_of(device, with_layer), self.all_limits(with_layer))

    def not_judged(self, device: torch.device) -> list[str]:
        """What is left out of all that could be drawn."""
        alone = self.limits.excluded(scale_of(device, with_layer=False).drawn())
        behind = self.all_limits(with_layer=True).excluded(scale_of(device, with_layer=True).drawn())
        told = [*alone, *(f"{told} (with a layer)" for told in behind if told not in alone)]
        if _is_small(device):
            told.append(
                f"far_slots True, far_req_to_token True (the GPU has less than {far_apart.MOST_BYTES >> 30} GiB)"
            )
        return told


def scale_of(device: torch.device, with_layer: bool) -> Scale:
    """What is drawn on a device; on a GPU with little memory nothing that lies far apart."""
    scale = SCALES[device.type, with_layer]
    return replace(scale, far_slots=(False,), far_req_to_token=(False,)) if _is_small(device) else scale


def _is_small(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < far_apart.MOST_BYTES


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


class _Unjudged(BaseException):
    """Ends a search in which a scenario cannot be judged. Not an Exception: there is nothing to shrink.

    error: why.
    """

    def __init__(self, error: BackendError | ScenarioError) -> None:
        super().__init__(str(error))
        self.error = error


class OutOfTime(BaseException):
    """Ends a search. Not an Exception: Hypothesis would take it for a failure of the scenario at hand."""


@dataclass
class Exploration:
    """Outcome of one search. ``failure`` is the smallest failing case found, in the file ``saved``.

    unsaved: why it could not be saved, if so. lost: whether that failure left the device unusable for the process that
    judged it.
    """

    verdict: Verdict = field(default_factory=Verdict)
    failure: OracleFailure | None = None
    saved: Path | None = None
    unsaved: str = ""
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
    Raises DeviceLost, with the raw case saved, if the GPU faults, and BackendError or ScenarioError if a case cannot be
    judged.
    """
    outcome = Exploration()
    files = FailureFiles(save_dir)
    scale = subject.scale(device, with_layer)
    if with_layer:
        most_shrinking = most_shrinking or MOST_TRIALS // 4

    def keep(failure: OracleFailure) -> None:
        outcome.failure = failure
        try:
            files.record(failure.scenario, failure.finding.sentence())
            outcome.saved = files.minimal
        except OSError as error:  # a full disk must not cost the finding
            outcome.saved, outcome.unsaved = None, f"{save_dir}: {error.strerror or error}"

    def judge_one(scenario: Scenario) -> None:
        if deadline is not None and time.monotonic() > deadline and outcome.failure is None:
            raise OutOfTime
        try:
            with kept_while_judged(scenario, save_dir):
                # What shrinking tries is not coverage.
                subject.judge(scenario, device, outcome.verdict if outcome.failure is None else None)
        except OracleFailure as failure:
            keep(failure)
            if has_lost_the_device(failure.finding, device):
                raise DeviceLost(failure, files.raw, outcome.verdict.cases) from failure
            raise
        except (BackendError, ScenarioError) as error:
            if outcome.failure is None:  # else it is a smaller case that shrinking tries: one that shows nothing
                raise _Unjudged(error) from None

    search = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink) if most_shrinking is None else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )(given(scenarios(scale, switches=switches))(judge_one))
    try:
        with own_draws():
            hypothesis.seed(seed)(search)()
    except OracleFailure as failure:
        keep(minimised(failure, subject, device, most_shrinking or MOST_TRIALS))
    except OutOfTime:
        pass
    except _Unjudged as ended:
        raise ended.error from None
    except Flaky:  # it failed once and passed when repeated: a race, or state that survives between backends
        outcome.flaky = True
        outcome.saved = None if outcome.unsaved else files.raw
    return outcome


def minimised(failure: OracleFailure, subject: Subject, device: torch.device, most: int) -> OracleFailure:
    """The failure of the simplest scenario, near that of ``failure``, which fails in the same way."""
    smallest = failure

    def still_fails(scenario: Scenario) -> bool:
        nonlocal smallest
        if subject.misfit(scenario) is not None:
            return False
        try:
            subject.judge(scenario, device)
        except OracleFailure as other:
            if (other.finding.kind, other.finding.field) == (failure.finding.kind, failure.finding.field):
                smallest = other
                return True
        except (BackendError, ScenarioError):  # a trial that cannot be judged shows nothing
            pass
        return False

    minimise(failure.scenario, still_fails, most)
    return smallest


@contextmanager
def own_draws() -> Iterator[None]:
    """Keep Hypothesis from two habits that are no settings of it; a Hypothesis that lacks one is left as it is.

    It follows each example by up to five copies of it with one part repeated elsewhere. Scenarios are full of parts of
    one kind (joins, replays), so five in six would be such copies, each as costly to judge as a new case. And it takes
    one number in twenty from the constants of whatever modules of the project are loaded, so that one seed would give
    other cases alone than among other tests.
    Raises BackendError if there is no scenario to draw.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConjectureRunner, "generate_mutations_from", lambda runner, data: None, raising=False)
        patch.setattr(HypothesisProvider, "_maybe_draw_constant", lambda *_, **__: None, raising=False)
        try:
            yield
        except Unsatisfiable:
            raise BackendError("no case that is drawn here has all of the sizes that are declared at once") from None
