"""Continues after a kernel fault has made the GPU unusable for the process, by judging in expendable child processes.

Before a fault everything runs in the process that pytest started, because each further one has to load torch and Triton
first. The case that faulted is shrunk in child processes too: on the CPU if it fails there as well, since no trial
costs a process there, otherwise with few trials on the GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from nsa_oracle.harness.judge import OracleFailure, judge_subject
from nsa_oracle.harness.processes import Child, ChildDied
from nsa_oracle.harness.scenarios.files import digest, save, to_json
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.scenarios.simplify import simplify
from nsa_oracle.harness.search.confirmation import Confirmation
from nsa_oracle.harness.search.drawing import Profile
from nsa_oracle.harness.search.explore import DeviceLost, Exploration, explore, has_lost_the_device, minimised
from nsa_oracle.harness.search.quota import unvisited
from nsa_oracle.harness.search.spec import SubjectSpec
from nsa_oracle.harness.subjects.subject import Subject

_T = TypeVar("_T")
MOST_TRIALS_ON_CPU = 100
MOST_TRIALS_ON_GPU = 40
MOST_LOSSES = 8  # of those trials that may fault: after each, a new process has to be started
MOST_REMEMBERED = 4096  # cases judged before a failure that it may depend on
SECONDS_ON_CPU = 60.0  # for one case of a GPU's sizes, in the interpreter


class Recovery:
    """Runs explorations and saved cases: in this process until it loses the device, then in a child process.

    subject: None: in a child process from the start. Its methods then raise ChildDied if judged code ends that process.
    output: file that what a child prints is appended to; None: it prints where this process does.
    """

    def __init__(
        self, spec: SubjectSpec, subject: Subject | None, device: torch.device, output: Path | None = None
    ) -> None:
        self.spec = spec
        self.subject = subject
        self.device = device
        self.lost = False
        self._child = Child(device.type, output=output)
        self._confirmation = Confirmation(spec, device, output)
        self._judged: deque[str] = deque(maxlen=MOST_REMEMBERED)  # cases that the judging process has judged, as JSON

    def explore(self, *arguments: Any, **options: Any) -> Exploration:
        """Call ``search.explore.explore`` on the subject. A failure that costs the device is marked ``lost``.

        Only the first such failure is shrunk. Any other is confirmed in a fresh process.
        """
        outcome = self._run(_explore, arguments, options)
        self._judged.extend(outcome.passed)
        outcome.passed = []
        self._confirm(outcome, None if outcome.saved is None else outcome.saved.parent)
        return outcome

    def judge(self, scenario: Scenario, save_dir: Path | None = None) -> Exploration:
        """Judge one case, without shrinking it. save_dir: where to save earlier cases that a failure depends on.

        Without ``save_dir`` a failure is not confirmed.
        """
        outcome = self._run(_judge, (scenario,), {})
        self._confirm(outcome, save_dir)
        self._remember(scenario)
        return outcome

    def check(self, scenario: Scenario, file: Path) -> None:
        """Raises BackendError or ScenarioError, in one line, if the case of ``file`` cannot be judged."""
        self._ask(_check, scenario, file)

    def check_drawing(self, with_layer: bool) -> None:
        """Raises BackendError, in one line, if backend or layer cannot be judged, or leave nothing to draw."""
        self._ask(_check_drawing, with_layer)

    def misfit(self, scenario: Scenario, file: Path) -> str | None:
        """What in the case of ``file`` is outside the declared limits, or None. Raises ScenarioError for wrong
        switches.
        """
        return self._ask(_misfit, scenario, file)

    def left_out(self) -> list[str]:
        """What could be drawn but is excluded by the declared limits, one string per field."""
        return self._ask(Subject.not_judged)

    def unvisited(self, visited: Sequence[str], profile: Profile, with_layer: bool, seed: int, shard: int) -> list[str]:
        """The classes that the cases of ``shard`` were to visit and that are not in ``visited``."""
        return self._ask(_unvisited, visited, profile, with_layer, seed, shard)

    def close(self) -> None:
        self._child.close()
        self._confirmation.close()

    def _remember(self, scenario: Scenario) -> None:
        self._judged.append(to_json(scenario))

    def _confirm(self, outcome: Exploration, save_dir: Path | None) -> None:
        """Have ``outcome`` tell of a failure that a fresh process shows, and of the cases that it depends on."""
        found, first = outcome.failure, outcome.first or outcome.failure
        if found is None or first is None or outcome.lost or save_dir is None:
            return
        candidates = [first] if outcome.flaky or found is first else [found, first]
        confirmed = self._confirmation.confirmed(candidates, self._judged)
        outcome.depends = confirmed is None or bool(confirmed.before)
        if confirmed is not None:
            outcome.flaky = False
            with suppress(OSError):
                outcome.before = _saved_chain(confirmed.before, digest(first.scenario), save_dir)
        if (confirmed is None or confirmed.failure is first) and found is not first:
            outcome.take_first()
        self._remember(first.scenario)

    def _ask(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """The result of ``function(subject, device, *arguments)``, which judges nothing."""
        if self.subject is not None:
            return function(self.subject, self.device, *arguments)
        answer: _T = self._child.call(_in_child, self.spec, self.device.type, function, arguments, {})
        return answer

    def _run(
        self, function: Callable[..., Exploration], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Exploration:
        if self.lost or self.subject is None:
            try:
                outcome: Exploration = self._child.call(
                    _in_child, self.spec, self.device.type, function, arguments, options
                )
            except ChildDied:
                self._judged.clear()  # by a process that is no more
                raise
        else:
            outcome = function(self.subject, self.device, *arguments, **options)
        if outcome.lost:
            is_first, self.lost = not self.lost, True
            self._child.close()  # in case it was the child that lost the device
            self._judged.clear()
            # Shrinking a loss costs processes, and later losses are often the same bug: their raw cases are kept.
            if is_first and function is _explore and outcome.failure is not None and outcome.saved is not None:
                outcome.failure = self._shrunk(outcome.failure)
                outcome.saved = outcome.saved.with_name(outcome.saved.name.replace(".raw.", ".min."))
                note = outcome.failure.finding.sentence()
                save(outcome.failure.scenario.model_copy(update={"note": note}), outcome.saved)
        return outcome

    def _shrunk(self, failure: OracleFailure) -> OracleFailure:
        """The smallest failure found from ``failure`` that fails on the device, with as few processes as possible."""
        cpu = Child("cpu")
        try:
            on_cpu = cpu.call(_failure_in_child, self.spec, "cpu", failure.scenario, timeout=SECONDS_ON_CPU)
            if on_cpu is not None:
                small = cpu.call(_minimised_in_child, self.spec, on_cpu, timeout=5 * SECONDS_ON_CPU)
                confirmed = self._failure(small.scenario)
                if confirmed is not None:
                    return confirmed
        except ChildDied:
            pass  # the case is too large for the CPU, or it kills that process too
        finally:
            cpu.close()
        return self._shrunk_on_device(failure)

    def _shrunk_on_device(self, failure: OracleFailure) -> OracleFailure:
        smallest, losses = failure, 0

        def still_fails(scenario: Scenario) -> bool:
            nonlocal smallest, losses
            if losses >= MOST_LOSSES:
                return False
            other = self._failure(scenario)
            if other is None or not other.finding.is_like(failure.finding):
                return False
            losses += has_lost_the_device(other.finding, self.device)
            smallest = other
            return True

        simplify(failure.scenario, still_fails, MOST_TRIALS_ON_GPU)
        return smallest

    def _failure(self, scenario: Scenario) -> OracleFailure | None:
        """How ``scenario`` fails in the child, or None. The child is replaced if it loses the device."""
        try:
            failure = self._child.call(_failure_in_child, self.spec, self.device.type, scenario)
        except ChildDied:
            return None
        if failure is not None and has_lost_the_device(failure.finding, self.device):
            self._child.close()
        return failure


def _saved_chain(cases: Sequence[Scenario], stem: str, folder: Path) -> tuple[Path, ...]:
    """Save cases that another one, of digest ``stem``, has to be judged behind. Returns their files."""
    files = tuple(folder / f"{stem}.{number}.json" for number in range(1, len(cases) + 1))
    for scenario, file in zip(cases, files, strict=True):
        save(scenario, file)
    return files


def _explore(subject: Subject, device: torch.device, *arguments: Any, **options: Any) -> Exploration:
    try:
        return explore(subject, device, *arguments, **options)
    except DeviceLost as lost:
        return Exploration(failure=lost.failure, saved=lost.saved, lost=True)


def _judge(subject: Subject, device: torch.device, scenario: Scenario) -> Exploration:
    outcome = Exploration()
    try:
        judge_subject(subject, scenario, device, outcome.verdict)
    except OracleFailure as failure:
        outcome.failure = failure
        outcome.lost = has_lost_the_device(failure.finding, device)
    return outcome


def _check(subject: Subject, device: torch.device, scenario: Scenario, file: Path) -> None:
    subject.check(scenario, file)


def _check_drawing(subject: Subject, device: torch.device, with_layer: bool) -> None:
    subject.scale(device, with_layer)


def _misfit(subject: Subject, device: torch.device, scenario: Scenario, file: Path) -> str | None:
    subject.check_switches(scenario, file)
    return subject.misfit(scenario)


def _unvisited(
    subject: Subject,
    device: torch.device,
    visited: Sequence[str],
    profile: Profile,
    with_layer: bool,
    seed: int,
    shard: int,
) -> list[str]:
    return unvisited(visited, subject, device, profile, with_layer, seed, (shard,))


# Functions that run in a child process.


def _in_child(
    spec: SubjectSpec, device: str, function: Callable[..., _T], arguments: tuple[Any, ...], options: dict[str, Any]
) -> _T:
    where = torch.device(device)
    return function(spec.build(where), where, *arguments, **options)


def _failure_in_child(spec: SubjectSpec, device: str, scenario: Scenario) -> OracleFailure | None:
    where = torch.device(device)
    subject = spec.build(where)
    return _judge(subject, where, scenario).failure if subject.misfit(scenario) is None else None


def _minimised_in_child(spec: SubjectSpec, failure: OracleFailure) -> OracleFailure:
    where = torch.device("cpu")
    return minimised(failure, spec.build(where), where, MOST_TRIALS_ON_CPU)
