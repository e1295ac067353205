"""Hunts bugs with fresh cases, and tells which check killed which, after how many cases."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from harness import interpreter
from harness.bugs.bug import Bug, Check
from harness.explore import explore
from harness.scenario import Scenario, from_json, to_json

MOST_SHRINKING = 60  # trials: enough to read a case by, cheap enough to do for every bug


@dataclass(frozen=True)
class Kill:
    """How a bug fared. check: None if it survived ``cases`` cases. case: JSON of the shrunk scenario."""

    bug: str
    check: Check | None
    meant: bool  # whether that check is one that is meant to find it
    cases: int
    seconds: float
    sentence: str = ""
    case: str = ""

    @property
    def scenario(self) -> Scenario:
        return from_json(self.case)


def hunt(bug: Bug, device: torch.device, cases: int, seed: int, save_dir: Path) -> Kill:
    """Judge up to ``cases`` fresh scenarios with ``bug`` planted; stop at the first that fails."""
    started = time.monotonic()
    with bug.plant() as subject:
        outcome = explore(subject, device, cases, seed, save_dir, with_layer=bug.layer, most_shrinking=MOST_SHRINKING)
    seconds = time.monotonic() - started
    judged = outcome.verdict.cases
    if outcome.failure is None:
        return Kill(bug.name, None, False, judged, seconds)
    finding = outcome.failure.finding
    check = Check.of(finding)
    case = to_json(outcome.failure.scenario)
    return Kill(bug.name, check, check in bug.caught_by, judged + 1, seconds, finding.sentence(), case)


def hunt_all(
    bugs: Sequence[Bug], device: torch.device, cases: int, seed: int, save_dir: Path, jobs: int
) -> Iterator[Kill]:
    """Hunt every bug, ``jobs`` at a time, each in a process that it leaves clean; in the order of ``bugs``."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare, initargs=(device.type,)) as pool:
        names = [bug.name for bug in bugs]
        yield from pool.map(_hunt_by_name, names, *([x] * len(names) for x in (device.type, cases, seed, save_dir)))


def _prepare(device: str) -> None:
    """In a new process, before anything imports Triton."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        interpreter.speed_up()
        torch.set_num_threads(1)


def _hunt_by_name(name: str, device: str, cases: int, seed: int, save_dir: Path) -> Kill:
    from harness.bugs.zoo import ZOO  # late: bugs name what imports Triton

    return hunt(ZOO[name], torch.device(device), cases, seed, save_dir)
