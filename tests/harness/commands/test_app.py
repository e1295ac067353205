"""The command line as a whole: its commands, its devices, and words that it does not know."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nsa_oracle.harness.__main__ import app
from nsa_oracle.reference.types import ForwardMode
from tests.support.command_line import PASSES, UNUSABLE, assert_one_line_error, harness, saved
from tests.support.metadata_cases import one_replay
from tests.support.project import PROJECT

CASE = one_replay(ForwardMode.DECODE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu(tmp_path: Path) -> None:
    assert_one_line_error(harness("replay", saved(tmp_path, CASE), "--device", "cuda"), "--device cuda", "cpu")


def test_usage_errors(tmp_path: Path) -> None:
    for words, told in (
        (("replay",), "replay: Missing argument 'files'"),
        (("explode",), "No such command 'explode'"),
        (("--explode",), "No such option: --explode"),
        (("survey", "--casess", "3"), "survey: No such option: --casess"),
        (("replay", saved(tmp_path, CASE), "--device", "tpu"), "replay: Invalid value for '--device'"),
    ):
        assert_one_line_error(harness(*words), told, "--help")


def test_without_words_the_help_is_shown() -> None:
    done = harness()
    assert "Commands" in done.stdout + done.stderr
    assert "error: " not in done.stderr


@pytest.mark.parametrize("seconds", ["0.001", "1e-9", "-1", "nan", "inf", "1e300"])
def test_a_limit_that_cannot_be_kept_is_refused(seconds: str, tmp_path: Path) -> None:
    done = harness("replay", saved(tmp_path, CASE), "--timeout", seconds)
    assert done.returncode == UNUSABLE
    assert "is not in the range from 0.1 to 1,000,000 seconds (0: no limit)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_line_break_in_the_name_of_a_case_is_escaped(tmp_path: Path) -> None:
    done = harness("replay", saved(tmp_path, CASE, "two\nlines.json"), "--device", "cpu", "--timeout", "0")
    assert done.returncode == PASSES, done.stderr
    assert f"{tmp_path}/two\\nlines.json: " in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("show", ""),
        ("replay", " "),
        ("report", "a.json", "--html="),
        ("merge", "a.json", "-o", ""),
        ("survey", "--backend", "a:B", "--save", ""),
        ("survey", "--backend", "a:B", "--json", ""),
        ("explore", "--save="),
        ("import", "a.json", "--output", ""),
    ],
    ids=" ".join,
)
def test_an_empty_name_does_not_stand_for_the_current_folder(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == UNUSABLE
    named = words[-1].removesuffix("=") if words[-1].strip() else words[-2]
    (line,) = done.output.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert " is empty; give " in line


def test_help_names_the_commands() -> None:
    done = harness("--help")
    assert done.returncode == PASSES
    for command in ("replay", "show", "tiers", "survey", "143"):
        assert command in done.stdout


def test_an_interruption_while_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt", encoding="utf-8")
    folders = os.pathsep.join([str(tmp_path), str(PROJECT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "nsa_oracle", "show", "case.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted before anything was judged\n")
