"""The command line tool in a process of its own, and what its exit codes and errors must be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from nsa_oracle.harness.scenarios.files import save
from nsa_oracle.harness.scenarios.scenario import Scenario
from tests.support.project import PROJECT

PASSES, FAILS, UNUSABLE = 0, 1, 2


def environment_of_children() -> dict[str, str]:
    """That of this process; modules of the checkout, tests included, are found from any folder, and lines are long."""
    here = {name: value for name, value in os.environ.items() if not name.startswith("GITHUB_")}  # not their workflow
    return {**here, "PYTHONPATH": os.pathsep.join([str(PROJECT), *sys.path]), "COLUMNS": "300"}


def run(*words: str, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    environment: Mapping[str, str] = environment_of_children()
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)


def harness(*words: str, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "harness", *words, cwd=cwd)


def replay(*words: str, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    return harness("replay", "--device", "cpu", *words, cwd=cwd)


def saved(folder: Path, scenario: Scenario, name: str = "case.json") -> str:
    save(scenario, folder / name)
    return str(folder / name)


def assert_one_line_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == UNUSABLE, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line
