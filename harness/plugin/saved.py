"""The saved cases of a run: which there are, and why there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nsa_oracle.harness.scenarios.files import corpus
from nsa_oracle.pytest_plugin import setting


@dataclass(frozen=True)
class SavedCases:
    """The cases of ``folder``. named_by: the option or setting that names the folder; empty for the default one."""

    folder: Path
    named_by: str
    device: torch.device

    @staticmethod
    def of(config: pytest.Config, device: torch.device) -> SavedCases:
        """Those that the options and the configuration file name."""
        given, named = config.getoption("oracle_cases"), setting(config, "cases")
        folder = config.rootpath / ("tests/cases" if named is None else named)
        here = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        named_by = "" if named is None else "oracle_cases" if given is None else "--oracle-cases"
        return SavedCases(here, named_by, device)

    def files(self) -> Sequence[Path]:
        """Their files. Raises UsageError if the folder was named and has none."""
        files = corpus(self.device, self.folder)
        if not files and self.named_by:
            raise pytest.UsageError(f"{self.named_by} {self.folder}: {self.why_none()}")
        return files

    def why_none(self) -> str:
        return f"{self.folder} has no *.json" if self.folder.is_dir() else f"there is no folder {self.folder}"
