"""How bugs are hunted where it is not plain: on a saved case, after a lost GPU, in a process that dies."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recovery import CROWDED, FAULT

from harness.bugs import matrix
from harness.bugs.bug import Check
from harness.bugs.matrix import hunt, hunt_all
from harness.bugs.zoo import ZOO
from harness.children import Child, ChildDied
from harness.explore import DeviceLost
from harness.judge import OracleFailure

CPU = torch.device("cpu")
BUG = ZOO["workspace-cleared-by-the-mirror"]


def test_a_bug_that_is_not_drawn_is_hunted_on_its_saved_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "explore", None)  # nothing is drawn
    kill = hunt(dataclasses.replace(BUG, drawn=False), CPU, 50, 0, tmp_path)
    assert (kill.check, kill.meant, kill.cases, kill.lost) == (Check.CAPTURE, True, 1, False)
    assert kill.case


def test_a_bug_that_its_saved_case_does_not_show_survives(tmp_path: Path) -> None:
    kill = hunt(dataclasses.replace(ZOO["width-compiled-into-a-kernel"], plant=_plants_nothing), CPU, 50, 0, tmp_path)
    assert (kill.check, kill.meant, kill.cases) == (None, False, 1)


def _plants_nothing() -> Any:
    from harness.bugs.bug import by_mutation

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
    (kill,) = hunt_all([ZOO[name]], CPU, 50, 0, tmp_path, jobs=1)
    assert (kill.bug, kill.check, kill.meant, kill.sentence) == (name, Check.CRASH, meant, "its process ended with -11")


def test_kills_come_in_the_order_of_the_bugs(tmp_path: Path) -> None:
    bugs = [ZOO["limit-frozen-above-the-capture"], BUG, ZOO["maximum-of-no-lengths"]]
    kills = list(hunt_all(bugs, CPU, 20, 0, tmp_path, jobs=2))
    assert [kill.bug for kill in kills] == [bug.name for bug in bugs]
    assert all(kill.meant for kill in kills)
