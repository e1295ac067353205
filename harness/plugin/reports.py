"""Where a run writes its reports for machines and browsers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from nsa_oracle.harness.scenarios.files import check_file


@dataclass(frozen=True)
class ReportFiles:
    """What ``--oracle-json`` and ``--oracle-html`` name, as absolute paths: judged code may change the folder."""

    files: Mapping[str, Path]

    @staticmethod
    def of(config: pytest.Config) -> ReportFiles:
        """Those of the options of a run."""
        given = {name: config.getoption(f"oracle_{name}") for name in ("json", "html")}
        return ReportFiles({name: Path(file).absolute() for name, file in given.items() if file is not None})

    def check(self) -> None:
        """Raises ScenarioError, in one line, if a file could not be written. Its folder need not exist yet."""
        for name, file in self.files.items():
            check_file(file, f"--oracle-{name}")
