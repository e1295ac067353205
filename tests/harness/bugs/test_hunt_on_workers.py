"""The zoo on the workers of a pool: what a hunt hands out, and what it makes of workers that die."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nsa_oracle.harness.bugs.hunt import hunt_on
from nsa_oracle.harness.bugs.kill import Kill
from nsa_oracle.harness.bugs.zoo import ZOO
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.cluster.pool import WorkersDied
from nsa_oracle.harness.search.drawing import PROFILES

BUGS = [*[bug for bug in ZOO.values() if bug.shows_on("cpu")][:6], ZOO["no-relu"]]


class PoolOfKills:
    """Answers each call with the kill of its bug, last call first; ``dying``: with the death of its workers."""

    def __init__(self, dying: str = "") -> None:
        self.dying = dying
        self.given: dict[str, int] = {}
        self.waiting: list[tuple[int, str]] = []
        self.cancelled = False

    def size(self) -> int:
        return 1

    def submit(self, function: Callable[..., Any], *arguments: Any, urgent: bool = False) -> object:
        name, device, cases, seed = arguments
        assert (device, seed) == ("cpu", 3)
        self.given[name] = cases
        self.waiting.append((len(self.given), name))
        return len(self.given)

    def next(self, timeout: float) -> tuple[object, Any] | None:
        key, name = self.waiting.pop()
        return key, WorkersDied("3 workers died") if name == self.dying else Kill(name, Check.LOGITS, True, 1, 0.1, "")

    def cancel(self) -> None:
        self.cancelled = True


def test_each_bug_is_hunted_once_with_the_cases_of_its_kind() -> None:
    pool, profile = PoolOfKills(), PROFILES["pr"]
    kills = list(hunt_on(pool, BUGS, "cpu", profile, 3))
    assert sorted(kill.bug for kill in kills) == sorted(bug.name for bug in BUGS)
    assert pool.given == {bug.name: profile.layer_cases if bug.layer else profile.cases for bug in BUGS}
    assert pool.cancelled


def test_a_bug_whose_workers_die_is_a_crash() -> None:
    name = BUGS[0].name
    (kill,) = (kill for kill in hunt_on(PoolOfKills(name), BUGS, "cpu", PROFILES["pr"], 3) if kill.bug == name)
    assert (kill.check, kill.meant) == (Check.CRASH, Check.CRASH in BUGS[0].caught_by)


def test_what_a_worker_raises_ends_the_hunt() -> None:
    class Raising(PoolOfKills):
        def next(self, timeout: float) -> tuple[object, Any] | None:
            return self.waiting.pop()[0], ValueError("no kernels")

    pool = Raising()
    with pytest.raises(ValueError, match="no kernels"):
        list(hunt_on(pool, BUGS, "cpu", PROFILES["pr"], 3))
    assert pool.cancelled
