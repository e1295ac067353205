"""What a worker does: it judges a chunk of the stream of cases, or makes a failing case smaller, in a child process.

The worker itself runs no judged code. It stays in touch with the scheduler whatever that code does to its process, and
a child's main thread can be interrupted, which a thread of the worker cannot.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from nsa_oracle.harness.errors import BackendError, ScenarioError
from nsa_oracle.harness.judge import OracleFailure, Verdict, judge_subject
from nsa_oracle.harness.processes import Child, ChildDied
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.scenarios.simplify import MOST_TRIALS
from nsa_oracle.harness.search.explore import SHRINKING_SECONDS, has_lost_the_device, minimised
from nsa_oracle.harness.search.spec import SubjectSpec, built
from nsa_oracle.harness.search.stream import CaseStream
from nsa_oracle.harness.subjects.subject import Subject

GRACE_SECONDS = 60.0  # for a trial of the shrinking that had begun


@dataclass(frozen=True)
class ClusterTask:
    """What all chunks of a run have in common. device: "cpu" or "cuda". seed: of the stream of cases."""

    spec: SubjectSpec
    device: str
    seed: int


@dataclass(frozen=True)
class Chunk:
    """Cases of a stream, by their numbers. with_layer: which of the two streams of a seed.

    saved: saved cases instead, which ``numbers`` count.
    """

    with_layer: bool
    numbers: tuple[int, ...]
    saved: tuple[Scenario, ...] = ()

    @staticmethod
    def of_saved(cases: Sequence[Scenario]) -> Chunk:
        return Chunk(False, tuple(range(len(cases))), tuple(cases))

    def cut(self, begin: int, end: int | None = None) -> Chunk:
        """Its cases from place ``begin`` to ``end``."""
        return replace(self, numbers=self.numbers[begin:end], saved=self.saved[begin:end])


@dataclass
class JudgedChunk:
    """What became of a chunk. passed: how many of its cases passed, from the first one on.

    failure: of the case behind those; cases behind that one were not judged. died: how the process ended that judged
    the chunk, of which nothing else is known then; empty if it did not.
    """

    passed: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    failure: OracleFailure | None = None
    died: str = ""


@dataclass
class Smaller:
    """The smallest failure found. depends: a fresh process does not show it; it is then the failure as it was found."""

    failure: OracleFailure
    depends: bool = False


_children: dict[tuple[str, int], Child] = {}


def child_of_worker(device: str, number: int) -> Child:
    """The child process of this worker for ``device``, which stays. Raises BackendError if it may not have any."""
    if multiprocessing.current_process().daemon:
        raise BackendError(
            "this worker is a daemon, which may not start processes; start workers with "
            "DASK_DISTRIBUTED__WORKER__DAEMON=False in their environment"
        )
    return _children.setdefault((device, number), Child(device, number))


def judge_chunk(task: ClusterTask, chunk: Chunk, number: int = 0) -> JudgedChunk:
    """Judge the cases of ``chunk``, up to the first that fails. number: of this worker; it selects its GPU.

    Raises BackendError or ScenarioError, in one line, if the subject cannot be judged.
    """
    child = child_of_worker(task.device, number)
    try:
        judged = child.call(_judge, task, chunk)
    except ChildDied as died:
        return JudgedChunk(died=str(died))
    if judged.failure is not None and has_lost_the_device(judged.failure.finding, torch.device(task.device)):
        child.close()
    return judged


def make_smaller(task: ClusterTask, failure: OracleFailure, number: int = 0) -> Smaller:
    """Judge the failing case in a fresh process, and find a simpler one that fails in the same way."""
    child = Child(task.device, number)
    try:
        if child.call(_again, task, failure.scenario, timeout=SHRINKING_SECONDS + GRACE_SECONDS) is None:
            return Smaller(failure, depends=True)
        return Smaller(child.call(_minimised, task, failure, timeout=SHRINKING_SECONDS + GRACE_SECONDS))
    except ChildDied:
        return Smaller(failure)
    finally:
        child.close()


def drawn_case(task: ClusterTask, chunk: Chunk, number: int = 0) -> Scenario:
    """The first case of ``chunk``, which is not judged."""
    child = Child(task.device, number)
    try:
        return child.call(_drawn, task, chunk)
    finally:
        child.close()


# Functions that run in a child process.


def _judge(task: ClusterTask, chunk: Chunk) -> JudgedChunk:
    subject, device, judged = built(task.spec, task.device), torch.device(task.device), JudgedChunk()
    for scenario in _scenarios(task, chunk):
        try:
            if not chunk.saved or _fits(subject, scenario):
                judge_subject(subject, scenario, device, judged.verdict)
        except OracleFailure as failure:
            judged.failure = failure
            break
        judged.passed += 1
    return judged


def _again(task: ClusterTask, scenario: Scenario) -> OracleFailure | None:
    try:
        judge_subject(built(task.spec, task.device), scenario, torch.device(task.device))
    except OracleFailure as failure:
        return failure
    except (BackendError, ScenarioError):
        pass
    return None


def _minimised(task: ClusterTask, failure: OracleFailure) -> OracleFailure:
    ends = time.monotonic() + SHRINKING_SECONDS
    return minimised(failure, built(task.spec, task.device), torch.device(task.device), MOST_TRIALS, ends)


def _drawn(task: ClusterTask, chunk: Chunk) -> Scenario:
    return next(_scenarios(task, chunk))


def _scenarios(task: ClusterTask, chunk: Chunk) -> Iterator[Scenario]:
    if chunk.saved:
        yield from chunk.saved
        return
    subject, device = built(task.spec, task.device), torch.device(task.device)
    stream = CaseStream(subject.scale(device, chunk.with_layer), subject.switches, task.seed)
    for drawn in stream.cases(chunk.numbers):
        yield drawn.scenario


def _fits(subject: Subject, scenario: Scenario) -> bool:
    """Whether a saved case is within the subject's limits, and has none but its switches."""
    try:
        subject.check(scenario, Path("a case of the corpus"))
    except (BackendError, ScenarioError):
        return False
    return True
