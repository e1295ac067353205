"""The saved cases of a run: which there are, and why there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nsa_oracle.harness.scenarios.files import corpus


@dataclass(frozen=True)
class SavedCases:
    """The cases of ``folder``. named_by: the option or setting that names the folder; empty for the default one."""

    folder: Path
    named_by: str
    device: torch.device

    @staticmethod
    def of(config: pytest.Config, device: torch.device) -> SavedCases:
        """Those that the options and the configuration file name."""
        given, set_to = config.getoption("oracle_cases"), config.getini("oracle_cases")
        folder = config.rootpath / (given or set_to or "tests/cases")
        here = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        return SavedCases(here, "--oracle-cases" if given else "oracle_cases" if set_to else "", device)

    def files(self) -> Sequence[Path]:
        """Their files. Raises UsageError if the folder was named and has none."""
        files = corpus(self.device, self.folder)
        if not files and self.named_by:
            raise pytest.UsageError(f"{self.named_by} {self.folder}: {self.why_none()}")
        return files

    def why_none(self) -> str:
        return f"{self.folder} has no *.json" if self.folder.is_dir() else f"there is no folder {self.folder}"
