"""What compute-sanitizer's exit codes and words are made of; the tool itself runs on a GPU alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nsa_oracle.harness.__main__ import app
from nsa_oracle.harness.commands import cases, sanitizer
from nsa_oracle.harness.commands.sanitizer import CASES, FOUND, Outcome, Tool, verdict_of_output

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at fill_metadata_kernel+0x2b0 in metadata.py:88
========= Target application returned an error
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at topk_kernel+0x10 and Read access at topk_kernel+0x40
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
REFUSED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the documentation\n"


@pytest.mark.parametrize(
    ("code", "output", "clean", "reported"),
    [
        (0, CLEAN, True, "2 cases"),
        (FOUND, MEMCHECK, False, "ERROR SUMMARY: 3 errors; Invalid __global__ write of size 4 bytes"),
        (FOUND, RACECHECK, False, "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings); Error: Race reported "
         "between Write access at topk_kernel+0x10 and Read access at topk_kernel+0x40"),
        (255, REFUSED, None, "Error: Device not supported. Please refer to the documentation"),
        (FOUND, REFUSED, None, "Error: Device not supported. Please refer to the documentation"),
        (1, f"{CLEAN}FAILED a.json: wrong value: x", False, "FAILED a.json: wrong value: x"),
        (1, "Traceback\nImportError: no triton\n", None, "it ended with 1: ImportError: no triton"),
        (-9, "", None, "it ended with -9: no output"),
    ],
)  # fmt: skip
def test_verdict(code: int, output: str, clean: bool | None, reported: str) -> None:
    assert verdict_of_output(code, output, 2) == (clean, reported)


def test_cases_exist() -> None:
    assert all(file.exists() for file in CASES)


class TestRun:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """What would have been run; every run is clean."""
        calls: list[dict[str, Any]] = []

        def run(command: list[str], **options: Any) -> Any:
            calls.append({"command": command, **options})
            return subprocess.CompletedProcess(command, 0, CLEAN, "")

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: "compute-sanitizer")
        return calls

    def test_each_tool_once(self, calls: list[dict[str, Any]]) -> None:
        outcomes = list(sanitizer.sanitize([Path("a.json")], list(Tool), 60))
        assert [outcome.line().partition(" (")[0] for outcome in outcomes] == [
            f"{tool.value}: clean: 1 case" for tool in Tool
        ]
        for call, tool in zip(calls, Tool, strict=True):
            assert call["command"][:3] == ["compute-sanitizer", "--tool", tool.value]
            assert call["command"][-4:] == [sys.executable, "-m", "nsa_oracle.harness.commands.sanitizer", "a.json"]
            assert ("PYTORCH_NO_CUDA_MEMORY_CACHING" in call["env"]) is (tool is Tool.MEMCHECK)

    def test_too_slow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(command: list[str], **options: Any) -> Any:
            raise subprocess.TimeoutExpired(command, options["timeout"])

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: "compute-sanitizer")
        (outcome,) = sanitizer.sanitize([Path("a.json")], [Tool.MEMCHECK], 60)
        assert (outcome.clean, outcome.message) == (None, "it took longer than 60 seconds")


def test_why_nothing_can_be_sanitized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitizer.obstacle() == "torch sees no CUDA device here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: None)
    assert "compute-sanitizer" in (sanitizer.obstacle() or "")
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: "compute-sanitizer")
    assert sanitizer.obstacle() is None


class TestCommand:
    def invoke(self, *words: str) -> Any:
        return CliRunner().invoke(app, ["sanitize", *words])

    def test_nothing_to_run_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cases, "obstacle", lambda: "torch sees no CUDA device here")
        done = self.invoke()
        assert done.exit_code == 2
        assert done.output == "error: sanitize: torch sees no CUDA device here\n"

    def test_unusable_file(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(cases, "obstacle", lambda: None)
        done = self.invoke(str(tmp_path / "missing.json"))
        assert done.exit_code == 2
        assert len(done.output.splitlines()) == 1

    @pytest.mark.parametrize(("clean", "code"), [(True, 0), (False, 1), (None, 2)])
    def test_exit_code(self, monkeypatch: pytest.MonkeyPatch, clean: bool | None, code: int) -> None:
        def run(files: Sequence[Path], tools: Sequence[Tool], seconds: float) -> Iterator[Outcome]:
            assert (list(files), list(tools), seconds) == (list(CASES), [Tool.RACECHECK], 600)
            yield Outcome(Tool.RACECHECK, clean, "as reported", 3.2)

        monkeypatch.setattr(cases, "obstacle", lambda: None)
        monkeypatch.setattr(cases, "run_sanitizer", run)
        done = self.invoke("--tool", "racecheck")
        assert done.exit_code == code
        assert "racecheck: " in done.output
        assert "as reported (3 s)" in done.output
