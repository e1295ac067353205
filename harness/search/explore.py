"""Searches for a failing scenario with Hypothesis, saves it before shrinking, and shrinks it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nsa_oracle.harness.errors import BackendError, ScenarioError, counted
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.judge import OracleFailure, Verdict, judge_subject
from nsa_oracle.harness.scenarios.files import FailureFiles, saved_while_judged, to_json
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.scenarios.simplify import MOST_TRIALS, MOST_TRIALS_OF_A_HANG, simplify
from nsa_oracle.harness.search.drawing import NotReproducible, draw
from nsa_oracle.harness.search.progress import CaseCounter
from nsa_oracle.harness.search.stream import ATTEMPTS, CaseStream, Drawn
from nsa_oracle.harness.subjects.subject import Subject

SHRINKING_SECONDS = 120.0  # from the first failure on: a smaller case is not worth an endless run


class DeviceLost(BaseException):
    """A kernel fault made the GPU unusable for this process. Not an Exception, so that Hypothesis does not shrink it.

    failure: of the case that was being judged; saved: its file. cases: how many cases had passed before.
    """

    def __init__(self, failure: OracleFailure, saved: Path, cases: int) -> None:
        super().__init__(f"the GPU faulted ({failure.finding.got}); case saved as {saved}")
        self.failure = failure
        self.saved = saved
        self.cases = cases


def has_lost_the_device(finding: Finding, device: torch.device) -> bool:
    """Whether ``finding`` means that this process can judge nothing more on ``device``."""
    return device.type == "cuda" and finding.kind in (Kind.CRASH, Kind.LAYER_CRASH) and "CUDA error" in finding.got


@dataclass
class Exploration:
    """Outcome of one search.

    failure: of the smallest failing case found; saved: the file of that case. first: of the case as it was found.
    unsaved: why the case could not be saved; empty if it was. flaky: whether the failure did not occur again. lost:
    whether the failure made the device unusable for the process that judged it. passed: the cases that passed before a
    failure, as JSON. depends: whether the case passes in a fresh process; before: files of the cases behind which it
    fails there as well, if such were found.
    """

    verdict: Verdict = field(default_factory=Verdict)
    failure: OracleFailure | None = None
    saved: Path | None = None
    unsaved: str = ""
    first: OracleFailure | None = None
    flaky: bool = False
    lost: bool = False
    passed: list[str] = field(default_factory=list)
    depends: bool = False
    before: tuple[Path, ...] = ()

    def take_first(self) -> None:
        """Tell of the case as it was found. The smaller one is no case by itself, and its file is removed."""
        self.failure = self.first
        if self.saved is not None and ".min." in self.saved.name:
            self.saved.unlink(missing_ok=True)
            self.saved = self.saved.with_name(self.saved.name.replace(".min.", ".raw."))

    @property
    def remark(self) -> str:
        """Lines on how the failure showed, to print above its report; empty if there is nothing to say."""
        if self.lost:
            return "THE GPU FAULTED: the remaining cases of this process are judged in a child process.\n"
        if self.before:
            cases = counted(len(self.before), "earlier case")
            return f"DEPENDS ON EARLIER CASES: it passes in a fresh process, and fails there behind {cases}.\n"
        if self.flaky:
            return "NOT REPRODUCIBLE: the case failed once and passed when repeated (a race?); this is the raw case.\n"
        if self.depends:
            return (
                "DEPENDS ON ITS PROCESS: it passes in a fresh one, and behind the cases before it as far as there was "
                "time to try.\n"
            )
        return ""


def explore(
    subject: Subject,
    device: torch.device,
    cases: int | Sequence[int],
    seed: int,
    save_dir: Path,
    deadline: float | None = None,
    with_layer: bool = False,
    most_shrinking: int | None = None,
    counter: CaseCounter | None = None,
) -> Exploration:
    """Judge cases of the stream of ``seed``; stop at the first failure and shrink it.

    cases: their numbers, or how many of the first ones.
    deadline: value of ``time.monotonic()`` after which no further scenario is judged.
    with_layer: draw scenarios with an attention layer behind the metadata.
    most_shrinking: largest number of trials, all on finished records. If None, Hypothesis shrinks first, with as many
        trials as it likes; with a layer that would take many minutes, so the limit is then ``MOST_TRIALS // 4``.
        Either way no trial begins later than SHRINKING_SECONDS after the failure.
    counter: counts each case that has been judged. A failure like that of another part of the run is not shrunk.
    Raises DeviceLost, with the raw case saved, if the GPU faults, and BackendError or ScenarioError if a case cannot be
    judged.
    """
    if with_layer:
        most_shrinking = most_shrinking or MOST_TRIALS // 4
    search = _Search(subject, device, save_dir, counter)
    stream = CaseStream(subject.scale(device, with_layer), subject.switches, seed)
    for drawn in stream.cases(range(cases) if isinstance(cases, int) else cases):
        if deadline is not None and time.monotonic() > deadline:
            break
        try:
            search.judge(drawn.scenario)
        except OracleFailure as failure:
            with search.counted_as_shrinking():
                if failure.finding.kind is Kind.TIMEOUT:  # each trial takes the whole time limit
                    search.shrink_hang(MOST_TRIALS_OF_A_HANG if search.is_first else 0)
                else:
                    search.shrink(drawn, most_shrinking if search.is_first else 0)  # one bug is shrunk once
            break
    return search.outcome


class _Search:
    """Judges drawn scenarios, and shrinks the first that fails.

    is_first: whether no other part of the run has failed like this one. The case of a later part stays as it was found.
    """

    def __init__(self, subject: Subject, device: torch.device, save_dir: Path, counter: CaseCounter | None) -> None:
        self.outcome = Exploration()
        self._subject = subject
        self._device = device
        self._save_dir = save_dir
        self._counter = counter
        self._files = FailureFiles(save_dir)
        self.is_first = True
        self._shrinking_ends = math.inf
        self._is_shrinking = False
        self._count()  # also says which process judges

    def judge(self, scenario: Scenario) -> None:
        """Judge a drawn case, or a trial of the shrinking. Raises OracleFailure, after the case has been saved.

        Raises DeviceLost, BackendError or ScenarioError as ``explore`` does.
        """
        outcome = self.outcome
        try:
            with saved_while_judged(scenario, self._save_dir):
                # Trials of the shrinking do not count as coverage.
                verdict = outcome.verdict if outcome.failure is None else None
                judge_subject(self._subject, scenario, self._device, verdict)
            self._count()
            if outcome.failure is None:
                outcome.passed.append(to_json(scenario))
        except OracleFailure as failure:
            self._shrinking_ends = min(self._shrinking_ends, time.monotonic() + SHRINKING_SECONDS)
            self._keep(failure)
            if has_lost_the_device(failure.finding, self._device):
                raise DeviceLost(failure, self._files.raw, outcome.verdict.cases) from failure
            raise
        except (BackendError, ScenarioError):
            if outcome.failure is None:  # else this is a trial of the shrinking, which counts as passed
                raise

    @contextmanager
    def counted_as_shrinking(self) -> Iterator[None]:
        """While it lasts, the counts say that the failing case is made smaller, and how small it is by now."""
        self._is_shrinking = self.is_first
        self._count()
        try:
            yield
        finally:
            self._is_shrinking = False
            self._count()

    def shrink(self, drawn: Drawn, most: int | None) -> None:
        """Replace the failure by a smaller one. It is marked flaky if its case passes when it is judged again.

        most: as ``most_shrinking`` of ``explore``.
        """
        try:
            if most is None:
                self._shrink_by_hypothesis(drawn)
            else:
                self.judge(drawn.scenario)
            raise NotReproducible
        except OracleFailure as failure:
            trials = MOST_TRIALS if most is None else most
            self._keep(minimised(failure, self._subject, self._device, trials, self._shrinking_ends, self._keep))
        except NotReproducible:
            self.outcome.flaky = True
            self.outcome.saved = None if self.outcome.unsaved else self._files.raw

    def shrink_hang(self, most: int) -> None:
        """Replace the failure of a case that does not end by a smaller one, with up to ``most`` trials.

        The first of them is the case without the events behind the one that does not end.
        """
        failure = self.outcome.failure
        assert failure is not None
        events = failure.scenario.events[: (failure.event or 0) + 1]
        if most and len(events) < len(failure.scenario.events) and time.monotonic() < self._shrinking_ends:
            most -= 1
            try:
                judge_subject(self._subject, failure.scenario.model_copy(update={"events": events}), self._device)
            except OracleFailure as shorter:
                if shorter.finding.is_like(failure.finding):
                    failure = shorter
                    self._keep(shorter)  # the next trials may be interrupted
            except (BackendError, ScenarioError):
                pass
        self._keep(minimised(failure, self._subject, self._device, most, self._shrinking_ends, self._keep))

    def _shrink_by_hypothesis(self, drawn: Drawn) -> None:
        """Draw the case again and let Hypothesis shrink it. Raises OracleFailure, of the smallest case."""
        begun = False

        def judge_one(scenario: Scenario) -> None:
            nonlocal begun
            begun = begun or scenario == drawn.scenario
            if not begun:  # a candidate that was drawn before it
                return
            assert self.outcome.failure is not None
            if time.monotonic() > self._shrinking_ends:
                if scenario == self.outcome.failure.scenario:  # Hypothesis runs its smallest case once more
                    raise self.outcome.failure
                return
            self.judge(scenario)

        draw(drawn.cases, ATTEMPTS, drawn.seed, judge_one, shrink=True)

    def _keep(self, failure: OracleFailure) -> None:
        outcome = self.outcome
        outcome.failure = failure
        if outcome.first is None:
            outcome.first = failure
            found = f"{failure.finding.kind.value} {failure.finding.field}"
            self.is_first = self._counter is None or self._counter.claim(found)
        try:
            self._files.record(failure.scenario, failure.finding.sentence(), smaller=self.is_first)
            outcome.saved = self._files.minimal if self.is_first else self._files.raw
        except OSError as error:  # the finding is reported even if the disk is full
            outcome.saved, outcome.unsaved = None, f"{self._save_dir}: {error.strerror or error}"
        self._count()

    def _count(self) -> None:
        if self._counter is not None:
            verdict, failure = self.outcome.verdict, self.outcome.failure
            shrinking = (len(failure.scenario.events), self._shrinking_ends) if failure and self._is_shrinking else ()
            self._counter.note(verdict.cases, verdict.replays, self.outcome.saved, 0, failure, *shrinking)


def minimised(
    failure: OracleFailure,
    subject: Subject,
    device: torch.device,
    most: int,
    deadline: float = math.inf,
    keep: Callable[[OracleFailure], None] = lambda failure: None,
) -> OracleFailure:
    """The failure of the simplest scenario found, from that of ``failure``, that fails in the same way.

    most: largest number of trials. deadline: value of ``time.monotonic()`` after which no trial begins. keep: is called
    with each smaller failure.
    """
    smallest = failure

    def still_fails(scenario: Scenario) -> bool:
        nonlocal smallest
        if time.monotonic() > deadline or subject.misfit(scenario) is not None:
            return False
        try:
            judge_subject(subject, scenario, device)
        except OracleFailure as other:
            if other.finding.is_like(failure.finding):
                smallest = other
                keep(other)
                return True
        except (BackendError, ScenarioError):  # a trial that cannot be judged counts as passed
            pass
        return False

    simplify(failure.scenario, still_fails, most)
    if smallest.scenario.optimizations:  # a switch is at fault only if the case passes without it
        still_fails(smallest.scenario.model_copy(update={"optimizations": ()}))
    return smallest
