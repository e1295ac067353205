"""How bugs are hunted where it is not plain: on a saved case, after a lost GPU, in a process that dies."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recovery import CROWDED, FAULT
from typer.testing import CliRunner

import nsa_oracle.harness.__main__ as main
from nsa_oracle.harness.bugs import hunt as matrix
from nsa_oracle.harness.bugs.hunt import hunt, hunt_all
from nsa_oracle.harness.bugs.kill_matrix import LOG_WIDTH, kills_table, one_line_story
from nsa_oracle.harness.bugs.kills import Kill
from nsa_oracle.harness.bugs.zoo import ZOO
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.commands.terminal import INTERRUPTED
from nsa_oracle.harness.judge import OracleFailure
from nsa_oracle.harness.processes import Child, ChildDied
from nsa_oracle.harness.report.text import render
from nsa_oracle.harness.scenarios.files import to_json
from nsa_oracle.harness.search.explore import DeviceLost

CPU = torch.device("cpu")
BUG = ZOO["workspace-cleared-by-the-mirror"]
THREE = [ZOO["limit-frozen-above-the-capture"], BUG, ZOO["maximum-of-no-lengths"]]


def test_a_bug_that_is_not_drawn_is_hunted_on_its_saved_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "explore", None)  # nothing is drawn
    kill = hunt(dataclasses.replace(BUG, drawn=False), CPU, 50, 0, tmp_path)
    assert (kill.check, kill.meant, kill.cases, kill.lost) == (Check.CAPTURE, True, 1, False)
    assert kill.case


def test_a_bug_that_its_saved_case_does_not_show_survives(tmp_path: Path) -> None:
    kill = hunt(dataclasses.replace(ZOO["width-compiled-into-a-kernel"], plant=_plants_nothing), CPU, 50, 0, tmp_path)
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
    (kill,) = hunt_all([ZOO[name]], CPU, 50, 0, tmp_path, jobs=1)
    assert (kill.bug, kill.check, kill.meant, kill.sentence) == (name, Check.CRASH, meant, "its process ended with -11")


def test_every_bug_is_hunted_in_a_process_of_its_own(tmp_path: Path) -> None:
    kills = {kill.bug: kill for kill in hunt_all(THREE, CPU, 50, 0, tmp_path, jobs=2)}
    assert kills.keys() == {bug.name for bug in THREE}
    assert all(kill.meant for kill in kills.values())


def test_a_hunt_that_is_closed_gives_up_what_it_hunts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether that would take a minute or for ever."""
    ended: list[Child] = []
    end = Child.end
    monkeypatch.setattr(Child, "end", lambda child: (ended.append(child), end(child)))
    monkeypatch.setattr(matrix, "_hunt_by_name", at_once_or_never)
    kills = hunt_all(THREE, CPU, 20, 0, tmp_path, jobs=2)
    assert next(kills).bug == BUG.name
    kills.close()
    assert len(ended) == 2
    assert not any(child._process for child in ended)


def at_once_or_never(name: str, *_: Any) -> Kill:
    if name != BUG.name:
        time.sleep(1e6)
    return Kill(name, Check.CAPTURE, True, 1, 0.0, case=to_json(CROWDED))


@pytest.mark.parametrize(("meant", "code"), [(True, INTERRUPTED), (False, 1)])
def test_a_hunt_that_is_interrupted_tells_what_it_has(
    meant: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tidied = []

    def one_kill(*_: Any) -> Iterator[Kill]:
        yield dataclasses.replace(at_once_or_never(BUG.name), meant=meant)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # ``timeout`` sends two
            time.sleep(0.1)
            tidied.append(True)
        raise AssertionError("the signal was lost")

    monkeypatch.setattr(main, "hunt_all", one_kill)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))  # put back what --device cpu sets
    only = [word for bug in THREE for word in ("--only", bug.name)]
    file = tmp_path / "kills.json"
    done = CliRunner().invoke(main.app, ["bugs", "--device", "cpu", "--json", str(file), *only])
    assert done.exit_code == code, done.output
    assert done.output.splitlines()[-1] == "interrupted: 1 of 3 bugs"
    assert [kill["bug"] for kill in json.loads(file.read_text())] == [BUG.name]
    assert tidied


def test_a_bug_is_a_line_whatever_its_case() -> None:
    long = CROWDED.model_copy(update={"events": CROWDED.events * 40})
    kills = [
        Kill(BUG.name, Check.CAPTURE, True, 7, 3.6, case=to_json(long)),
        Kill(THREE[0].name, Check.METADATA, False, 2, 1.2, case=to_json(CROWDED)),
        Kill(THREE[2].name, None, False, 200, 9.0),
    ]
    head, *lines = render(kills_table(kills), LOG_WIDTH).splitlines()
    assert head.split() == ["bug", "check", "cases", "seconds", "smallest", "case"]
    assert [line.split()[0] for line in lines] == [BUG.name, THREE[0].name, THREE[2].name]
    assert one_line_story(long) in lines[0]
    assert lines[0].split()[1:4] == ["capture", "7", "4"]
    assert lines[1].split()[1:5] == ["metadata", "?", "2", "1"]  # not by the check that is meant to
    assert lines[2].split()[1:] == ["200", "9", "SURVIVED"]
