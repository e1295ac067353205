"""The command line as a whole: its commands, its devices, and words that it does not know."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa_oracle.reference.types import ForwardMode
from tests.support.command_line import PASSES, UNUSABLE, assert_one_line_error, harness, saved
from tests.support.metadata_cases import one_replay
from tests.support.project import PROJECT

CASE = one_replay(ForwardMode.DECODE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu(tmp_path: Path) -> None:
    assert_one_line_error(harness("replay", saved(tmp_path, CASE), "--device", "cuda"), "--device cuda", "cpu")


def test_usage_errors(tmp_path: Path) -> None:
    for words in (("replay",), ("show",), ("explode",), ("replay", saved(tmp_path, CASE), "--device", "tpu")):
        done = harness(*words)
        assert done.returncode == UNUSABLE
        assert "Traceback" not in done.stderr


def test_help_names_the_commands() -> None:
    done = harness("--help")
    assert done.returncode == PASSES
    for command in ("replay", "show", "tiers", "survey"):
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
