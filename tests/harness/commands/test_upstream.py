"""The upstream command on miniature wheels: what it fetches, compares, prints and refuses. Nothing uses a network."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import miniature_sglang
from tests.support.command_line import FAILS, PASSES, assert_one_line_error, harness, run
from tests.support.miniature_sglang import BACKEND, MENDED, OLDER

STALE = "graph DECODE paged_mqa_schedule_metadata"
CASES = ("--cases", "6", "--seed", "1")
Upstream = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip takes for the package index."""
    folder = tmp_path / "index"
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    folder.mkdir()
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The folder of wheels that are fetched already: pip is not asked."""
    return tmp_path / ".upstream"


@pytest.fixture
def upstream(tmp_path: Path) -> Upstream:
    """The command, in a folder of its own."""
    return lambda *words: harness("upstream", *CASES, *words, cwd=tmp_path)


RECORDED = Path("docs/upstream/sglang-0.5.8.json")


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is recorded of the miniature."""
    folder = tmp_path_factory.mktemp("recording")
    miniature_sglang.wheel(folder / ".upstream")  # in the cache: pip is not asked
    done = harness("upstream", *CASES, "--version", "0.5.8", "--record", cwd=folder)
    assert done.returncode == PASSES, done.stdout + done.stderr
    assert f"recorded: {RECORDED}" in done.stdout
    assert sorted(file.name for file in (folder / ".upstream/0.5.8").rglob("*.py")) == [
        "_version.py", "environ.py", "nsa_backend.py", "nsa_backend_mtp_precompute.py", "utils.py"
    ], "only what is needed is unpacked"  # fmt: skip
    found: dict[str, Any] = json.loads((folder / RECORDED).read_text())
    (broken,) = (row for row in found["rows"] if row.get("broken"))
    assert [broken["call"], broken["mode"], broken["name"]] == STALE.split()
    assert (folder / RECORDED.parent / broken["case"]).exists()
    return found


def write_verdict(folder: Path, verdict: dict[str, Any], **changed: bool) -> None:
    rows = [
        {**row, **changed} if row["name"] == STALE.split()[-1] and "broken" in row else row for row in verdict["rows"]
    ]
    (folder / RECORDED).parent.mkdir(parents=True)
    (folder / RECORDED).write_text(json.dumps({**verdict, "rows": rows}))


def test_what_is_on_record_is_not_new(index: Path, upstream: Upstream, verdict: dict[str, Any], tmp_path: Path) -> None:
    """The newest version is taken, and one without an adapter is tried with the nearest."""
    write_verdict(tmp_path, verdict)
    miniature_sglang.wheel(index)
    miniature_sglang.wheel(index, "0.5.9")
    done = upstream()
    assert done.returncode == PASSES, done.stdout + done.stderr
    assert "sglang 0.5.9 has no adapter; tried with that of 0.5.8, the nearest known version" in done.stdout
    assert f"compared with the verdict on 0.5.8, {RECORDED}:" in done.stdout
    assert f"nothing new is broken of {len(verdict['rows'])} properties; 1 on record are" in done.stdout
    shown = next(line for line in done.stdout.splitlines() if line.startswith("  replay: "))
    words = shlex.split(shown.removeprefix("  replay: "))
    assert words[0] == "NSA_ORACLE_SGLANG=.upstream/0.5.9"
    again = run("env", *words, cwd=tmp_path)
    assert again.returncode == FAILS, again.stdout + again.stderr
    assert "wrong value: paged_mqa_schedule_metadata at step 0" in again.stdout


def test_a_new_break_fails_with_its_case(
    cache: Path, upstream: Upstream, verdict: dict[str, Any], tmp_path: Path
) -> None:
    write_verdict(tmp_path, verdict, broken=False)
    miniature_sglang.wheel(cache)
    done = upstream("--version", "0.5.8")
    assert done.returncode == FAILS, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith("NEW BREAK: "))
    assert lines[at].startswith(f"NEW BREAK: {STALE}: wrong value: paged_mqa_schedule_metadata at step 0")
    assert lines[at + 1].startswith("  replay: NSA_ORACLE_SGLANG=.upstream/0.5.8 ")
    assert [file.suffix for file in (tmp_path / "failures").iterdir()] == [".json"]
    assert "nothing new" not in done.stdout


def test_what_is_mended_or_no_longer_checked_is_said(
    cache: Path, upstream: Upstream, verdict: dict[str, Any], tmp_path: Path
) -> None:
    gone = {"call": "graph", "mode": "DECODE", "name": "a_field_of_old"}
    write_verdict(tmp_path, {**verdict, "rows": [*verdict["rows"], gone]})
    miniature_sglang.wheel(cache, changed={BACKEND: MENDED})
    done = upstream("--version", "0.5.8")
    assert done.returncode == PASSES, done.stdout + done.stderr
    assert f"mended: {STALE}" in done.stdout
    assert "no longer checked: graph DECODE a_field_of_old" in done.stdout
    assert done.stdout.splitlines()[-1] == f"nothing new is broken of {len(verdict['rows'])} properties"


def test_what_few_cases_would_not_draw_is_judged_by_its_case(cache: Path, tmp_path: Path) -> None:
    miniature_sglang.wheel(cache)
    words = ("upstream", "--version", "0.5.8", "--cases")
    assert harness(*words, "6", "--seed", "1", "--record", cwd=tmp_path).returncode == PASSES
    done = harness(*words, "1", "--seed", "3", cwd=tmp_path)
    assert done.returncode == PASSES, done.stdout + done.stderr
    assert f"mended: {STALE}" not in done.stdout
    assert done.stdout.splitlines()[-1].endswith("; 1 on record are")


def test_without_any_verdict_every_break_is_new(cache: Path, upstream: Upstream) -> None:
    miniature_sglang.wheel(cache)
    done = upstream("--version", "0.5.8")
    assert done.returncode == FAILS, done.stdout + done.stderr
    assert "no verdict is on record: every break is new" in done.stdout
    assert f"NEW BREAK: {STALE}: " in done.stdout


CALLS_THE_UNKNOWN = OLDER.replace(
    "        self.attn_backends = [",
    "        try:\n"
    "            from sglang.srt.somewhere_new import fused_copy\n"
    "            fused_copy()\n"
    "        except Exception:\n"
    "            pass\n"
    "        self.attn_backends = [",
)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (None, f"it has no {BACKEND}"),
        ("import torch\n", "has no attribute 'NativeSparseAttn"),
        (OLDER.replace("assert topk == 1", "assert topk == 2"), "AssertionError"),
        (CALLS_THE_UNKNOWN, "sglang.srt.somewhere_new.fused_copy (called, and nothing stands for it)"),
    ],
)
def test_an_unknown_layout_is_refused_in_one_line(
    cache: Path, upstream: Upstream, text: str | None, cause: str
) -> None:
    """Also if the backend swallows what a stand-in raises, and goes another way than on a server."""
    miniature_sglang.wheel(cache, "0.5.9", {BACKEND: text})
    done = upstream("--version", "0.5.9")
    assert_one_line_error(
        done, "sglang 0.5.9 has a layout that the adapter of 0.5.8 does not know: ", cause, "0.5.8, 0.5.15, 0.5.23"
    )


def test_a_version_of_another_series_is_refused_in_one_line(cache: Path, upstream: Upstream) -> None:
    miniature_sglang.wheel(cache, "0.6.0")
    done = upstream("--version", "0.6.0")
    assert_one_line_error(done, "sglang 0.6.0 is near no known version; known are 0.5.8, 0.5.15, 0.5.23")


def test_no_network_is_one_line(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    for other in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(other, raising=False)
    assert_one_line_error(upstream(), "sglang cannot be fetched: ", "check the version, the network and pip's index")


def test_a_malformed_verdict_is_one_line(cache: Path, upstream: Upstream, tmp_path: Path) -> None:
    miniature_sglang.wheel(cache)
    (tmp_path / RECORDED).parent.mkdir(parents=True)
    (tmp_path / RECORDED).write_text('{"version": 5}')
    assert_one_line_error(upstream("--version", "0.5.8"), f"{RECORDED}: not a verdict: version: ", "--record")
