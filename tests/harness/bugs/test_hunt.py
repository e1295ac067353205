"""How bugs are hunted where it is not plain: on a saved case, after a lost GPU, in a process that dies."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_oracle.harness.bugs import hunt as matrix
from nsa_oracle.harness.bugs.hunt import hunt, hunt_all
from nsa_oracle.harness.bugs.kill import Kill
from nsa_oracle.harness.bugs.zoo import ZOO
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.judge import OracleFailure
from nsa_oracle.harness.processes import Child, ChildDied
from nsa_oracle.harness.scenarios.files import to_json
from nsa_oracle.harness.search.drawing import Profile
from nsa_oracle.harness.search.explore import DeviceLost
from tests.support.metadata_cases import CROWDED, FAULT

CPU = torch.device("cpu")
BUG = ZOO["workspace-cleared-by-the-mirror"]
THREE = [ZOO["limit-frozen-above-the-capture"], BUG, ZOO["maximum-of-no-lengths"]]


def test_a_bug_that_is_not_drawn_is_hunted_on_its_saved_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "explore", None)  # nothing is drawn
    kill = hunt(dataclasses.replace(BUG, drawn=False), CPU, 50, 0, tmp_path)
    assert (kill.check, kill.meant, kill.cases, kill.lost) == (Check.CAPTURE, True, 1, False)
    assert kill.case


def test_a_bug_that_its_saved_case_does_not_show_survives(tmp_path: Path) -> None:
    kill = hunt(
        dataclasses.replace(ZOO["width-compiled-into-a-kernel"], plant=_plants_nothing),
        CPU,
        50,
        0,
        tmp_path,
    )
    assert (kill.check, kill.meant, kill.cases) == (None, False, 1)


def _plants_nothing() -> Any:
    from nsa_oracle.harness.bugs.bug import by_mutation

    return by_mutation()()


def test_a_lost_gpu_is_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*arguments: Any, **options: Any) -> None:
        raise DeviceLost(OracleFailure(CROWDED, FAULT, 4), tmp_path / "raw.json", 7)

    monkeypatch.setattr(matrix, "explore", fault)
    kill = hunt(dataclasses.replace(BUG, caught_by=frozenset({Check.CRASH})), torch.device("cuda"), 50, 0, tmp_path)
    assert (kill.check, kill.meant, kill.cases, kill.lost) == (Check.CRASH, True, 8, True)
    assert "illegal memory access" in kill.sentence


@pytest.mark.parametrize(("name", "meant"), [(BUG.name, False), ("alignment-promised-of-any-row", True)])
def test_a_process_that_dies_is_a_crash(
    name: str, meant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(child: Child, *arguments: Any) -> None:
        raise ChildDied("its process ended with -11")

    monkeypatch.setattr(Child, "call", die)
    (kill,) = hunt_all([ZOO[name]], CPU, Profile(50, 50, False), 0, tmp_path, jobs=1)
    assert (kill.bug, kill.check, kill.meant, kill.sentence) == (name, Check.CRASH, meant, "its process ended with -11")


def test_every_bug_is_hunted_in_a_process_of_its_own(tmp_path: Path) -> None:
    kills = {kill.bug: kill for kill in hunt_all(THREE, CPU, Profile(50, 50, False), 0, tmp_path, jobs=2)}
    assert kills.keys() == {bug.name for bug in THREE}
    assert all(kill.meant for kill in kills.values())


def test_a_hunt_that_is_closed_gives_up_what_it_hunts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether that would take a minute or for ever."""
    ended: list[Child] = []
    end = Child.end
    monkeypatch.setattr(Child, "end", lambda child: (ended.append(child), end(child)))
    monkeypatch.setattr(matrix, "_hunt_by_name", at_once_or_never)
    kills = hunt_all(THREE, CPU, Profile(20, 20, False), 0, tmp_path, jobs=2)
    assert next(kills).bug == BUG.name
    kills.close()
    assert len(ended) == 2
    assert not any(child._process for child in ended)


def at_once_or_never(name: str, *_: Any) -> Kill:
    if name != BUG.name:
        time.sleep(1e6)
    return Kill(name, Check.CAPTURE, True, 1, 0.0, case=to_json(CROWDED))
