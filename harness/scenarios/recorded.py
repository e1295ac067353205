"""Reads what ``nsa_oracle.harness.record`` wrote: JSON lines, from whatever wrote them, within limits."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from nsa_oracle.harness.errors import ScenarioError, counted, one_line
from nsa_oracle.harness.scenarios.complaints import complaint
from nsa_oracle.harness.scenarios.files import MAX_PATH

MAX_RECORD_BYTES = 1 << 30
MAX_LINE_BYTES = 1 << 24
MAX_RECORDED_CALLS = 1 << 20
BEGINS = b'{"nsa_oracle_record":'


class _StopAtFirst(FailFast):
    """One mistake of a list is enough. FailFast itself has no hash, which the union with None needs."""

    __hash__ = object.__hash__


Natural = Annotated[int, Field(ge=0, lt=1 << 31)]
Counts = Annotated[tuple[Natural, ...], _StopAtFirst()]
Slot = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
SlotRuns = Annotated[tuple[tuple[Slot, Natural], ...], _StopAtFirst()]


Parsed = TypeVar("Parsed", bound="_Line")


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Head(_Line):
    """The first line of a session: what is known of the backend. config: fields of ``BackendConfig``."""

    nsa_oracle_record: Annotated[int, Field(ge=1, le=1)]
    session: str = ""
    config: dict[str, int | str] = Field(default_factory=dict)
    pool: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    wide: bool = False
    tables: str = "none"


class RecordedCall(_Line):
    """One call of the engine. Lengths have one entry for each request, those that pad the batch included.

    table: the row of ``req_to_token`` of each, as runs of neighbouring slots. dropped: calls before it that are
    missing.
    """

    n: Natural
    call: str
    act: str = ""
    step: Natural | None = None
    mode: str = ""
    bs: Natural | None = None
    pool_rows: Counts | None = None
    seq_lens: Counts | None = None
    seq_lens_cpu: Counts | None = None
    seq_lens_sum: int | None = None
    accept_lengths: Counts | None = None
    extend_lens: Counts | None = None
    dtypes: dict[str, str] = Field(default_factory=dict)
    strided: bool = False
    digest: tuple[int, ...] | None = None
    table: Annotated[tuple[SlotRuns, ...], _StopAtFirst()] | None = None
    dropped: Natural = 0

    @property
    def name(self) -> str:
        """How messages name the call."""
        return f"call {self.n:,} ({one_line(self.call, 60)}, {one_line(self.mode, 40) or 'no mode'})"


@dataclass(frozen=True)
class ServerRecord:
    """One session. notes: what a reader should know about what is missing, in a line each."""

    source: str
    head: Head
    calls: tuple[RecordedCall, ...]
    notes: tuple[str, ...] = ()


def read_record(path: Path) -> ServerRecord:
    """The last session of the record ``path``, the older file beside it (``.1``) included.

    A last line that is cut short is left out. Raises ScenarioError, in one line, if there is anything else.
    """
    source = one_line(str(path), MAX_PATH)
    older = Path(f"{path}.1")
    head: Head | None = None
    calls: dict[int, RecordedCall] = {}
    sessions = 0
    for file in (older, path) if older.exists() else (path,):
        shown = one_line(str(file), MAX_PATH)
        for place, line in _lines(file, shown):
            if line.startswith(BEGINS):
                begun = _parsed(Head, line, place)
                if head is None or begun.session != head.session:
                    sessions, calls = sessions + 1, {}
                head = begun
                continue
            if head is None:
                raise ScenarioError(f"{place}: is no record of nsa-oracle: its first line must name nsa_oracle_record")
            call = _parsed(RecordedCall, line, place)
            calls.setdefault(call.n, call)  # captures are repeated in a new file
            if len(calls) > MAX_RECORDED_CALLS:
                raise ScenarioError(f"{place}: has more than {MAX_RECORDED_CALLS:,} calls; split the record")
    if head is None:
        raise ScenarioError(f"{source}: is empty, so no record of nsa-oracle")
    notes = [] if sessions < 2 else [f"{source} has {sessions} sessions; the last one is imported"]
    if dropped := sum(call.dropped for call in calls.values()):
        notes.append(f"{counted(dropped, 'call')} could not be recorded in time")
    return ServerRecord(source, head, tuple(calls[n] for n in sorted(calls)), tuple(notes))


def _lines(path: Path, shown: str) -> Iterator[tuple[str, bytes]]:
    """Yields the complete lines of a file, and the place of each for messages."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would block
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise ScenarioError(f"{shown}: is not a regular file")
            if found.st_size > MAX_RECORD_BYTES:
                raise ScenarioError(f"{shown}: has more than {MAX_RECORD_BYTES:,} bytes; import its last lines")
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                place = f"{shown}, line {number:,}"
                if len(line) > MAX_LINE_BYTES:
                    raise ScenarioError(f"{place}: has more than {MAX_LINE_BYTES:,} bytes, which no call needs")
                if not line.endswith(b"\n"):
                    if number == 1 and not line.startswith(BEGINS):
                        raise ScenarioError(f"{place}: is no record of nsa-oracle")
                    return  # the process was killed while it wrote
                if line.strip():
                    yield place, line
    except OSError as error:
        raise ScenarioError(f"{shown}: cannot be read: {error.strerror or error}") from None


def _parsed(kind: type[Parsed], line: bytes, place: str) -> Parsed:
    try:
        return kind.model_validate_json(line, strict=True)
    except ValidationError as error:
        reason = complaint(error).replace("the file is not JSON", "it is not JSON").replace("the file:", "the line:")
    raise ScenarioError(f"{place}: {reason}")
