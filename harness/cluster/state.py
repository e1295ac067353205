"""How far a run is, in a file of the folder where it saves its cases, so that another run can go on from there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nsa_oracle.harness.errors import ScenarioError, one_line

FILE = "explore.json"
MAX_STATE_BYTES = 64 << 20
Range = tuple[int, int]


class KnownFinding(BaseModel):
    """A finding of a run. cases: how many failed like this. saved: the file of its smallest case."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: str
    field: str
    sentence: str
    saved: str
    cases: int = Field(ge=1)


class RunState(BaseModel):
    """What a run has judged. metadata, layers: numbers of the cases of the two streams, as ranges, ends excluded."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1]
    backend: str | None = None
    layer: str | None = None
    device: str
    seed: int
    metadata: list[Range] = []
    layers: list[Range] = []
    cases: int = 0
    replays: int = 0
    findings: list[KnownFinding] = []

    def check(self, backend: str | None, layer: str | None, device: str, seed: int, file: Path) -> None:
        """Raises ScenarioError if this is the state, in ``file``, of a run of something else."""
        pairs = (
            ("--backend", self.backend, backend),
            ("--layer", self.layer, layer),
            ("--device", self.device, device),
            ("--seed", self.seed, seed),
        )
        for option, was, now in pairs:
            if was != now:
                raise ScenarioError(f"{file}: that run had {option} {was}, not {now}; name that, or another --save")

    def write(self, folder: Path) -> None:
        """Write the state to ``folder`` atomically. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{FILE}.{os.getpid()}.tmp"
        try:
            temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
            temporary.replace(folder / FILE)
        finally:
            temporary.unlink(missing_ok=True)


def read_state(file: Path) -> RunState:
    """The state in ``file``. Raises ScenarioError, in one line, if there is none that can be read."""
    try:
        if not file.is_file() or file.stat().st_size > MAX_STATE_BYTES:
            raise ScenarioError(f"{file}: no file of a run that --resume could go on with")
        return RunState.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ScenarioError(f"{file}: cannot be read: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ScenarioError(f"{file}: not the state of a run: {where}: {one_line(first['msg'])}") from None


def as_ranges(numbers: Iterable[int]) -> list[Range]:
    """``numbers`` as ascending ranges, ends excluded."""
    ranges: list[Range] = []
    for number in sorted(set(numbers)):
        if ranges and ranges[-1][1] == number:
            ranges[-1] = ranges[-1][0], number + 1
        else:
            ranges.append((number, number + 1))
    return ranges


def numbers_in(ranges: Iterable[Range]) -> set[int]:
    """The numbers in ``ranges``."""
    return {number for first, end in ranges for number in range(first, end)}
