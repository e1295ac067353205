"""A test case: one frozen, readable record of sizes, flags, events and a seed. It contains no tensor data.

Its JSON form is the lasting record of a failure: people can read and edit it, and it means the same bytes on every
machine. ``SCHEMA_VERSION`` changes whenever the meaning of an existing file would change.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, model_validator

from nsa_oracle.harness.scenarios.setup import (
    MAX_BATCH,
    MAX_CONTEXT,
    MAX_POOL_CELLS,
    MAX_STEPS,
    CasePart,
    FieldError,
    Mirror,
    Order,
    Regime,
    Setup,
    most_coded_slots,
)
from nsa_oracle.reference.types import ForwardMode

SCHEMA_VERSION: Literal[1] = 1
MAX_CELLS = 1 << 26  # of all page tables together: 256 MiB
MAX_WORK = 1 << 33  # cells of page tables that captures, replays and eager calls fill together: some minutes
MAX_HOST_WORK = 1 << 36  # cells of the pool that joins, accepts and the like write on the host: about a minute
MAX_EVENTS = 4096
MAX_GRAPHS = 1024
MAX_CACHE_BYTES = 1 << 31  # of the caches of one layer
MAX_EXACT_KEYS = 2048

GRAPH_MODES = (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND, ForwardMode.DRAFT_EXTEND_V2)


def _is_of_drafts(mode: ForwardMode, draft_steps: int | None) -> None:
    """Raises FieldError if ``draft_steps`` is given in a ``mode`` that runs once per cycle."""
    if draft_steps is not None and not mode.is_decode_or_idle:
        raise FieldError("draft_steps", f"must be left out in {mode.value}, which has no draft steps")


def graph_mode(mode: ForwardMode) -> ForwardMode:
    """The mode whose graph serves ``mode``: an idle rank replays the DECODE graph."""
    return ForwardMode.DECODE if mode is ForwardMode.IDLE else mode


def _has_a_graph(mode: ForwardMode) -> ForwardMode:
    if mode not in GRAPH_MODES:
        raise ValueError(f"{mode.value} has no graph; choose from {', '.join(m.value for m in GRAPH_MODES)}")
    return mode


GraphMode = Annotated[ForwardMode, AfterValidator(_has_a_graph)]
DraftSteps = Annotated[int, Field(ge=1, le=MAX_STEPS)] | None
PoolRow = Annotated[int, Field(ge=0, lt=MAX_BATCH)]
PoolRows = Annotated[tuple[PoolRow, ...], FailFast()]
MirrorLens = Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...], FailFast()]


class Capture(CasePart):
    """Capture a graph of ``mode`` for each bucket (padded batch size)."""

    event: Literal["capture"] = "capture"
    mode: GraphMode
    buckets: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_BATCH)], ...], FailFast()] = Field(min_length=1)


class Join(CasePart):
    """A request joins with ``seq_len`` cached tokens, on a free pool row and free pages, in the order of ``Reuse``.

    With ``prefix_of`` it shares up to its first ``prefix_pages`` pages with that running request (an index modulo the
    number of running requests). ``count`` such requests join, each one token longer than the previous one; a length
    over the limit wraps to 1. Requests that find the pool full do not join.

    Records of servers name places. pool_row: the row of the first request; the next ones follow it, and one whose row
    is taken does not join. pages: the pages that each takes, in order and whoever else holds them, now and as it grows;
    free ones follow. Without a layer only: others may write to them.
    """

    event: Literal["join"] = "join"
    seq_len: int = Field(ge=1)
    count: int = Field(default=1, ge=1, le=MAX_BATCH)
    prefix_of: int | None = Field(default=None, ge=0)
    prefix_pages: int = Field(default=1, ge=1)
    pool_row: PoolRow | None = None
    pages: Annotated[tuple[Annotated[int, Field(ge=1)], ...], FailFast()] = ()


class Finish(CasePart):
    """Running request ``request`` (an index modulo the number running) finishes; its row and pages are free at once.

    ``count`` requests finish one after another, each the one that has that index then; all, if fewer are running.
    """

    event: Literal["finish"] = "finish"
    request: int = Field(ge=0)
    count: int = Field(default=1, ge=1, le=MAX_BATCH)


class Accept(CasePart):
    """Verification accepted ``accept_lengths[i]`` tokens of running request i; the tuple repeats for more requests."""

    event: Literal["accept"] = "accept"
    accept_lengths: Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_STEPS)], ...], FailFast()] = Field(min_length=1)


class SetLengths(CasePart):
    """The requests on ``pool_rows`` have ``seq_lens`` tokens now, and ``accept_lengths`` of them were accepted last.

    For what no Accept says: records of servers, prefill in chunks, growth of some requests alone. A request never
    shrinks, and rows without a running request are left out.
    """

    event: Literal["set"] = "set"
    pool_rows: PoolRows = Field(min_length=1)
    seq_lens: Annotated[tuple[Annotated[int, Field(ge=1)], ...], FailFast()]
    accept_lengths: Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_STEPS)], ...], FailFast()]

    @model_validator(mode="after")
    def _says_all_of_each(self) -> SetLengths:
        for name in ("seq_lens", "accept_lengths"):
            if len(getattr(self, name)) != len(self.pool_rows):
                raise FieldError(name, f"must have as many numbers as pool_rows: {len(self.pool_rows):,}")
        return self


class Remap(CasePart):
    """The first ``prefix_pages`` pages of running request ``request`` are replaced by those of ``prefix_of``."""

    event: Literal["remap"] = "remap"
    request: int = Field(ge=0)
    prefix_of: int = Field(ge=0)
    prefix_pages: int = Field(default=1, ge=1)


class Replay(CasePart):
    """The graph of ``mode`` runs on the running requests: ``times`` times a preparation, followed by a replay.

    preparations: how often the same batch is prepared before each replay.
    bucket: the captured graph to use; if it is None, not captured or too small, the smallest that holds the batch. If
    no graph holds it, the engine calls the backend eagerly, as a server does.
    draft_steps: in DECODE, how many of the draft steps run, the first ones; None for all. Without a layer only: a graph
    runs the layer in all of them.

    pool_rows: rows of the requests that take part, in order; those without a running request are left out. Empty: all
    requests. seq_lens_cpu: the numbers of a stale mirror, or of one ahead, for the requests of the batch; they repeat
    for more. Empty: those that follow from the events.
    """

    event: Literal["replay"] = "replay"
    mode: GraphMode
    bucket: int | None = Field(default=None, ge=1, le=MAX_BATCH)
    mirror: Mirror = Mirror.EQUAL
    order: Order = Order.JOINED
    times: int = Field(default=1, ge=1, le=16)
    preparations: int = Field(default=1, ge=1, le=4)
    draft_steps: DraftSteps = None
    pool_rows: PoolRows = ()
    seq_lens_cpu: MirrorLens = ()

    @model_validator(mode="after")
    def _drafts(self) -> Replay:
        _is_of_drafts(self.mode, self.draft_steps)
        return self


class Eager(CasePart):
    """The running requests go through ``mode`` without a graph.

    preparations: how often the same batch is prepared.
    extend_lens: in EXTEND, ``extend_lens[i]`` of request i's tokens are new, the others a cached prefix; the tuple
    repeats for more requests. pool_rows, seq_lens_cpu: as in a replay. draft_steps: in DECODE and IDLE, how many of the
    draft steps run, the first ones; None for all.
    """

    event: Literal["eager"] = "eager"
    mode: ForwardMode
    mirror: Mirror = Mirror.EQUAL
    order: Order = Order.JOINED
    extend_lens: Annotated[tuple[Annotated[int, Field(ge=0)], ...], FailFast()] = (1,)
    preparations: int = Field(default=1, ge=1, le=4)
    draft_steps: DraftSteps = None
    pool_rows: PoolRows = ()
    seq_lens_cpu: MirrorLens = ()

    @model_validator(mode="after")
    def _extends_something(self) -> Eager:
        _is_of_drafts(self.mode, self.draft_steps)
        if not self.extend_lens:
            raise FieldError("extend_lens", "must name at least 1 length; it is empty")
        return self


Event = Annotated[Capture | Join | Finish | Accept | SetLengths | Remap | Replay | Eager, Field(discriminator="event")]


def _an_int(version: object) -> object:
    """Makes the validation of ``Literal[1]`` reject True and 1.0, which it accepts by itself."""
    if type(version) is not int:
        raise ValueError("must be a whole number")
    return version


class Scenario(CasePart):
    """What happens to one backend from its construction on.

    optimizations: names of the backend's switches (see ``Switches``); a backend without switches ignores them.
    note: free text for the reader, such as where the case came from.
    """

    schema_version: Annotated[Literal[1], BeforeValidator(_an_int)] = SCHEMA_VERSION
    note: str = ""
    setup: Setup
    optimizations: Annotated[tuple[str, ...], FailFast()] = ()
    seed: int = Field(default=0, ge=0, lt=1 << 64)
    events: Annotated[tuple[Event, ...], FailFast()] = ()

    @property
    def calls(self) -> int:
        """Number of replays and eager calls: what is judged."""
        return sum(event.times if isinstance(event, Replay) else isinstance(event, Eager) for event in self.events)

    @property
    def prepared(self) -> int:
        """Number of preparations of replays and eager calls."""
        return sum(
            event.preparations * (event.times if isinstance(event, Replay) else 1)
            for event in self.events
            if isinstance(event, Replay | Eager)
        )

    @model_validator(mode="after")
    def _fits_context_and_memory(self) -> Scenario:
        setup = self.setup
        longest = setup.max_seq_len
        for number, event in enumerate(self.events):
            if isinstance(event, Join) and event.seq_len > longest:
                length = event.seq_len if event.seq_len <= MAX_CONTEXT else f"a number above {MAX_CONTEXT}"
                raise FieldError(
                    f"events[{number}].seq_len", f"{length} leaves no room to draft; at most {longest} fit"
                )
            self._check_places(number, event)
            if isinstance(event, Replay | Eager) and (event.draft_steps or 0) > setup.num_steps:
                raise FieldError(
                    f"events[{number}].draft_steps", f"must be at most {setup.num_steps}, the number of steps"
                )
            if isinstance(event, Replay) and event.draft_steps is not None and setup.layer is not None:
                raise FieldError(f"events[{number}].draft_steps", "must be left out of a replay in a case with a layer")
        buckets = [bucket for event in self.events if isinstance(event, Capture) for bucket in event.buckets]
        per_request = setup.num_draft_tokens * setup.num_steps
        largest = max(buckets, default=setup.pool_size)
        width = setup.max_context_len + setup.neighbour_context_len
        tables = (setup.pool_size + largest * per_request) * width
        filled = (sum(buckets) + self.prepared * largest) * per_request * width
        sizes = "setup.max_context_len"
        for place, what, count, most in (
            ("events", "events", len(self.events), MAX_EVENTS),
            ("events", "graphs", len(buckets), MAX_GRAPHS),
            (sizes, "cells in req_to_token", setup.pool_size * width, MAX_POOL_CELLS),
            (sizes, "cells in page tables", tables, MAX_CELLS),
            ("events", "cells to fill", filled, MAX_WORK),
            ("events", "cells of the pool to map on the host", self._host_work(), MAX_HOST_WORK),
        ):
            if count > most:
                raise FieldError(place, f"the case would have {count:,} {what}; at most {most:,}: make it smaller")
        return self

    def _check_places(self, number: int, event: Event) -> None:
        """Raises FieldError if ``event`` names a row, a length or a page that the pool does not have."""
        setup, most = self.setup, self.setup.pages_per_request
        last = setup.held_pages
        if isinstance(event, SetLengths) and max(event.seq_lens) > setup.max_context_len:
            raise FieldError(f"events[{number}].seq_lens", f"must be at most {setup.max_context_len}")
        if not isinstance(event, Join):
            return
        if event.pool_row is not None and event.pool_row >= setup.pool_size:
            raise FieldError(f"events[{number}].pool_row", f"must be below {setup.pool_size}, not {event.pool_row}")
        fit = len(set(event.pages)) == len(event.pages) <= most and max(event.pages, default=0) <= last
        if event.pages and (setup.layer is not None or not fit):
            reason = f"must be at most {most:,} different pages of 1..{last:,}, in a case without a layer"
            raise FieldError(f"events[{number}].pages", reason)

    def _host_work(self) -> int:
        """An upper bound of the cells of the pool that events map on the host. A page costs as much as 32 cells."""
        rows = 0
        for event in self.events:
            match event:
                case Accept():
                    rows += self.setup.pool_size
                case Join() | Finish():
                    rows += min(event.count, self.setup.pool_size)
                case SetLengths():
                    rows += len(event.pool_rows)
                case Remap():
                    rows += 1
        return rows * (self.setup.max_context_len + 32 * self.setup.pages_per_request)

    @model_validator(mode="after")
    def _caches_fit_memory(self) -> Scenario:
        setup, layer = self.setup, self.setup.layer
        if layer is None:
            return self
        if (size := setup.cache_bytes) > MAX_CACHE_BYTES:
            reason = f"its caches would have {size:,} bytes; at most {MAX_CACHE_BYTES:,}: make the pool smaller"
            raise FieldError("setup.layer", reason)
        if setup.page_size & (setup.page_size - 1):
            raise FieldError("setup.page_size", f"with a layer it must be a power of two, not {setup.page_size}")
        if layer.regime is not Regime.RANDOM and setup.index_topk > MAX_EXACT_KEYS:
            reason = f"the exact regimes hold for at most {MAX_EXACT_KEYS} keys, not {setup.index_topk}"
            raise FieldError("setup.index_topk", reason)
        most = most_coded_slots(layer.attention_config())
        if layer.regime is Regime.DOMINATING and setup.num_slots > most:
            reason = f"can tell {most:,} slots apart; there are {setup.num_slots:,}: use a larger part"
            raise FieldError("setup.layer.qk_rope_head_dim", f"{layer.qk_rope_head_dim} {reason}")
        return self
