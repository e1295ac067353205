"""Runs saved cases under NVIDIA's compute-sanitizer, which finds what no output shows: stray accesses, races, barriers.

Each tool runs the cases in a separate process. Under memcheck each tensor is a separate allocation with no neighbour,
so that an access one byte past its end is found. Graphs cannot be captured then, so the cases run eagerly.

The process under the tool runs ``python -m nsa_oracle.harness.commands.sanitizer FILE...``; users run
``nsa-oracle sanitize``.
"""

from __future__ import annotations

import enum
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from nsa_oracle.harness.commands.tiers import module_path
from nsa_oracle.harness.errors import counted
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.memory.poison import without_bands
from nsa_oracle.harness.scenarios.files import CORPUS, load
from nsa_oracle.harness.subjects.default import optimized_backend

CASES = tuple(
    CORPUS / f"{name}.json"
    for name in ("one-launch-fills-cu-seqlens-k", "loop-small-large-small", "layer-two-speculative-cycles")
)
FOUND = 86  # exit code of the tool when it has something to report
PLACES = (Path("/usr/local/cuda/bin/compute-sanitizer"), Path("/opt/cuda/bin/compute-sanitizer"))
EAGERLY = "ORACLE_SANITIZE_EAGERLY"  # environment variable of the process under the tool


class Tool(enum.StrEnum):
    """The tools of compute-sanitizer, by what they look for."""

    MEMCHECK = "memcheck"  # accesses outside allocations, misaligned ones
    RACECHECK = "racecheck"  # shared memory written and read without a barrier
    INITCHECK = "initcheck"  # global memory read before it was written
    SYNCCHECK = "synccheck"  # barriers that not every thread reaches


@dataclass(frozen=True)
class Outcome:
    """What one tool found. clean: None if it did not run to its end. message: what it found, or why it did not run."""

    tool: Tool
    clean: bool | None
    message: str
    seconds: float

    def line(self) -> str:
        verdict = {True: "clean", False: "FOUND", None: "not run"}[self.clean]
        return f"{self.tool.value}: {verdict}: {self.message} ({self.seconds:.0f} s)"


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer, on the PATH or where CUDA installs it, or None."""
    installed = (str(place) for place in PLACES if place.exists())
    return shutil.which("compute-sanitizer") or next(installed, None)


def obstacle() -> str | None:
    """Why compute-sanitizer cannot run on this machine, in one line, or None if it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    if find_sanitizer() is None:
        return "there is no compute-sanitizer on the PATH; it comes with the CUDA toolkit"
    return None


def sanitize(files: Sequence[Path], tools: Sequence[Tool], seconds: float) -> Iterator[Outcome]:
    """Judge ``files`` under each tool, for at most ``seconds`` each."""
    sanitizer = find_sanitizer()
    assert sanitizer is not None
    for tool in tools:
        started = time.monotonic()
        clean, found = _run(sanitizer, tool, files, seconds)
        yield Outcome(tool, clean, found, time.monotonic() - started)


def _run(sanitizer: str, tool: Tool, files: Sequence[Path], seconds: float) -> tuple[bool | None, str]:
    command = [sanitizer, "--tool", tool.value, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    command += [sys.executable, "-m", "nsa_oracle.harness.commands.sanitizer", *map(str, files)]
    eagerly = {EAGERLY: "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool is Tool.MEMCHECK else {}
    environment = {**os.environ, **eagerly, "PYTHONPATH": module_path()}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return None, f"it took longer than {seconds:.0f} seconds"
    except OSError as error:
        return None, f"{sanitizer} cannot be run: {error.strerror}"
    return verdict_of_output(done.returncode, done.stdout + done.stderr, len(files))


def verdict_of_output(code: int, output: str, cases: int) -> tuple[bool | None, str]:
    """Interprets the tool's exit code and output: whether it is clean (None: it did not run), and why, in one line."""
    lines = [line.removeprefix("=========").strip() for line in output.splitlines() if line.startswith("=========")]
    lines = [line for line in lines if line]
    reports = [line for line in lines if not re.match(r"COMPUTE-SANITIZER|.*SUMMARY|Target application", line)]
    refused = next((line for line in lines if "not supported" in line), None)
    if refused is not None:
        return None, refused
    if code == FOUND:
        summary = next((line for line in lines if "SUMMARY" in line), "errors")
        return False, "; ".join([summary, *reports[:1]])
    if code == 0:
        return True, counted(cases, "case")
    failed = [line for line in output.splitlines() if line.startswith("FAILED ")]
    if failed:
        return False, failed[0]
    last = (reports or [line for line in output.splitlines() if line.strip()] or ["no output"])[-1]
    return None, f"it ended with {code}: {last.strip()[:200]}"


def _judge_inside(files: Sequence[str]) -> int:
    """Judge each file on the GPU, in the process under the tool. Returns its exit code."""
    eagerly = EAGERLY in os.environ
    with without_bands() if eagerly else nullcontext():
        for file in files:
            try:
                judge(load(Path(file)), optimized_backend, torch.device("cuda"), graphs=not eagerly)
            except OracleFailure as failure:
                print(f"FAILED {file}: {failure.finding.sentence()}")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(_judge_inside(sys.argv[1:]))
