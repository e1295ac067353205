"""Makes saved cases of a record: the events after which the world sends the recorded batches, call by call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from nsa_oracle.harness.errors import ScenarioError, counted, one_line
from nsa_oracle.harness.scenarios.batch import Batch, choose_bucket
from nsa_oracle.harness.scenarios.complaints import complaint
from nsa_oracle.harness.scenarios.recorded import Dtypes, RecordedCall, ServerRecord
from nsa_oracle.harness.scenarios.recorded_batches import ACTS, Asked, Held, NotACase, Requests
from nsa_oracle.harness.scenarios.scenario import (
    Accept,
    Capture,
    Eager,
    Event,
    Finish,
    Join,
    Replay,
    Scenario,
    SetLengths,
    graph_mode,
)
from nsa_oracle.harness.scenarios.setup import Drive, IntDtype, Mirror, Order, Reuse, Setup
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.reference.types import ForwardMode

MOST_TIMES = 16  # of one replay event
_RENAMED = {"speculative_num_steps": "num_steps", "speculative_num_draft_tokens": "num_draft_tokens"}


@dataclass(frozen=True)
class Import:
    """How to import. sizes: fields of ``Setup`` that the record does not say, or says wrongly. last: calls; None: all.

    per_case: most calls of one case. compact: renumber pool rows, cut max_context_len to what is used, and leave out
    graphs that are never replayed. skip: leave out calls that no event makes.
    """

    sizes: Mapping[str, Any] = field(default_factory=dict)
    last: int | None = None
    per_case: int = 200
    compact: bool = False
    skip: bool = False


def imported(record: ServerRecord, how: Import) -> tuple[list[Scenario], list[str]]:
    """The cases of ``record``, in order, and notes for the reader, in a line each.

    Raises ScenarioError, in one line, if there is no call to import, a call that no event makes, or a case of more
    than a case may have.
    """
    notes = dict.fromkeys(record.notes)
    calls = [call for call in record.calls if call.act in ACTS]
    if {call.step is None for call in calls} == {True, False}:
        notes["the methods of the whole backend and of its steps were called; all are imported as the former"] = None
    for name, kinds in _dtypes(calls).items():
        if len(kinds) > 1:
            notes[f"{name} is not of the same dtype in all calls; cases have {kinds[0].value}, as the first one"] = None
    setup = _setup(record, calls, how)
    requests, asked = Requests(setup), list[Asked]()
    for call in calls:
        try:
            asked.append(requests.asked(len(asked), call))
        except NotACase as unfit:
            if not how.skip:
                place = record.places[call.n]
                raise ScenarioError(
                    f"{place}: {call.name} cannot be a case's: {unfit}; or leave it out with --skip"
                ) from None
            notes[f"left out: {call.name}: {unfit}"] = None
    for one in asked:
        if one.padding:
            notes[f"padding of {one.padding}: the backend must declare it in its attribute 'padding'"] = None
        if one.call.seq_lens_sum not in (None, sum(one.call.seq_lens_cpu or ())):
            notes["seq_lens_sum differs from the sum of the mirror in some calls; cases have the sum"] = None
    made = [one for one in asked if one.call.act != "capture"]
    if not made:
        raise ScenarioError(f"{record.source}: it has no replay and no eager call, so nothing would be judged")
    made = made if how.last is None else made[-how.last :]
    cases = []
    for start in range(0, len(made), how.per_case):
        part = made[start : start + how.per_case]
        captures = [one for one in asked if one.call.act == "capture" and one.number < part[-1].number]
        case, more = _case(record, setup, how, captures, part)
        cases.append(case)
        notes |= dict.fromkeys(more)
    return cases, list(notes)


def _setup(record: ServerRecord, calls: Sequence[RecordedCall], how: Import) -> Setup:
    """The setup that the record tells of. Raises ScenarioError if sizes are missing or impossible."""
    head = record.head
    known = {_RENAMED.get(name, name): value for name, value in head.config.items()}
    known = {name: value for name, value in known.items() if name in Setup.model_fields}
    shown = next((call for call in calls if call.dtypes != Dtypes()), None)
    inputs: dict[str, Any] = {name: kinds[0] for name, kinds in _dtypes(calls).items()}
    rows = [row for call in calls for row in call.pool_rows or ()]
    document: dict[str, Any] = {
        "pool_size": head.pool[0] if head.pool else max(rows, default=0) + 1,
        "drive": Drive.SINGLE_STEP if calls and all(call.step is not None for call in calls) else Drive.MULTI_STEP,
        **_padding(calls),
        "reuse": Reuse.STACK if head.tables == "whole" else Reuse.QUEUE,  # then a row gets other pages
        "inputs": inputs | {"strided": shown is not None and shown.strided, "wide_req_to_token": head.wide},
    }
    document |= known | dict(how.sizes)
    if missing := [name for name, info in Setup.model_fields.items() if info.is_required() and name not in document]:
        wanted = " ".join(f"--size {name}=..." for name in missing)
        raise ScenarioError(f"{record.source}: the record does not say {', '.join(missing)}: add {wanted}")
    try:
        return Setup.model_validate(document)
    except ValidationError as error:
        raise ScenarioError(f"{record.source}: its sizes: {complaint(error)}; mend them with --size") from None


def _dtypes(calls: Sequence[RecordedCall]) -> dict[str, list[IntDtype]]:
    """The dtypes that the record has of each input of a case, in the order of the calls."""
    names = {"seq_lens": "seq_lens", "req_pool_indices": "pool_rows", "accept_length": "accept_lengths"}
    found = {name: dict.fromkeys(getattr(call.dtypes, key) for call in calls) for name, key in names.items()}
    return {name: known for name, kinds in found.items() if (known := [kind for kind in kinds if kind is not None])}


def _padding(calls: Sequence[RecordedCall]) -> dict[str, int]:
    """The length of padding, and how much of it eager calls have: some if one has twice the same row, or is idle."""
    ends = [ended[-1] for call in calls if call.act != "capture" and (ended := (call.seq_lens or ())[: call.bs])]
    length = int(0 not in ends)  # no request has a length of 0
    counts, is_padded = [], False
    for call in calls:
        if call.act != "eager" or call.mode == ForwardMode.EXTEND.value:
            continue
        rows, lengths = (call.pool_rows or ())[: call.bs], (call.seq_lens or ())[: call.bs]
        entries = list(zip(rows, lengths, strict=False))
        counts.append(next((n for n, entry in enumerate(entries[::-1]) if entry != (0, length)), len(entries)))
        is_padded = is_padded or len(set(rows)) < len(rows) or (call.mode == ForwardMode.IDLE.value and bool(rows))
    return {"padding_len": length, "eager_padding": min(counts) if is_padded else 0}


def _case(
    record: ServerRecord, setup: Setup, how: Import, captures: Sequence[Asked], calls: Sequence[Asked]
) -> tuple[Scenario, list[str]]:
    notes = []
    rows = {request.row for one in calls for request in one.requests}
    row_of = {row: row for row in rows}
    if how.compact:
        row_of = {row: place for place, row in enumerate(sorted({0, *rows}))}  # row 0 is that of padding
        longest = max((length for one in calls for length in one.batch.seq_lens), default=1)
        width = -(-(longest + setup.draft_overshoot) // setup.page_size) * setup.page_size
        cut = {"pool_size": len(row_of), "max_context_len": max(2, min(setup.max_context_len, width))}
        if any(getattr(setup, name) != size for name, size in cut.items()):
            notes.append("sizes are not those of the server: its pool rows are renumbered, its tables narrower")
        setup = setup.model_copy(update=cut)
        used = {(graph_mode(one.mode), one.bucket) for one in calls}
        captures = [one for one in captures if (one.mode, one.bucket) in used]
    page_of = _page_numbers(record, setup, calls)
    name = record.source.replace("\\", "/").rpartition("/")[2]
    empty: dict[str, Any] = {
        "setup": setup,
        "note": f"calls {calls[0].call.n:,} to {calls[-1].call.n:,} of {one_line(name, 100)}",
    }
    try:
        playing = _Playing(World(Scenario(**empty), poison=0), calls, row_of, page_of)
        for one in sorted([*captures, *calls], key=lambda one: one.number):
            try:
                playing.add(one)
            except NotACase as unfit:
                place = record.places[one.call.n]
                raise ScenarioError(f"{place}: {one.call.name} cannot be a case's: {unfit}") from None
        case = Scenario.model_validate({**empty, "events": tuple(playing.all_events())})
    except ValidationError as error:
        mend = "" if how.compact else "; or import with --compact, or fewer calls with --last or --per-case"
        raise ScenarioError(f"{record.source}: {complaint(error)}{mend}") from None
    if playing.not_captured:
        graphs = ", ".join(f"{mode.value} {bucket}" for mode, bucket in sorted(playing.not_captured, key=str)[:5])
        notes.append(f"the record has no capture of {counted(len(playing.not_captured), 'graph')} ({graphs}): added")
    return case, notes


def _page_numbers(record: ServerRecord, setup: Setup, calls: Sequence[Asked]) -> dict[int, int]:
    """The number in the case of each page: its own if the case has so many, else in the same order."""
    pages = sorted({page for one in calls for request in one.requests for page in request.pages})
    most = setup.pool_size * setup.pages_per_request
    if len(pages) > most:
        raise ScenarioError(
            f"{record.source}: its calls name {len(pages):,} pages; {most:,} fit the pool: import fewer calls (--last)"
        )
    kept = not pages or pages[-1] <= most
    return {page: page if kept else place for place, page in enumerate(pages, 1)}


@dataclass
class _Playing:
    """The events so far, in their world. calls: all of the case."""

    world: World
    calls: Sequence[Asked]
    row_of: Mapping[int, int]
    page_of: Mapping[int, int]
    events: list[Event] = field(default_factory=list)
    captured: set[tuple[ForwardMode, int]] = field(default_factory=set)
    not_captured: set[tuple[ForwardMode, int]] = field(default_factory=set)
    held: dict[int, Held] = field(default_factory=dict)  # by row in the case

    def all_events(self) -> Iterable[Event]:
        """The events, behind captures that the record does not have."""
        modes = dict.fromkeys(mode for mode, _ in sorted(self.not_captured, key=str))
        for mode in modes:
            yield Capture(mode=mode, buckets=tuple(sorted(b for other, b in self.not_captured if other is mode)))
        yield from self.events

    def add(self, asked: Asked) -> None:
        """Add the events of one call. Raises NotACase if the world does not send its batch."""
        if asked.call.act == "capture":
            assert asked.bucket is not None
            self._capture(asked.mode, asked.bucket)
            return
        batch = asked.batch
        batch = Batch(
            batch.mode,
            tuple(self.row_of[row] for row in batch.pool_rows),
            *(batch.seq_lens, batch.seq_lens_cpu, batch.accept_lengths, batch.extend_lens),
        )
        self._finish(asked.number)
        for place, request in enumerate(asked.requests):
            self._join(asked, request, batch, place)
        self._lengthen(asked, batch)
        event = self._call(asked, batch)
        sent = self._apply(event)
        assert sent is not None
        if _numbers(sent, asked) != _numbers(batch, asked):
            raise NotACase("the world would send other numbers")
        self._merge()

    def _apply(self, event: Event) -> Batch | None:
        self.events.append(event)
        return self.world.apply(event)

    def _capture(self, mode: ForwardMode, bucket: int) -> None:
        self.captured.add((mode, bucket))
        last = self.events[-1] if self.events else None
        if isinstance(last, Capture) and last.mode is mode and bucket not in last.buckets:
            self.events[-1] = last.model_copy(update={"buckets": (*last.buckets, bucket)})
        else:
            self._apply(Capture(mode=mode, buckets=(bucket,)))

    def _finish(self, number: int) -> None:
        """Requests without another call finish; neighbours in one event."""
        ended = [i for i, r in enumerate(self.world.running) if self.held[r.pool_row].last < number]
        while ended:
            first = last = ended.pop()
            while ended and ended[-1] == first - 1:
                first = ended.pop()
            self._apply(Finish(request=first, count=last - first + 1))

    def _join(self, asked: Asked, request: Held, batch: Batch, place: int) -> None:
        world, row = self.world, batch.pool_rows[place]
        if any(running.pool_row == row for running in world.running):
            return
        self.held[row] = request
        length = batch.seq_lens[place]
        before = length - batch.accept_lengths[place] if asked.accepted and batch.accept_lengths else length
        length = min(before if before >= 1 else length, world.scenario.setup.max_seq_len)
        pages = tuple(self.page_of[page] for page in request.pages)
        needed = None if world.free_rows[-1] == row else row
        self._apply(Join(seq_len=length, pool_row=needed, pages=pages))

    def _lengthen(self, asked: Asked, batch: Batch) -> None:
        """Give the running requests the lengths, and the accept lengths if they are known, of ``batch``."""
        running = {request.pool_row: request for request in self.world.running}
        accepts = dict(zip(batch.pool_rows, batch.accept_lengths, strict=True)) if batch.accept_lengths else {}
        wanted = dict(zip(batch.pool_rows, batch.seq_lens, strict=True))
        changed = [
            row
            for row, length in wanted.items()
            if (running[row].seq_len, running[row].accept_length)
            != (length, accepts.get(row, running[row].accept_length))
        ]
        if not changed:
            return
        growth = tuple(wanted.get(row, request.seq_len) - request.seq_len for row, request in running.items())
        most = self.world.scenario.setup.num_draft_tokens
        is_accept = all(n <= most and n == accepts.get(row, n) for row, n in zip(running, growth, strict=True))
        if is_accept and set(running) == set(wanted):
            self._apply(Accept(accept_lengths=growth[:1] if len(set(growth)) == 1 else growth))
            return
        self._apply(
            SetLengths(
                pool_rows=tuple(changed),
                seq_lens=tuple(wanted[row] for row in changed),
                accept_lengths=tuple(accepts.get(row, running[row].accept_length) for row in changed),
            )
        )

    def _call(self, asked: Asked, batch: Batch) -> Replay | Eager:
        conditions = {**self._chosen(batch), **self._mirror(batch)}
        if asked.bucket is None:
            new = batch.extend_lens or (1,)
            return Eager(mode=batch.mode, extend_lens=new[:1] if len(set(new)) == 1 else new, **conditions)
        mode = graph_mode(batch.mode)
        if (mode, asked.bucket) not in self.captured:
            self.captured.add((mode, asked.bucket))
            self.not_captured.add((mode, asked.bucket))
        buckets = [bucket for other, bucket in self.captured if other is mode]
        bucket = None if choose_bucket(None, batch.size, buckets) == asked.bucket else asked.bucket
        return Replay(mode=mode, bucket=bucket, **conditions)

    def _chosen(self, batch: Batch) -> dict[str, Any]:
        """Which of the running requests take part, and in which order."""
        running = tuple(request.pool_row for request in self.world.running)
        if batch.pool_rows == running or (batch.mode is ForwardMode.IDLE and not running):
            return {}
        if batch.pool_rows and batch.pool_rows == running[::-1]:
            return {"order": Order.REVERSED}
        if batch.pool_rows:
            return {"pool_rows": batch.pool_rows}
        if not (free := self.world.free_rows):
            raise NotACase("it has no request while every row of the pool has one")
        return {"pool_rows": (min(free),)}

    def _mirror(self, batch: Batch) -> dict[str, Any]:
        mirror = batch.seq_lens_cpu
        if mirror is None:
            return {"mirror": Mirror.ABSENT}
        if mirror == batch.seq_lens:
            return {}
        before = {request.pool_row: request.previous_seq_len for request in self.world.running}
        follows = mirror == tuple(before[row] for row in batch.pool_rows)
        if follows and all(m != n for m, n in zip(mirror, batch.seq_lens, strict=True)):
            return {"mirror": Mirror.STALE}
        ahead = any(m > n for m, n in zip(mirror, batch.seq_lens, strict=True))
        return {"mirror": Mirror.AHEAD if ahead else Mirror.STALE, "seq_lens_cpu": mirror}

    def _merge(self) -> None:
        """The same replay once more is one event."""
        before, last = self.events[-2:] if len(self.events) > 1 else (None, None)
        if not isinstance(before, Replay) or before.times == MOST_TIMES:
            return
        if before.model_copy(update={"times": 1}) == last:
            self.events[-2:] = [before.model_copy(update={"times": before.times + 1})]


def _numbers(batch: Batch, asked: Asked) -> tuple[Any, ...]:
    """What a backend is given of ``batch``."""
    accepts = batch.accept_lengths if asked.accepted and asked.batch.accept_lengths else ()
    return batch.mode, batch.pool_rows, batch.seq_lens, batch.seq_lens_cpu, accepts, batch.extend_lens
