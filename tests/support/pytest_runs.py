"""pytest in a process of its own, as people run it, and what such a run left behind."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.command_line import environment_of_children


@dataclass(frozen=True)
class Run:
    """What one pytest process left behind."""

    exit_code: int
    output: str
    errors: str

    @property
    def summary(self) -> str:
        """The line that ends the oracle's part."""
        return next((line for line in self.output.splitlines() if re.match(r"oracle: [\d,]+ cases? passed", line)), "")

    @property
    def totals(self) -> list[int]:
        """Cases, replays, eager calls, fields, cells."""
        row = re.findall(r"^│ +([\d,]+) +│ +([\d,]+) +│ +([\d,]+) +│ +([\d,]+) +│ +([\d,]+)", self.output, re.MULTILINE)
        return [int(number.replace(",", "")) for number in row[0]]

    @property
    def failures(self) -> list[str]:
        """A line for each failure; the table lists those that are alike once, with their number."""
        listed = re.findall(r"^FAILED(?: \((\d+) cases\))?: (.*)$", self.output, re.MULTILINE)
        return [f"FAILED: {sentence}" for times, sentence in listed for _ in range(int(times or 1))]


def environment() -> dict[str, str]:
    """That of a pytest process which is not a part of this one."""
    inherited = {name: value for name, value in environment_of_children().items() if not name.startswith("PYTEST")}
    inherited.pop("TRITON_INTERPRET", None)  # set by this run's plugin
    return {**inherited, "COLUMNS": "200"}


def pytest_command(*words: str) -> Sequence[str]:
    """The command of a pytest run on a machine as if it had no GPU."""
    return [sys.executable, "-m", "pytest", "-p", "nsa_oracle.pytest_plugin", "--oracle-device=cpu", *words]


def run(folder: Path, *words: str, variables: Mapping[str, str] | None = None) -> Run:
    """Run pytest in ``folder``. variables: of its environment, beside the others."""
    done = subprocess.run(
        pytest_command(*words),
        cwd=folder,
        env={**environment(), **(variables or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    return Run(done.returncode, done.stdout, done.stderr)
