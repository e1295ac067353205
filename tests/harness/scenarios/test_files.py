"""Saved failures: whole or absent, the raw case before shrinking starts, none lost and none twice."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.scenarios.files import (
    CORPUS,
    MAX_FILE_BYTES,
    RUNNING,
    FailureFiles,
    cases_of_dead_processes,
    check_file,
    corpus,
    digest,
    load,
    replace_file,
    save,
    saved_while_judged,
    to_json,
)
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.reference.types import ForwardMode
from tests.support.metadata_cases import ACCEPT_TWO_THEN_ONE, TWO_LENGTHS, one_replay

ONE, OTHER, THIRD = TWO_LENGTHS, ACCEPT_TWO_THEN_ONE, one_replay(ForwardMode.DECODE)


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


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for target in ("elsewhere/case.json", "later/case.json"):
        link = tmp_path / f"{target[:4]}.json"
        link.symlink_to(tmp_path / target)
        check_file(link, "--json")
        replace_file(link, "text")
        assert link.is_symlink()
        assert (tmp_path / target).read_text() == "text"
        assert [path.name for path in (tmp_path / target).parent.iterdir()] == ["case.json"]


def test_devices_are_written_to_and_stay(tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    for path in (Path("/dev/null"), tmp_path / "null"):
        check_file(path, "--json")
        replace_file(path, "text")
        assert stat.S_ISCHR(path.stat().st_mode)
    assert (tmp_path / "null").is_symlink()
    with pytest.raises(OSError, match="No space left on device"):
        replace_file(Path("/dev/full"), "text")


def test_what_this_process_prints_to_is_written_to(tmp_path: Path) -> None:
    code = "from nsa_oracle.harness.scenarios.files import check_file, replace_file\nfrom pathlib import Path\n"
    code += "file = Path('/dev/stdout')\nprint('before', flush=True)\ncheck_file(file, '')\nreplace_file(file, 'x\\n')"
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert piped.stdout == "before\nx\n"
    with (tmp_path / "out").open("w") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert (tmp_path / "out").read_text() == "before\nx\n"


def test_pipes_folders_and_circles_are_refused_in_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "circle").symlink_to("circle")
    reasons = {"pipe": "it is a pipe", "link": "it is a pipe", ".": "it is a folder", "circle": "Too many levels"}
    for name, reason in reasons.items():
        path = tmp_path / name
        with pytest.raises(ScenarioError, match=f"^--json {path}: cannot be written: {reason}.*; name a file in "):
            check_file(path, "--json")
        with pytest.raises(OSError, match=f"{reason}"):
            replace_file(path, "text")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert (tmp_path / "circle").is_symlink()


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
    with pytest.raises(KeyboardInterrupt), saved_while_judged(ONE, folder):
        raise KeyboardInterrupt
    assert [load(file) for file in folder.iterdir()] == [ONE], "judged code may interrupt its process"
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


def test_cases_of_production_sizes_are_for_a_gpu_alone() -> None:
    """Some with so many rows that each row's keys are one program's."""
    everywhere, on_a_gpu = corpus(torch.device("cpu")), corpus(torch.device("cuda"))
    more = [load(file) for file in on_a_gpu if file not in everywhere]
    assert everywhere == on_a_gpu[: len(everywhere)]
    assert {file.parent for file in everywhere} == {CORPUS}
    assert all(scenario.setup.layer is not None for scenario in more)
    assert {scenario.setup.layer.kv_lora_rank for scenario in more if scenario.setup.layer is not None} == {512}
    rows = [most_requests(scenario) * scenario.setup.num_draft_tokens for scenario in more]
    assert min(rows) < 30
    assert max(rows) >= 80


def most_requests(scenario: Scenario) -> int:
    world = World(scenario, 0)
    batches = [world.apply(event) for event in scenario.events]
    return max(batch.size for batch in batches if batch is not None)


# What is no case


def refused(path: Path) -> str:
    with pytest.raises(ScenarioError) as caught:
        load(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: ")
    return line


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe would block, and a device never end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        assert refused(tmp_path / name).endswith("is not a regular file")
    assert "cannot be read: Is a directory; name the saved cases in it, as " in refused(tmp_path)


def test_file_larger_than_any_case_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "endless.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole
    assert refused(path).endswith(f"has more than {MAX_FILE_BYTES:,} bytes, which no case needs")


def test_byte_order_mark_and_missing_version_are_named(tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    path.write_text(to_json(ONE), encoding="utf-8-sig")
    assert refused(path).endswith("begins with a byte order mark; save it as UTF-8 without one")
    path.write_text(to_json(ONE).replace('  "schema_version": 1,\n', ""))
    assert refused(path).endswith('schema_version is missing; add "schema_version": 1')
    path.write_text(to_json(ONE))
    assert load(path) == ONE


SIZES = {"page_size": 1, "max_context_len": 20, "index_topk": 4, "num_steps": 1, "num_draft_tokens": 1, "pool_size": 1}
REPLAY, CAPTURE = {"event": "replay", "mode": "DECODE"}, {"event": "capture", "mode": "DECODE", "buckets": [1]}


@pytest.mark.parametrize(
    ("sizes", "events", "reason"),
    [
        ({"max_context_len": 1 << 20, "pool_size": 200}, [], "209,715,200 cells in req_to_token; at most 8,388,608"),
        ({}, [REPLAY] * 4097, "4,097 events; at most 4,096"),
        ({}, [{**CAPTURE, "buckets": [1] * 1025}], "1,025 graphs; at most 1,024"),
        ({"max_context_len": 1 << 20}, [{**CAPTURE, "buckets": [64]}], "cells in page tables; at most 67,108,864"),
        ({"max_context_len": 1 << 20}, [CAPTURE, *[{**REPLAY, "times": 16}] * 600], "cells to fill; at most"),
    ],
    ids=["pool", "events", "graphs", "tables", "work"],
)
def test_case_that_would_take_too_much_is_refused_before_anything_is_made(
    sizes: dict[str, int], events: list[dict[str, object]], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "case.json"
    path.write_text(json.dumps({"schema_version": 1, "setup": {**SIZES, **sizes}, "events": events}))
    assert reason in refused(path)
