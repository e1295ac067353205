"""The command line as a whole: its commands, its devices, and words that it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nsa_oracle.reference.types import ForwardMode
from tests.support.command_line import PASSES, UNUSABLE, assert_one_line_error, harness, saved
from tests.support.metadata_cases import one_replay

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
