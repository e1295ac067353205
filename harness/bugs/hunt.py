"""Hunts bugs: judges fresh cases with a bug planted until one fails, and records the check and the number of cases."""

from __future__ import annotations

import queue
import tempfile
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from nsa_oracle.harness.bugs.bug import Bug
from nsa_oracle.harness.bugs.kill import Kill
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.cluster.pool import Pool, WorkersDied
from nsa_oracle.harness.cluster.work import child_of_worker
from nsa_oracle.harness.judge import OracleFailure, judge_subject
from nsa_oracle.harness.processes import Child, ChildDied
from nsa_oracle.harness.scenarios.files import BUG_CASES, load, to_json
from nsa_oracle.harness.search.drawing import Profile
from nsa_oracle.harness.search.explore import DeviceLost, explore, has_lost_the_device

# Limit of shrinking trials: enough for a readable case, cheap enough for every bug. On a GPU one trial takes seconds.
MOST_SHRINKING = {"cpu": 60, "cuda": 20}


def hunt(bug: Bug, device: torch.device, cases: int, seed: int, save_dir: Path) -> Kill:
    """Judges up to ``cases`` fresh scenarios with ``bug`` planted, and stops at the first that fails.

    A bug with ``drawn`` False is judged only on its saved case. seed: where scenarios are drawn from. save_dir: folder
    for the files of failures.
    """
    started = time.monotonic()
    with bug.plant() as subject:
        failure: OracleFailure | None = None
        judged = 0
        if not bug.drawn:
            try:
                judge_subject(subject, load(BUG_CASES / f"{bug.name}.json"), device)
                judged = 1
            except OracleFailure as caught:
                failure = caught
        else:
            try:
                limit = MOST_SHRINKING[device.type]
                outcome = explore(subject, device, cases, seed, save_dir, with_layer=bug.layer, most_shrinking=limit)
                failure, judged = outcome.failure, outcome.verdict.cases
            except DeviceLost as lost:
                failure, judged = lost.failure, lost.cases
    seconds = time.monotonic() - started
    if failure is None:
        return Kill(bug.name, None, False, judged, seconds)
    finding = failure.finding
    check = Check.of(finding)
    lost_device = has_lost_the_device(finding, device)
    case = to_json(failure.scenario)
    return Kill(bug.name, check, check in bug.caught_by, judged + 1, seconds, finding.sentence(), case, lost_device)


def hunt_all(
    bugs: Sequence[Bug], device: torch.device, profile: Profile, seed: int, save_dir: Path, jobs: int
) -> Generator[Kill, None, None]:
    """Hunts ``bugs`` in ``jobs`` child processes and yields a ``Kill`` for each bug, in the order of completion.

    profile: how many cases are tried on a bug, of metadata alone or with a layer, before it counts as a survivor.
    A child that a bug has cost its GPU is replaced before the next bug. Closing the generator, or an exception in it,
    ends all running hunts.
    """
    free: queue.SimpleQueue[Child] = queue.SimpleQueue()
    children = [Child(device.type, number) for number in range(jobs)]
    for child in children:
        free.put(child)
    threads = ThreadPoolExecutor(jobs)
    longest_first = sorted(bugs, key=lambda bug: not bug.layer)
    hunts = [
        threads.submit(
            _hunt_in_a_child,
            free,
            device.type,
            profile.layer_cases if bug.layer else profile.cases,
            seed,
            save_dir,
            bug.name,
        )
        for bug in longest_first
    ]
    try:
        for done in as_completed(hunts):
            yield done.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.end()
        threads.shutdown()
        for child in children:
            child.close()


def hunt_on(pool: Pool, bugs: Sequence[Bug], device: str, profile: Profile, seed: int) -> Generator[Kill, None, None]:
    """Hunts ``bugs`` as ``hunt_all`` does, on the workers of ``pool``. Raises PoolLost."""
    out: dict[object, Bug] = {}
    try:
        for bug in sorted(bugs, key=lambda bug: not bug.layer):  # the longest first
            cases = profile.layer_cases if bug.layer else profile.cases
            out[pool.submit(_hunt_on_worker, bug.name, device, cases, seed)] = bug
        while out:
            if (answer := pool.next(1.0)) is None:
                continue
            key, kill = answer
            bug = out.pop(key)
            if isinstance(kill, WorkersDied):
                kill = Kill(bug.name, Check.CRASH, Check.CRASH in bug.caught_by, 0, 0.0, str(kill))
            if isinstance(kill, Exception):
                raise kill
            yield kill
    finally:
        pool.cancel()


def _hunt_on_worker(name: str, device: str, cases: int, seed: int, number: int) -> Kill:
    child = child_of_worker(device, number)
    with tempfile.TemporaryDirectory() as scratch:
        kill = hunt_in(child, device, cases, seed, Path(scratch), name)
    if kill.lost:
        child.close()
    return kill


def _hunt_in_a_child(
    free: queue.SimpleQueue[Child], device: str, cases: int, seed: int, save_dir: Path, name: str
) -> Kill:
    """Hunts one bug in a free child."""
    child = free.get()
    try:
        return hunt_in(child, device, cases, seed, save_dir, name)
    finally:
        free.put(child)


def hunt_in(child: Child, device: str, cases: int, seed: int, save_dir: Path, name: str) -> Kill:
    """Hunts one bug in ``child``. A child that dies counts as a kill by ``Check.CRASH``."""
    started = time.monotonic()
    try:
        kill = child.call(_hunt_by_name, name, device, cases, seed, save_dir)
        if kill.lost:
            child.close()  # the next call starts a new process, in which the GPU works
        return kill
    except ChildDied as died:
        from nsa_oracle.harness.bugs.zoo import ZOO

        meant = Check.CRASH in ZOO[name].caught_by
        return Kill(name, Check.CRASH, meant, 0, time.monotonic() - started, str(died))


def _hunt_by_name(name: str, device: str, cases: int, seed: int, save_dir: Path) -> Kill:
    """``hunt`` for a child process: takes the bug by name, because a ``Bug`` cannot be pickled."""
    from nsa_oracle.harness.bugs.zoo import ZOO

    return hunt(ZOO[name], torch.device(device), cases, seed, save_dir)
