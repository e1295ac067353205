"""SGLang's adapters on a miniature of its package: what they translate, declare and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Join, Replay
from nsa_oracle.harness.subjects.adapters import sglang
from tests.support import miniature_sglang
from tests.support.command_line import FAILS, PASSES, assert_one_line_error, harness, replay, saved
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND, VERIFY, case

ADAPTER = sglang.__name__
THREE_EVENTS = case(
    Capture(mode=DECODE, buckets=(1,)),
    Join(seq_len=257),
    Replay(mode=DECODE),
    max_context_len=520,
    num_steps=2,
    paged_mqa_num_sms=3,
)


@pytest.fixture
def miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the miniature of 0.5.8, named by the environment of this process and its children."""
    folder = miniature_sglang.write(tmp_path / "wheel")
    monkeypatch.setenv(sglang.PUBLISHED.folder, str(folder))
    return folder


def test_survey_finds_the_stale_schedule_and_nothing_else(miniature: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    words = ("--cases", "40", "--device", "cpu", "--save", str(tmp_path / "cases"), "--json", str(file))
    done = harness("survey", "--backend", f"{ADAPTER}:v0_5_8", *words)
    assert done.returncode == FAILS, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    broken = [row for row in rows if row["broken"]]
    assert [(row["call"], row["mode"], row["name"]) for row in broken] == [
        ("graph", "DECODE", "paged_mqa_schedule_metadata")
    ]
    assert {row["mode"] for row in rows} >= {"DECODE", "TARGET_VERIFY", "DRAFT_EXTEND", "DRAFT_EXTEND_V2"}
    assert broken[0]["replay"] in done.stdout
    assert "stand-ins, not judged: deep_gemm: get_num_sms" in done.stdout
    assert "something_never_called" not in done.stdout
    assert "not judged, as declared (calls): paged_mqa_schedule_metadata absent in DRAFT_EXTEND_V2" in done.stdout
    again = replay(broken[0]["case"], "--backend", f"{ADAPTER}:installed")
    assert again.returncode == FAILS
    assert "wrong value: paged_mqa_schedule_metadata at step 0" in again.stdout


def test_three_events_show_it(miniature: Path, tmp_path: Path) -> None:
    done = replay(saved(tmp_path, THREE_EVENTS), "--backend", f"{ADAPTER}:v0_5_8")
    assert done.returncode == FAILS, done.stdout + done.stderr
    assert "wrong value: paged_mqa_schedule_metadata at step 0, multiprocessor 2, entry 1" in done.stdout


def test_other_roles_are_right_but_for_what_is_waived(miniature: Path, tmp_path: Path) -> None:
    sizes = {"num_steps": 2, "max_context_len": 67, "paged_mqa_num_sms": 3, "flashmla_num_sm_parts": 3}
    events = (Join(seq_len=5), Accept(accept_lengths=(1,)))
    for mode in (VERIFY, DRAFT_EXTEND):
        calls = (Capture(mode=mode, buckets=(2,)), *events, Replay(mode=mode), Eager(mode=mode))
        done = replay(saved(tmp_path, case(*calls, **sizes)), "--backend", f"{ADAPTER}:v0_5_8")
        assert done.returncode == PASSES, done.stdout + done.stderr
        assert ("bit-exact but for 6 cells waived as declared" in done.stdout) == (mode is DRAFT_EXTEND)
    assert "waived: seqlens_expanded in DRAFT_EXTEND in graphs, behind last token: needed in 2 of 2" in done.stdout


def test_another_version_is_refused_in_one_line(miniature: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, THREE_EVENTS)
    done = replay(path, "--backend", f"{ADAPTER}:v0_5_23")
    assert_one_line_error(done, f"sglang 0.5.8 in {miniature}, not 0.5.23; known versions are 0.5.8, 0.5.15, 0.5.23")
    miniature_sglang.write(miniature, "0.6.1")
    done = replay(path, "--backend", f"{ADAPTER}:installed")
    assert_one_line_error(done, f"sglang 0.6.1 in {miniature}; known versions are 0.5.8, 0.5.15, 0.5.23")


def test_another_layout_is_refused_in_one_line(miniature: Path, tmp_path: Path) -> None:
    (miniature / "sglang/srt/layers/attention/nsa_backend.py").unlink()
    done = replay(saved(tmp_path, THREE_EVENTS), "--backend", f"{ADAPTER}:installed")
    assert_one_line_error(done, f"sglang 0.5.8 in {miniature} has another layout")


def test_no_package_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sglang.PUBLISHED.folder, str(tmp_path))
    with pytest.raises(BackendError, match=r"contains no sglang/_version.py; set NSA_ORACLE_SGLANG to an unpacked"):
        sglang.PUBLISHED.located()
    monkeypatch.delenv(sglang.PUBLISHED.folder)
    with pytest.raises(BackendError, match=r"^sglang is not installed; set NSA_ORACLE_SGLANG to the folder of an"):
        sglang.PUBLISHED.located()
