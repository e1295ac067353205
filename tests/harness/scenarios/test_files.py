"""Saved failures: whole or absent, the raw case before shrinking starts, none lost and none twice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from test_detection import accept_two_then_one, factory_of, one_replay, two_lengths

from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.report.failure import explain
from nsa_oracle.harness.scenarios.files import (
    PRODUCTION,
    RUNNING,
    FailureFiles,
    cases_of_dead_processes,
    corpus,
    digest,
    from_json,
    load,
    save,
    saved_while_judged,
    to_json,
)
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.harness.search.explore import explore
from nsa_oracle.harness.subjects.subject import Subject
from nsa_oracle.reference.types import ForwardMode

ONE, OTHER, THIRD = two_lengths, accept_two_then_one, one_replay(ForwardMode.DECODE)


def crash(*_: object, **__: object) -> None:
    raise KeyboardInterrupt("killed")


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace")])
@pytest.mark.parametrize("existing", [False, True])
def test_save_is_all_or_nothing(
    owner: Any, name: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "case.json"
    if existing:
        save(ONE, path)
    monkeypatch.setattr(owner, name, crash)
    with pytest.raises(KeyboardInterrupt):
        save(OTHER, path)
    assert [load(p) for p in tmp_path.glob("*.json")] == ([ONE] if existing else [])


def test_save_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "case.json"
    save(ONE, path)
    save(OTHER, path)
    assert load(path) == OTHER
    assert [p.name for p in path.parent.iterdir()] == ["case.json"]


def test_saved_file_can_be_read_by_others(tmp_path: Path) -> None:
    """CI collects the files under another user."""
    ordinary, path = tmp_path / "ordinary", tmp_path / "case.json"
    ordinary.write_text("")
    save(ONE, path)
    assert path.stat().st_mode == ordinary.stat().st_mode


def test_digest_names_the_scenario_whatever_its_note() -> None:
    assert digest(ONE) == digest(ONE.model_copy(update={"note": "x"}))
    assert len({digest(ONE), digest(OTHER), digest(ONE.model_copy(update={"seed": 1}))}) == 3
    assert digest(THIRD) == "17feafd9a839"  # file names are stable


def test_first_is_raw_and_last_is_minimal(tmp_path: Path) -> None:
    files = FailureFiles(tmp_path)
    for number, scenario in enumerate((ONE, OTHER, THIRD)):
        files.record(scenario, f"sentence {number}")
        assert load(files.raw) == ONE.model_copy(update={"note": "sentence 0"})
        assert load(files.minimal) == scenario.model_copy(update={"note": f"sentence {number}"})
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{digest(ONE)}.min.json", f"{digest(ONE)}.raw.json"]


class Watched(planted.VerifyForgetsDrafts):  # type: ignore[misc, valid-type]
    """A broken backend that looks at the saved files whenever it is built."""

    folder: Path
    seen: list[dict[str, str]]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        there = {p.name: p.read_text(encoding="utf-8") for p in self.folder.iterdir()}
        self.seen.append({name: text for name, text in there.items() if not name.endswith(RUNNING)})


def test_raw_case_is_saved_before_shrinking_begins(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watched, "folder", tmp_path, raising=False)
    monkeypatch.setattr(Watched, "seen", [], raising=False)
    outcome = explore(Subject(factory_of(Watched)), device, 30, seed=3, save_dir=tmp_path)

    first = next(number for number, files in enumerate(Watched.seen) if files)
    assert first < len(Watched.seen) - 1, "nothing was shrunk"
    raw, minimal = sorted(Watched.seen[first], key=lambda name: ".min." in name)
    assert raw.endswith(".raw.json")
    assert minimal.endswith(".min.json")
    assert Watched.seen[first][raw] == Watched.seen[first][minimal]

    kept = {p.name: p for p in tmp_path.iterdir()}
    assert sorted(kept) == sorted([raw, minimal])
    assert kept[raw].read_text(encoding="utf-8") == Watched.seen[first][raw], "the raw case stays as it was found"
    assert outcome.failure is not None
    assert outcome.saved == kept[minimal]
    smallest: Scenario = load(kept[minimal])
    assert smallest == outcome.failure.scenario.model_copy(update={"note": outcome.failure.finding.sentence()})
    assert len(to_json(smallest)) < len(kept[raw].read_text(encoding="utf-8"))
    for path in kept.values():
        with pytest.raises(OracleFailure) as caught:
            judge(load(path), factory_of(planted.VerifyForgetsDrafts), device)
        assert caught.value.finding.sentence() == load(path).note


def test_case_is_kept_for_as_long_as_it_is_judged(tmp_path: Path) -> None:
    folder = tmp_path / "failures"
    with saved_while_judged(ONE, folder):
        (path,) = folder.iterdir()
        assert path.name == f"{digest(ONE)}.{os.getpid()}{RUNNING}"
        assert load(path) == ONE
    assert not folder.exists(), "nothing is left of what was made for it"
    folder.mkdir()
    with pytest.raises(ZeroDivisionError), saved_while_judged(ONE, folder):
        1 / 0  # noqa: B018
    assert list(folder.iterdir()) == []
    (tmp_path / "file").write_text("")
    with saved_while_judged(ONE, tmp_path / "file"):
        pass  # where nothing can be written, judging goes on


def test_only_what_a_dead_process_left_is_its_last_case(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    started = time.time() - 1
    dead, alive, odd = (tmp_path / f"abc.{pid}{RUNNING}" for pid in (ended.pid, os.getpid(), "x"))
    for path in (dead, alive, odd):
        path.write_text(to_json(ONE))
    assert cases_of_dead_processes(tmp_path, started) == [dead]
    os.utime(dead, (started - 5, started - 5))
    assert cases_of_dead_processes(tmp_path, started) == [], "that was another session"
    assert cases_of_dead_processes(tmp_path / "absent", started) == []


def test_finding_is_not_lost_where_it_cannot_be_saved(device: torch.device, tmp_path: Path) -> None:
    (tmp_path / "full").write_text("")
    subject = Subject(factory_of(planted.VerifyForgetsDrafts))
    outcome = explore(subject, device, 30, seed=3, save_dir=tmp_path / "full")
    assert outcome.failure is not None
    assert outcome.saved is None
    assert outcome.unsaved == f"{tmp_path}/full: File exists"
    told = explain(outcome.failure, outcome.saved, "COMMAND", outcome.unsaved)
    assert f"saved:  nowhere, {tmp_path}/full: File exists; as CASE.json it is" in told
    (text,) = re.findall(r"^\{\n.*?^\}\n", told, re.MULTILINE | re.DOTALL)
    assert from_json(text) == outcome.failure.scenario


def test_flaky_failure_keeps_the_raw_case(device: torch.device, tmp_path: Path) -> None:
    """A case that failed once and passes when repeated is still a failure."""
    built = []

    def factory(config: Any, req_to_token: torch.Tensor, _: tuple[str, ...]) -> Any:
        built.append(None)
        backend = planted.RaisesAtReplay if len(built) == 1 else planted.Clean
        return backend(config, req_to_token)

    outcome = None
    for seed in range(20):
        built.clear()
        outcome = explore(Subject(factory), device, 1, seed=seed, save_dir=tmp_path / str(seed))
        if outcome.failure is not None:
            break
    assert outcome is not None
    assert outcome.flaky
    assert outcome.saved is not None
    assert outcome.saved.name.endswith(".raw.json")
    assert load(outcome.saved).note.startswith("backend raised: IndexError")


def test_cases_of_production_sizes_are_for_a_gpu_alone() -> None:
    """Some with so many rows that each row's keys are one program's."""
    everywhere, on_a_gpu = corpus(torch.device("cpu")), corpus(torch.device("cuda"))
    more = [load(file) for file in on_a_gpu if file not in everywhere]
    assert everywhere == on_a_gpu[: len(everywhere)]
    assert {file.parent for file in everywhere} == {PRODUCTION.parent}
    assert all(scenario.setup.layer is not None for scenario in more)
    assert {scenario.setup.layer.kv_lora_rank for scenario in more if scenario.setup.layer is not None} == {512}
    rows = [most_requests(scenario) * scenario.setup.num_draft_tokens for scenario in more]
    assert min(rows) < 30
    assert max(rows) >= 80


def most_requests(scenario: Scenario) -> int:
    world = World(scenario, 0)
    batches = [world.apply(event) for event in scenario.events]
    return max(batch.size for batch in batches if batch is not None)
