"""Reads what ``nsa_oracle.harness.record`` wrote: JSON lines, from whatever wrote them, within limits."""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator

from nsa_oracle.harness.errors import ScenarioError, counted, one_line
from nsa_oracle.harness.scenarios.complaints import complaint
from nsa_oracle.harness.scenarios.files import MAX_PATH
from nsa_oracle.harness.scenarios.setup import FieldError, IntDtype

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


def _number_or_name(value: object) -> object:
    """Refuses anything else in one sentence, where the union would have one for each of its types."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"must be a whole number or a name, not {one_line(json.dumps(value, default=str), 40)}")
    return value


Size = Annotated[int | str, BeforeValidator(_number_or_name)]
Parsed = TypeVar("Parsed", bound="_Line")


class _Line(BaseModel):
    """Fields that it does not know are left alone: a later recorder may add some without a new version."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Head(_Line):
    """The first line of a session: what is known of the backend. config: fields of ``BackendConfig``."""

    nsa_oracle_record: Annotated[int, Field(ge=1, le=1)]
    session: str = ""
    config: dict[str, Size] = Field(default_factory=dict)
    pool: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    wide: bool = False
    tables: Literal["none", "digest", "whole"] = "none"


class Dtypes(_Line):
    """Of the inputs whose dtypes a case has."""

    pool_rows: IntDtype | None = None
    seq_lens: IntDtype | None = None
    accept_lengths: IntDtype | None = None


class RecordedCall(_Line):
    """One call of the engine. Lengths have one entry for each request, those that pad the batch included.

    act: None for a call that only says how large graphs may be, in ``sizes``. table: the row of ``req_to_token`` of
    each, as runs of neighbouring slots. dropped: calls before it that could not be recorded in time.
    """

    n: Natural
    call: str
    act: Literal["capture", "replay", "eager", "in_graph"] | None = None
    sizes: Counts | None = None
    step: Natural | None = None
    mode: str = ""
    bs: Natural | None = None
    pool_rows: Counts | None = None
    seq_lens: Counts | None = None
    seq_lens_cpu: Counts | None = None
    seq_lens_sum: int | None = None
    accept_lengths: Counts | None = None
    extend_lens: Counts | None = None
    dtypes: Dtypes = Dtypes()
    strided: bool = False
    digest: tuple[int, ...] | None = None
    table: Annotated[tuple[SlotRuns, ...], _StopAtFirst()] | None = None
    dropped: Natural = 0

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.act is None and self.sizes is None:
            raise FieldError("act", "is missing; add one of 'capture', 'replay', 'eager' and 'in_graph'")
        rows = len(self.pool_rows or ())
        for name, entries in (("digest", self.digest), ("table", self.table)):
            if entries is not None and len(entries) != rows:
                raise FieldError(name, f"has {counted(len(entries), 'row')} for {rows:,} of pool_rows; give each one")
        return self

    @property
    def is_repeated(self) -> bool:
        """Whether the recorder writes it again when it begins a new file."""
        return self.act == "capture" or self.sizes is not None

    @property
    def name(self) -> str:
        """How messages name the call."""
        return f"call {self.n:,} ({one_line(self.call, 60)}, {one_line(self.mode, 40) or 'no mode'})"


@dataclass(frozen=True)
class ServerRecord:
    """One session. places: file and line of each call, by its number.

    notes: what a reader should know about what is missing, in a line each.
    """

    source: str
    head: Head
    calls: tuple[RecordedCall, ...]
    places: Mapping[int, str]
    notes: tuple[str, ...] = ()


def read_record(path: Path) -> ServerRecord:
    """The last session of the record ``path``, the older file beside it (``.1``) included.

    A last line that is cut short is left out, also that of an earlier session. Raises ScenarioError, in one line, if
    there is anything else, or if a call is missing.
    """
    source = one_line(str(path), MAX_PATH)
    older = Path(f"{path}.1")
    head: Head | None = None
    calls: dict[int, RecordedCall] = {}
    places: dict[int, str] = {}
    sessions = 0
    wrong: ScenarioError | None = None
    for file in (older, path) if older.exists() else (path,):
        for place, line in _lines(file, one_line(str(file), MAX_PATH)):
            begins = line.startswith(BEGINS)
            if wrong is not None and not begins:
                raise wrong
            if head is None and line.startswith(codecs.BOM_UTF8):
                raise ScenarioError(f"{place}: begins with a byte order mark; save the record without one")
            if head is None and not begins:
                raise ScenarioError(f"{place}: is no record of nsa-oracle: its first line must name nsa_oracle_record")
            parsed: Head | RecordedCall
            try:
                parsed = _parsed(Head, line, place) if begins else _parsed(RecordedCall, line, place)
            except ScenarioError as error:  # the last line of a session, if another one begins behind it
                wrong = error
                continue
            wrong = None
            if isinstance(parsed, Head):
                if head is None or parsed.session != head.session:
                    sessions, calls, places = sessions + 1, {}, {}
                head = parsed
                continue
            _add(parsed, place, calls, places)
    if wrong is not None:
        raise wrong
    if head is None:
        raise ScenarioError(f"{source}: is empty, so no record of nsa-oracle")
    found = tuple(calls[n] for n in sorted(calls))
    _check_numbers(found, places)
    notes = [] if sessions < 2 else [f"{source} has {sessions} sessions; the last one is imported"]
    if dropped := sum(call.dropped for call in found):
        notes.append(f"{counted(dropped, 'call')} could not be recorded in time")
    return ServerRecord(source, head, found, places, tuple(notes))


def _add(call: RecordedCall, place: str, calls: dict[int, RecordedCall], places: dict[int, str]) -> None:
    """Add a call by its number. One that is there already must be the same: captures are repeated in a new file."""
    if calls.setdefault(call.n, call) != call:
        raise ScenarioError(
            f"{place}: call {call.n:,} is also in {places[call.n]}, and is another one there: two recorders have "
            "written to the file, or a line was added; remove the wrong one"
        )
    places.setdefault(call.n, place)
    if len(calls) > MAX_RECORDED_CALLS:
        raise ScenarioError(f"{place}: has more than {MAX_RECORDED_CALLS:,} calls; split the record")


def _check_numbers(calls: Sequence[RecordedCall], places: Mapping[int, str]) -> None:
    """Raises ScenarioError if there is no line for a call, in a number in front of a later one.

    Lines may be missing in two places: where calls were dropped, which the next line says, and behind the captures
    with which a file begins after others that are gone.
    """
    before: int | None = None
    for call in calls:
        if before is not None and call.n - before - 1 > call.dropped:
            raise ScenarioError(
                f"{places[call.n]}: call {before + 1:,} is missing in front of call {call.n:,}; put its line back, or "
                "remove the calls before this one, but not the captures"
            )
        if before is not None or not call.is_repeated:
            before = call.n


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
