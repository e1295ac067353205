"""The saved cases of a run: which there are, and why there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nsa_oracle.harness.scenarios.files import corpus
from nsa_oracle.plugin_options import setting


def folder_of(config: pytest.Config, given: str | None, name: str) -> Path:
    """The folder that an option names from the current folder, or else ``name`` from that of the configuration file."""
    if given is not None:
        return Path(given)
    folder = (config.rootpath if config.inipath is None else config.inipath.parent) / name
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


@dataclass(frozen=True)
class SavedCases:
    """The cases of ``folder``.

    named_by: the option or setting that names the folder; empty for the default one. base: the current folder at the
    start, which a test may change.
    """

    folder: Path
    named_by: str
    device: torch.device
    base: Path

    @staticmethod
    def of(config: pytest.Config, device: torch.device) -> SavedCases:
        """Those that the options and the configuration file name."""
        given, named = config.getoption("oracle_cases"), setting(config, "cases")
        named_by = "" if named is None else "oracle_cases" if given is None else "--oracle-cases"
        return SavedCases(folder_of(config, given, named or "tests/cases"), named_by, device, Path.cwd())

    def files(self) -> Sequence[Path]:
        """Their files. Raises UsageError if the folder was named and has none."""
        files = corpus(self.device, self.folder if Path.cwd() == self.base else self.base / self.folder)
        if not files and self.named_by:
            raise pytest.UsageError(f"{self.named_by} {self.folder}: {self.why_none()}")
        return files

    def why_none(self) -> str:
        if self.folder.is_file():
            return f"{self.folder} is a file; name the folder that it is in, or judge it alone by --oracle-replay"
        return f"{self.folder} has no *.json" if self.folder.is_dir() else f"there is no folder {self.folder}"
