"""A corpus that many share: cases that failed once, at an address that fsspec knows, such as a folder or a bucket."""

from __future__ import annotations

import importlib
from typing import Any

from nsa_oracle.harness.errors import BackendError, ScenarioError, error_line
from nsa_oracle.harness.scenarios.files import MAX_FILE_BYTES, digest, from_json, to_json
from nsa_oracle.harness.scenarios.scenario import Scenario


class SharedCorpus:
    """The cases ``*.json`` at ``address``. Raises BackendError, in one line, if nothing can be reached there."""

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            core: Any = importlib.import_module("fsspec.core")  # late: it comes with Dask, which is an extra
            self._files, self._folder = core.url_to_fs(address)
            self._files.makedirs(self._folder, exist_ok=True)
        except Exception as error:  # of any of fsspec's implementations
            raise self._unusable(error) from None

    def cases(self) -> tuple[list[Scenario], list[str]]:
        """The cases, in order of name; and a line for each file that is none. Raises BackendError."""
        found, unusable = [], []
        try:
            for entry in sorted(self._files.ls(self._folder, detail=True), key=lambda entry: str(entry["name"])):
                name = str(entry["name"]).rpartition("/")[2]
                if entry["type"] != "file" or not name.endswith(".json") or name.startswith("."):
                    continue
                try:
                    if (entry["size"] or 0) > MAX_FILE_BYTES:
                        raise ScenarioError(f"{name}: larger than a case may be")
                    found.append(from_json(self._files.cat_file(entry["name"]).decode(errors="replace"), name))
                except ScenarioError as error:
                    unusable.append(f"{self.address}: left out: {error_line(error)}")
        except Exception as error:
            raise self._unusable(error) from None
        return found, unusable

    def add(self, scenario: Scenario) -> None:
        """Add a case. Others see the whole file or none. Raises BackendError."""
        name = f"{digest(scenario)}.json"
        try:
            hidden = f"{self._folder}/.{name}.tmp"
            self._files.pipe_file(hidden, to_json(scenario).encode())
            self._files.mv(hidden, f"{self._folder}/{name}")
        except Exception as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> BackendError:
        return BackendError(f"--corpus {self.address}: {error_line(error)}")
