"""vLLM's adapters on a miniature of its package: what they translate, declare and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Join, Replay
from nsa_oracle.harness.subjects.adapters import vllm
from nsa_oracle.harness.subjects.adapters import vllm_stand_ins as stand_ins
from nsa_oracle.reference import schedules
from tests.support import miniature_vllm
from tests.support.command_line import FAILS, PASSES, assert_one_line_error, harness, replay, saved
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND_V2, EXTEND, VERIFY, case

ADAPTER = vllm.__name__
SIZES = {"page_size": 64, "max_context_len": 520, "num_steps": 1, "drive": "single_step", "paged_mqa_num_sms": 6}
MODES = (DECODE, VERIFY, DRAFT_EXTEND_V2)


@pytest.fixture
def miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the miniature, named by the environment of this process and its children."""
    folder = miniature_vllm.write(tmp_path / "wheel")
    monkeypatch.setenv(vllm.PUBLISHED.folder, str(folder))
    return folder


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_a_history_of_all_modes_is_right(miniature: Path, tmp_path: Path, drafts: int) -> None:
    """Two query tokens of a request have a kernel, four run on pairs of multiprocessors, three are flattened."""
    history = case(
        *(Capture(mode=mode, buckets=(3,)) for mode in MODES),
        Join(seq_len=300),
        Join(seq_len=65),
        *(Replay(mode=mode) for mode in MODES),
        *(Eager(mode=mode) for mode in MODES),
        Accept(accept_lengths=(1, 1)),
        Eager(mode=EXTEND, extend_lens=(7, 1)),  # the runner puts the second request first
        Eager(mode=EXTEND, extend_lens=(3, 3)),
        Eager(mode=EXTEND, extend_lens=(1, 9)),
        *(Replay(mode=mode) for mode in MODES),
        num_draft_tokens=drafts,
        **SIZES,
    )
    done = replay(saved(tmp_path, history), "--backend", f"{ADAPTER}:v0_33")
    assert done.returncode == PASSES, done.stdout + done.stderr


def survey(folder: Path, adapter: str, *words: str) -> tuple[int, list[tuple[str, str, str]], str]:
    """The exit code, the rows that were broken, and what was printed."""
    file = folder / "rows.json"
    words = ("--cases", "16", "--device", "cpu", "--save", str(folder / "cases"), "--json", str(file), *words)
    done = harness("survey", "--backend", f"{ADAPTER}:{adapter}", *words)
    rows = json.loads(file.read_text())["rows"]
    broken = [(row["call"], row["mode"], row["name"]) for row in rows if row["broken"]]
    return done.returncode, broken, done.stdout


def test_a_survey_of_a_clean_engine_finds_nothing(miniature: Path, tmp_path: Path) -> None:
    code, broken, shown = survey(tmp_path, "v0_33")
    assert (code, broken) == (PASSES, []), shown
    assert "waived: max_seq_len_q in TARGET_VERIFY, several rows: needed in " in shown
    assert "vllm.platforms: current_platform" in shown
    assert "never_called" not in shown
    assert "replays without a request; EXTEND of a request without a new token" in shown


def test_a_schedule_that_is_not_refreshed_is_found(miniature: Path, tmp_path: Path) -> None:
    miniature_vllm.write(miniature, miniature_vllm.FORGETS)
    code, broken, shown = survey(tmp_path, "installed")
    assert code == FAILS, shown
    assert {name for _, _, name in broken} == {"paged_mqa_schedule_metadata"}
    assert {mode for _, mode, _ in broken} >= {"DECODE", "TARGET_VERIFY", "DRAFT_EXTEND_V2"}


def test_the_drafters_loop_is_refreshed_in_the_graph(miniature: Path, tmp_path: Path) -> None:
    code, broken, shown = survey(tmp_path, "v0_33_fused_draft")
    assert (code, broken) == (PASSES, []), shown
    miniature_vllm.write(miniature, miniature_vllm.FORGETS_IN_GRAPH)
    code, broken, shown = survey(tmp_path, "v0_33_fused_draft")
    assert code == FAILS, shown
    assert ("graph", "DECODE", "seqlens_expanded") in broken


def test_another_version_is_refused_in_one_line(miniature: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, case(Join(seq_len=3), Eager(mode=DECODE), **SIZES))
    done = replay(path, "--backend", f"{ADAPTER}:v0_24")
    assert_one_line_error(done, f"vllm 0.33.0 in {miniature}, not 0.24.0; known versions are 0.24.0, 0.33.0")
    miniature_vllm.write(miniature, version="0.34.1")
    done = replay(path, "--backend", f"{ADAPTER}:installed")
    assert_one_line_error(done, f"vllm 0.34.1 in {miniature}; known versions are 0.24.0, 0.33.0")
    assert replay(path, "--backend", f"{ADAPTER}:nearest").returncode == PASSES


def test_near_versions() -> None:
    assert [vllm.PUBLISHED.nearest_to(version) for version in ("0.25.1", "0.29.0", "1.0.0")] == [
        "0.24.0",
        "0.33.0",
        None,
    ]


def test_upstream_takes_the_engine(tmp_path: Path) -> None:
    miniature_vllm.wheel(tmp_path / ".upstream", miniature_vllm.FORGETS)  # in the cache: pip is not asked
    words = ("--engine", "vllm", "--version", "0.33.0", "--cases", "12")
    done = harness("upstream", *words, "--record", cwd=tmp_path)
    assert done.returncode == PASSES, done.stdout + done.stderr
    found = json.loads((tmp_path / "docs/upstream/vllm-0.33.0.json").read_text())
    assert (found["engine"], found["adapter"]) == ("vllm", "0.33.0")
    cases = [row["case"] for row in found["rows"] if row.get("broken")]
    assert cases
    assert all((tmp_path / "docs/upstream" / name).exists() for name in cases)
    again = harness("upstream", *words, cwd=tmp_path)
    assert again.returncode == PASSES, again.stdout + again.stderr
    assert f"nothing new is broken of {len(found['rows'])} properties; {len(cases)} on record are" in again.stdout
    assert f"  replay: {vllm.PUBLISHED.folder}=.upstream/vllm-0.33.0 " in again.stdout


@pytest.mark.parametrize("lens", [[1], [0, 0], [300, 1, 0, 257], [5] * 9, [0, 4000]])
@pytest.mark.parametrize("slots", [1, 2, 7, 132])
def test_the_schedule_of_the_stand_in_is_that_of_the_reference(lens: list[int], slots: int) -> None:
    lengths = torch.tensor(lens, dtype=torch.int32)
    made = stand_ins.get_paged_mqa_logits_metadata(lengths[:, None], 64, slots)
    assert made.dtype is torch.int32
    assert torch.equal(made, schedules.paged_mqa_schedule(lengths, slots))
