"""What a recorded call asks for: the batch without its padding, and which requests it is made of.

A request is a pool row from its first call on. It has ended where its row holds another one: fewer tokens, a prefill
from the first token that is longer, or, if the record has tables, other pages.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nsa_oracle.harness.errors import counted
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.recorded import RecordedCall, SlotRuns
from nsa_oracle.harness.scenarios.scenario import GRAPH_MODES, graph_mode
from nsa_oracle.harness.scenarios.setup import MAX_BATCH, Setup
from nsa_oracle.reference.types import ForwardMode, StepSemantics

ACTS = ("capture", "replay", "eager")
_ACCEPTED = (ForwardMode.DRAFT_EXTEND, ForwardMode.DRAFT_EXTEND_V2)


class NotACase(Exception):
    """No event makes this call. The message says why, and how to mend it if there is a way."""


@dataclass
class Held:
    """One request of the record. last: the number of its last call. pages: the most of its pages that a call shows."""

    row: int
    seq_len: int
    last: int
    pages: tuple[int, ...] = ()
    digest: int | None = None


@dataclass(frozen=True)
class Asked:
    """One call to make. bucket: of a capture or a replay. padding: what is not the engine's own padding, or ""."""

    number: int
    call: RecordedCall
    mode: ForwardMode
    bucket: int | None
    batch: Batch
    requests: tuple[Held, ...] = ()
    padding: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the call says what was accepted."""
        return self.mode in _ACCEPTED


@dataclass
class Requests:
    """Follows the requests of a record through its calls, in order."""

    setup: Setup
    on_row: dict[int, Held] = field(default_factory=dict)

    def asked(self, number: int, call: RecordedCall) -> Asked:
        """What ``call`` asks for. Raises NotACase if no event makes it."""
        mode = _mode(call)
        if call.act == "capture":
            if graph_mode(mode) not in GRAPH_MODES:
                raise NotACase(f"{mode.value} has no graph")
            if not call.bs:
                raise NotACase("it has no bs")
            if call.bs > MAX_BATCH:
                raise NotACase(f"it is of {call.bs:,} requests; a case has at most {MAX_BATCH:,}")
            return Asked(number, call, graph_mode(mode), call.bs, Batch(mode, (), (), None, ()))
        batch = _batch(call, mode, self.setup)
        count, padding = self._real(batch) if call.act == "replay" else (batch.size, "")
        if call.act == "eager" and mode is not ForwardMode.EXTEND:
            count = max(0, count - self.setup.eager_padding)
        if mode is ForwardMode.IDLE and count:
            raise NotACase("it has requests, but its mode is IDLE")
        if mode is ForwardMode.DECODE and not count:
            raise NotACase("it has no request, so its mode should be IDLE")
        real = batch.of_requests(range(count))
        _check(real, self.setup, call)
        pages = [self._pages(call, place, length) for place, length in enumerate(real.seq_lens)]
        held = tuple(self._held(number, call, real, place, pages[place]) for place in range(count))
        return Asked(number, call, mode, call.bs if call.act == "replay" else None, real, held, padding)

    def _real(self, batch: Batch) -> tuple[int, str]:
        """The number of requests in front of the padding, and the padding if it is not that of ``Batch.padded``."""
        entries = list(zip(batch.pool_rows, batch.seq_lens, batch.seq_lens_cpu or batch.seq_lens, strict=True))
        accepts = batch.accept_lengths
        default = self.setup.num_draft_tokens if batch.mode is ForwardMode.DRAFT_EXTEND_V2 else 1
        count = len(entries)
        of_padding = (0, self.setup.padding_len, self.setup.padding_len)
        while count and entries[count - 1] == of_padding and (not accepts or accepts[count - 1] == default):
            count -= 1
        rows, on_first = batch.pool_rows[:count], self.on_row.get(0)
        if count < len(entries):
            looks_alike = self.setup.padding_len == 1  # as a request of one token
            of_a_request = 0 not in rows and on_first is not None and on_first.seq_len == 1
            of_a_request = of_a_request or (batch.mode is ForwardMode.DECODE and not count)
            return count + (looks_alike and of_a_request), ""
        start = count  # all the same, on one row: padding of another kind
        while start > 1 and entries[start - 1] == entries[start - 2]:
            start -= 1
        if start < count:
            start = max(start - 1, int(batch.mode is ForwardMode.DECODE))
            return start, f"length {entries[-1][1]} on pool row {entries[-1][0]}"
        return (0, "") if batch.mode is ForwardMode.IDLE and count == 1 else (count, "")

    def _pages(self, call: RecordedCall, place: int, seq_len: int) -> tuple[int, ...]:
        if call.table is None:
            return ()
        setup, shown = self.setup, seq_len
        if call.mode == ForwardMode.TARGET_VERIFY.value:
            shown += setup.num_draft_tokens
        elif call.mode == ForwardMode.DECODE.value and setup.step_semantics is StepSemantics.ADVANCING:
            shown += setup.num_steps
        shown = min(shown, setup.max_context_len)
        slots = _slots(call.table[place], shown)
        if len(slots) < shown:
            raise NotACase(f"its table has {len(slots):,} of the {shown:,} slots of request {place}")
        size = setup.page_size
        pages = slots[::size] // size
        made_of_pages = (np.repeat(pages, size) * size + np.tile(np.arange(size), len(pages)))[:shown]
        if (wrong := np.flatnonzero(slots != made_of_pages)).size or pages.min() < 1:
            where = int(wrong[0]) if wrong.size else int(np.flatnonzero(pages < 1)[0]) * size
            raise NotACase(
                f"slot {slots[where]} of request {place}, position {where:,}, belongs to no page of {size} tokens "
                "that it holds"
            )
        return tuple(pages.tolist())

    def _held(self, number: int, call: RecordedCall, batch: Batch, place: int, pages: tuple[int, ...]) -> Held:
        row, seq_len = batch.pool_rows[place], batch.seq_lens[place]
        digest = None if call.digest is None else call.digest[place]
        before = self.on_row.get(row)
        if before is None or _is_another(before, batch, place, pages, digest):
            before = self.on_row[row] = Held(row, seq_len, number)
        before.seq_len, before.last, before.digest = seq_len, number, digest
        before.pages = max(before.pages, pages, key=len)
        return before


def _mode(call: RecordedCall) -> ForwardMode:
    try:
        return ForwardMode(call.mode)
    except ValueError:
        raise NotACase(f"there is no such mode; known are {', '.join(mode.value for mode in ForwardMode)}") from None


def _batch(call: RecordedCall, mode: ForwardMode, setup: Setup) -> Batch:
    """All entries of a replay or an eager call. Longer lists are the engine's whole buffers, of its largest bucket."""
    if call.pool_rows is None or call.seq_lens is None:
        raise NotACase("it has no numbers: pool_rows and seq_lens (calls within a capture are noted without)")
    if call.act == "replay" and call.bs is None:
        raise NotACase("it has no bs")
    size = len(call.seq_lens) if call.bs is None else call.bs
    columns = []
    for name, wanted in (
        ("pool_rows", True),
        ("seq_lens", True),
        ("seq_lens_cpu", call.seq_lens_cpu is not None),
        ("accept_lengths", mode in _ACCEPTED and call.accept_lengths is not None),
        ("extend_lens", mode is ForwardMode.EXTEND),
    ):
        columns.append((getattr(call, name) or ()) if wanted else ())
        count = len(columns[-1])
        if wanted and (count < size or (count > size and call.bs is None)):
            raise NotACase(f"it has {count:,} {name} for {counted(size, 'request')}")
    if mode is ForwardMode.DRAFT_EXTEND and call.accept_lengths is None:
        raise NotACase("it has no accept_lengths")
    rows, lengths, mirror, accepts, new = (tuple(column[:size]) for column in columns)
    return Batch(mode, rows, lengths, None if call.seq_lens_cpu is None else mirror, accepts, new)


def _check(batch: Batch, setup: Setup, call: RecordedCall) -> None:
    """Raises NotACase for numbers that no running request can have."""
    if call.act == "replay" and batch.size > (call.bs or 0):
        raise NotACase(f"{batch.size} requests do not fit its bucket of {call.bs}")
    if batch.size > MAX_BATCH:
        raise NotACase(f"it has {batch.size:,} requests; a case has at most {MAX_BATCH:,}")
    if repeated := [row for row, count in Counter(batch.pool_rows).items() if count > 1]:
        raise NotACase(f"two of its requests are on pool row {repeated[0]}")
    drafts = batch.mode.is_decode_or_idle or batch.mode is ForwardMode.TARGET_VERIFY
    longest = setup.max_seq_len if drafts else setup.max_context_len
    for place, (row, length) in enumerate(zip(batch.pool_rows, batch.seq_lens, strict=True)):
        if not 1 <= length <= longest:
            raise NotACase(f"request {place} has {length:,} tokens; a request of this mode has 1 to {longest:,}")
        if row >= setup.pool_size:
            raise NotACase(f"request {place} is on pool row {row:,}, and the pool has {setup.pool_size:,}")
        if batch.accept_lengths and batch.accept_lengths[place] > setup.num_draft_tokens:
            accepted = batch.accept_lengths[place]
            raise NotACase(f"request {place} was accepted {accepted:,} of {setup.num_draft_tokens} draft tokens")
        if batch.extend_lens and not 0 <= batch.extend_lens[place] <= length:
            raise NotACase(f"request {place} has {batch.extend_lens[place]:,} new tokens, of {length:,}")


def _slots(runs: SlotRuns, most: int) -> NDArray[np.int64]:
    """The first ``most`` slots of ``runs``."""
    parts, found = [np.empty(0, dtype=np.int64)], 0
    for first, count in runs:
        if found >= most:
            break
        taken = min(count, most - found)
        parts.append(np.arange(first, first + taken, dtype=np.int64))
        found += taken
    return np.concatenate(parts)


def _is_another(before: Held, batch: Batch, place: int, pages: tuple[int, ...], digest: int | None) -> bool:
    """Whether the request at ``place`` cannot be the one that was on its row before."""
    seq_len = batch.seq_lens[place]
    both = min(len(before.pages), len(pages))
    from_the_start = bool(batch.extend_lens) and batch.extend_lens[place] == seq_len > before.seq_len
    moved = seq_len == before.seq_len and digest is not None and before.digest not in (None, digest)
    return seq_len < before.seq_len or from_the_start or moved or before.pages[:both] != pages[:both]
