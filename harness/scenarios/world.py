"""The serving engine's host state: running requests, their pool rows and their pages, and how events change them.

All of it follows from the scenario alone, in Python and numpy, so that the same file means the same bytes on every
machine. It does not depend on the backend.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.page_pool import PagePool, numbers, shuffled
from nsa_oracle.harness.scenarios.rng import Stream
from nsa_oracle.harness.scenarios.scenario import (
    Accept,
    Capture,
    Eager,
    Event,
    Finish,
    Join,
    Remap,
    Replay,
    Scenario,
    SetLengths,
)
from nsa_oracle.harness.scenarios.setup import Mirror, Order, Reuse, Setup
from nsa_oracle.reference.types import ForwardMode


@dataclass
class Request:
    """One running request. ``pages`` may be shared with other requests in a common prefix.

    named_pages: those that the record names, of which ``pages`` has as many as the length needs.
    """

    pool_row: int
    seq_len: int
    pages: array[int]
    accept_length: int = 1
    previous_seq_len: int = 0  # before the last accept; a stale host mirror still has it
    named_pages: tuple[int, ...] = ()


@dataclass
class World:
    """Applies events. ``req_to_token`` [pool_size, max_context_len] int32 holds ``poison`` in cells without a token."""

    scenario: Scenario
    poison: int
    running: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        setup = self.scenario.setup
        self.req_to_token: NDArray[np.int32] = np.full(
            (setup.pool_size, setup.max_context_len), self.poison, dtype=np.int32
        )
        self.free_rows = list(range(setup.pool_size - 1, -1, -1))  # a stack: its last row is used next
        if setup.inputs.far_req_to_token:  # only its last rows lie far, and few scenarios would use them otherwise
            self.free_rows.reverse()
        self._reuse_order = Stream(self.scenario.seed, "reuse")
        seed, pages = self.scenario.seed, setup.held_pages
        self.pages = PagePool(pages, setup.page_layout, seed, setup.reuse, self._reuse_order)
        self._random = Stream(self.scenario.seed, "world")

    def apply(self, event: Event) -> Batch | None:
        """Apply one event. Replay and eager events return the batch that the engine sends."""
        match event:
            case Join():
                for number in range(min(event.count, len(self.free_rows))):
                    self._join(event, number)
            case Finish():
                for _ in range(min(event.count, len(self.running))):
                    self._finish(self.running[event.request % len(self.running)])
            case Accept():
                self._accept(event)
            case SetLengths():
                self._set(event)
            case Remap():
                self._remap(event)
            case Replay():
                return self._batch(event, ())
            case Eager():
                return self._batch(event, event.extend_lens)
            case Capture():
                pass
        return None

    def _join(self, event: Join, number: int) -> None:
        seq_len = (event.seq_len - 1 + number) % self.scenario.setup.max_seq_len + 1
        if event.pool_row is not None:
            row = event.pool_row + number
            if row not in self.free_rows:
                return
            self.free_rows.remove(row)
            self.free_rows.append(row)
        shared: array[int] = array("i")
        if event.prefix_of is not None and self.running:
            source = self.running[event.prefix_of % len(self.running)]
            shared = _full_pages(source, seq_len, event.prefix_pages, self.scenario.setup)
        row = self.free_rows.pop()
        request = Request(row, seq_len, array("i", shared), previous_seq_len=seq_len, named_pages=event.pages)
        if not self._map(request):
            self.free_rows.append(row)
            return
        self.pages.hold(shared)
        self.running.append(request)

    def _finish(self, request: Request) -> None:
        self.running.remove(request)
        self.free_rows.append(request.pool_row)
        if self.scenario.setup.reuse is Reuse.SHUFFLED:
            self.free_rows = shuffled(self.free_rows, self._reuse_order)
        self.pages.release(request.pages)
        self.req_to_token[request.pool_row] = self.poison

    def _accept(self, event: Accept) -> None:
        setup = self.scenario.setup
        for number, request in enumerate(list(self.running)):
            accepted = min(event.accept_lengths[number % len(event.accept_lengths)], setup.num_draft_tokens)
            accepted = min(accepted, setup.max_context_len - request.seq_len)
            request.previous_seq_len = request.seq_len
            request.accept_length = accepted
            request.seq_len += accepted
            if not self._map(request):
                self._finish(request)

    def _set(self, event: SetLengths) -> None:
        on_row = {request.pool_row: request for request in self.running}
        for row, seq_len, accepted in zip(event.pool_rows, event.seq_lens, event.accept_lengths, strict=True):
            if (request := on_row.get(row)) is None:
                continue
            request.accept_length = min(accepted, self.scenario.setup.num_draft_tokens)
            if seq_len > request.seq_len:
                request.previous_seq_len, request.seq_len = request.seq_len, seq_len
                if not self._map(request):
                    self._finish(request)

    def _remap(self, event: Remap) -> None:
        if not self.running:
            return
        request = self.running[event.request % len(self.running)]
        source = self.running[event.prefix_of % len(self.running)]
        shared = _full_pages(source, request.seq_len, event.prefix_pages, self.scenario.setup)
        replaced, behind = request.pages, request.pages[len(shared) :]
        # A page's keys depend on the tokens before it: behind another prefix, shared pages are replaced by fresh ones.
        places = self.pages.shared_among(behind)
        if len(places) > len(self.pages.free):
            return
        for place in places:
            behind[place] = self.pages.free.pop()
        request.pages = shared + behind
        self.pages.hold(request.pages)
        self.pages.release(replaced)
        self._map(request)

    def _batch(self, event: Replay | Eager, extend_lens: tuple[int, ...]) -> Batch:
        mode, taking_part = event.mode, self.running
        if event.pool_rows:
            on_row = {request.pool_row: request for request in self.running}
            taking_part = [on_row[row] for row in dict.fromkeys(event.pool_rows) if row in on_row]
        drafts = mode.is_decode_or_idle or mode is ForwardMode.TARGET_VERIFY
        if drafts:  # a server first finishes the requests that have no room for another draft
            for request in [r for r in taking_part if r.seq_len > self.scenario.setup.max_seq_len]:
                self._finish(request)
                if event.pool_rows:
                    taking_part.remove(request)
        requests = [] if mode is ForwardMode.IDLE else self._in_order(taking_part, event.order)
        extends = mode is ForwardMode.EXTEND
        return Batch(
            ForwardMode.IDLE if mode is ForwardMode.DECODE and not requests else mode,
            tuple(r.pool_row for r in requests),
            tuple(r.seq_len for r in requests),
            self._mirror(event, requests),
            tuple(r.accept_length for r in requests),
            tuple(min(extend_lens[i % len(extend_lens)], r.seq_len) for i, r in enumerate(requests)) if extends else (),
            event.draft_steps,
        )

    def _in_order(self, requests: list[Request], order: Order) -> list[Request]:
        match order:
            case Order.JOINED:
                return list(requests)
            case Order.REVERSED:
                return requests[::-1]
            case Order.SHUFFLED:
                return [requests[i] for i in self._random.permutation(len(requests))]

    def _mirror(self, event: Replay | Eager, requests: list[Request]) -> tuple[int, ...] | None:
        numbers = event.seq_lens_cpu
        if numbers and event.mirror in (Mirror.STALE, Mirror.AHEAD):
            return tuple(numbers[i % len(numbers)] for i in range(len(requests)))
        match event.mirror:
            case Mirror.EQUAL:
                return tuple(r.seq_len for r in requests)
            case Mirror.ABSENT:
                return None
            case Mirror.STALE:
                return tuple(self._stale(r) for r in requests)
            case Mirror.AHEAD:
                return tuple(_ahead(r, self.scenario.setup) for r in requests)

    def _stale(self, request: Request) -> int:
        """A stale length: the one before the last accept, or any wrong length if that one is right."""
        if request.previous_seq_len != request.seq_len:
            return request.previous_seq_len
        wrong = self._random.integers(1, self.scenario.setup.max_seq_len)[0]
        return wrong if wrong < request.seq_len else wrong + 1

    def _map(self, request: Request) -> bool:
        """Give the request pages for its tokens and the draft's overshoot, and write their slots to its pool row.

        False if too few pages are free; nothing is written then.
        """
        setup = self.scenario.setup
        covered = min(request.seq_len + setup.draft_overshoot, setup.max_context_len)
        missing = -(-covered // setup.page_size) - len(request.pages)
        taken = self.pages.take(missing, request.named_pages[len(request.pages) :])
        if taken is None:
            return False
        request.pages.extend(taken)
        pages = numbers(request.pages)
        slots = pages[:, None] * setup.page_size + np.arange(setup.page_size, dtype=np.int32)  # [pages, page_size]
        row = self.req_to_token[request.pool_row]
        row[:covered] = slots.reshape(-1)[:covered]
        row[covered:] = self.poison
        return True


def _ahead(request: Request, setup: Setup) -> int:
    """The length if every draft token had been accepted; at the context's end, one token less than the length."""
    rejected = setup.num_draft_tokens - request.accept_length
    ahead = request.seq_len + (rejected if rejected > 0 else setup.num_draft_tokens)
    return ahead if ahead <= setup.max_context_len else max(1, request.seq_len - 1)


def _full_pages(source: Request, seq_len: int, count: int, setup: Setup) -> array[int]:
    """Up to ``count`` leading pages that are full in both ``source`` and a request of ``seq_len`` tokens.

    A page that is still being written is never shared: two requests would write different tokens to it.
    """
    return source.pages[: min(count, min(source.seq_len, seq_len) // setup.page_size)]
