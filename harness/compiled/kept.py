"""What an earlier process has found out about a variant of a kernel, so that this one need not trace it.

An entry is a JSON file beside the libraries. It has the name of the library and what a launch has to know. Its own name
is the hash of all that both depend on: the kernel and what it uses (``dependencies``), the types and constants of its
parameters, Triton's files and settings, the files of this package, the C compiler. Files of a kernel are numbers in it,
so that one entry serves all copies of a source.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from nsa_oracle.harness.compiled import building, tracing
from nsa_oracle.harness.compiled.dependencies import Dependencies, NotKnown, value_digest
from nsa_oracle.harness.compiled.emit import Interface
from nsa_oracle.harness.compiled.emitter import Site


class _Content(BaseModel):
    """Of the file. sites: what, the file by number or name, line, text and shape of each."""

    model_config = ConfigDict(strict=True)
    key: str
    library: str = Field(pattern=r"^\w+\.so$")
    types: tuple[str, ...]
    written: tuple[bool, ...]
    is_checked: bool
    sites: tuple[tuple[str, NonNegativeInt | str, str, str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Entry:
    """Where a variant is kept. key: "" if it cannot be. files: of the kernel and its device functions."""

    key: str
    files: Sequence[str]

    @staticmethod
    def of(needs: Dependencies, signature: Mapping[str, str], constants: Mapping[str, Any]) -> Entry:
        """Raises BuildError if there is no C compiler."""
        if not needs.digest:
            return Entry("", ())
        try:
            given = [[name, value_digest(value)] for name, value in constants.items()]
        except NotKnown:
            return Entry("", ())
        parts = [needs.digest, list(signature.items()), given, tracing.settings(), _tools(), building.toolchain()]
        return Entry(hashlib.sha256(json.dumps(parts).encode()).hexdigest(), needs.files)

    def read(self) -> tuple[Interface, Path] | None:
        """What a launch has to know, and the library; None if they are not there, or not as they were written."""
        content = building.read(self._file) if self.key else None
        if content is None:
            return None
        try:
            found = _Content.model_validate_json(content)
            sites = [Site(what, self._where(file, line), text, shape) for what, file, line, text, shape in found.sites]
        except (ValueError, IndexError):
            return None
        library = building.cache_folder() / found.library
        if found.key != self.key or building.read(library) is None:
            return None
        return Interface(found.types, found.written, tuple(sites), found.is_checked), library

    def write(self, interface: Interface, library: Path) -> None:
        """Keep it for later processes. A folder that cannot be written to keeps nothing."""
        if not self.key:
            return
        content = _Content(
            key=self.key,
            library=library.name,
            types=interface.types,
            written=interface.written,
            is_checked=interface.is_checked,
            sites=tuple((site.what, *self._place(site.where), site.text, site.shape) for site in interface.sites),
        )
        with contextlib.suppress(OSError):
            building.write(self._file, content.model_dump_json().encode())

    @property
    def _file(self) -> Path:
        return building.cache_folder() / f"{self.key[:32]}.json"

    def _place(self, where: str) -> tuple[int | str, str]:
        """The file of a line, as its number if it is one of the kernel's, and the line."""
        file, _, line = where.rpartition(":")
        return (self.files.index(file) if file in self.files else file), line

    def _where(self, file: int | str, line: str) -> str:
        name = self.files[file] if isinstance(file, int) else file
        return f"{name}:{line}" if name or line else ""


@functools.cache
def _tools() -> list[Any]:
    """Python, Triton's front end, and this package, which writes C."""
    own = [file for file in sorted(Path(__file__).parent.iterdir()) if file.suffix in (".py", ".h")]
    front_end = [
        [str(file), status.st_size, status.st_mtime_ns]
        for folder in tracing.FRONT_END
        for file in sorted(folder.iterdir())
        if file.suffix in (".py", ".so")
        for status in [file.stat()]
    ]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in own]
    return [sys.version, triton.__version__, front_end, digests]
