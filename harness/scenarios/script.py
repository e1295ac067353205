"""The events of one drawn case, played in a world while they are drawn, so that each can fit those before it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from nsa_oracle.harness.scenarios.goal import LENGTH, MIRROR, ORDER, OWN, Goal
from nsa_oracle.harness.scenarios.scales import Scale
from nsa_oracle.harness.scenarios.scenario import (
    GRAPH_MODES,
    Accept,
    Capture,
    Eager,
    Event,
    Finish,
    Join,
    Replay,
    Scenario,
)
from nsa_oracle.harness.scenarios.setup import Mirror, Order, Setup
from nsa_oracle.harness.scenarios.world import Request, World
from nsa_oracle.reference.types import ForwardMode

OF_ACCEPTED = (ForwardMode.DRAFT_EXTEND, ForwardMode.DRAFT_EXTEND_V2)
_POWERS_OF_TWO = tuple(1 << power for power in range(6, 13))  # boundaries of tiles, blocks and chunks


def seq_lens(setup: Setup) -> st.SearchStrategy[int]:
    """Lengths of a running request: any, preferably next to a boundary or ``num_draft_tokens`` below it."""
    limit = setup.max_seq_len

    def near(*boundaries: int) -> st.SearchStrategy[int]:
        around = {n + off for n in boundaries for off in (-setup.num_draft_tokens, -1, 0, 1)}
        return st.sampled_from(sorted(n for n in around if 1 <= n <= limit))

    own = (1, setup.page_size, setup.index_topk, limit)
    return st.one_of(st.integers(1, limit), near(*own), near(*own, *_POWERS_OF_TWO))


@st.composite
def accept_lengths(draw: st.DrawFn, setup: Setup, requests: int) -> tuple[int, ...]:
    """Accept lengths: mixed, or the same for all requests, then preferably 0 or all draft tokens."""
    one = st.integers(0, setup.num_draft_tokens)
    if draw(st.booleans()):
        return (draw(st.one_of(st.just(0), st.just(setup.num_draft_tokens), one)),)
    return tuple(draw(st.lists(one, min_size=1, max_size=max(1, requests))))


class Script:
    """Events drawn so far, with the state that they lead to.

    most: largest number of requests. captures: buckets by mode, captured before everything else, as in a warm-up.
    """

    def __init__(self, draw: st.DrawFn, setup: Setup, seed: int, scale: Scale, goal: Goal) -> None:
        rows = setup.num_steps * setup.num_draft_tokens
        self.draw = draw
        self.setup = setup
        self.scale = scale
        self.goal = goal
        most = scale.throng if 0 < scale.throng < setup.pool_size else scale.most_requests(setup.max_context_len, rows)
        self.most = min(most, setup.pool_size)
        self.captures: dict[ForwardMode, set[int]] = {}
        self._events: list[Event] = []
        self._world = World(Scenario(setup=setup, seed=seed), poison=0)
        self._called = self._joined = False

    @property
    def events(self) -> tuple[Event, ...]:
        """All events, the first captures in front."""
        captures = [Capture(mode=mode, buckets=tuple(sorted(chosen))) for mode, chosen in self.captures.items()]
        return (*captures, *self._events)

    @property
    def running(self) -> list[Request]:
        return self._world.running

    @property
    def graph_modes(self) -> list[ForwardMode]:
        """The modes that may be captured."""
        return [mode for mode in GRAPH_MODES if mode in self.scale.limits.modes]

    def pick(self, choices: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(choices))

    def add(self, *events: Event) -> None:
        for event in events:
            self._events.append(event)
            self._world.apply(event)

    # Requests.

    def first_length(self) -> int:
        """Length of the next request; of the first one, the length of the goal."""
        wanted = () if self._joined else self.goal.of(LENGTH)
        self._joined = True
        if wanted and wanted != OWN:
            setup = self.setup
            base, off = wanted[0].rstrip("+-1") or "1", {"+1": 1, "-1": -1}.get(wanted[0][1:], 0)
            size = {"1": 1, "P": setup.page_size, "K": setup.index_topk, "limit": setup.max_seq_len}[base] + off
            if 1 <= size <= setup.max_seq_len:
                return int(size)
        return int(self.draw(seq_lens(self.setup)))

    def join(self, seq_len: int | None = None, prefix_of: int | None = None, prefix_pages: int = 1) -> None:
        """One request joins, of a drawn length unless it is given."""
        length = self.first_length() if seq_len is None else min(max(seq_len, 1), self.setup.max_seq_len)
        self._joined = True
        self.add(Join(seq_len=length, prefix_of=prefix_of, prefix_pages=prefix_pages))

    def fill(self, count: int | None = None, least: int = 1) -> None:
        """Requests join until ``count`` are running; if None, a drawn number, preferably as many as possible."""
        if count is None:
            least = min(least, self.most)
            count = self.pick((*range(least, self.most + 1), *[self.most] * ((self.most + 1 - least) // 2)))
        for _ in range(min(count, self.setup.pool_size) - len(self.running)):
            self.join()

    def any_running(self) -> int:
        """The index of a running request; 0 if none is left, as after a call of drafts that none had room for."""
        return int(self.pick(range(len(self.running)))) if self.running else 0

    def finish(self, request: int, count: int = 1) -> None:
        """Requests finish, if any are left: a call of draft tokens finishes those that have no room for them."""
        if self.running:
            self.add(Finish(request=request, count=count))

    def accept(self, lengths: tuple[int, ...] | None = None) -> None:
        drawn = self.draw(accept_lengths(self.setup, self.most)) if lengths is None else lengths
        self.add(Accept(accept_lengths=drawn))

    def accept_before(self, mode: ForwardMode) -> None:
        """Drafts are accepted, preferably, before a draft extend, unless the goal has a length: they add to it."""
        has_length = self.goal.of(LENGTH) not in ((), OWN)
        if mode in OF_ACCEPTED and not has_length and self.pick((True, True, True, False)):
            self.accept()

    # Calls.

    def graph_mode(self, *excluded: ForwardMode) -> ForwardMode | None:
        """A mode to replay, preferably one that is captured already; None if there is none."""
        modes = [mode for mode in self.captures or self.graph_modes if mode not in excluded]
        modes = modes or [mode for mode in self.graph_modes if mode not in excluded]
        return self.pick(modes) if modes else None

    def eager_mode(self) -> ForwardMode:
        """A mode to call eagerly, with requests if the limits have such a mode."""
        modes = [mode for mode in self.scale.limits.modes if mode is not ForwardMode.IDLE]
        mode: ForwardMode = self.pick(modes or self.scale.limits.modes)
        return mode

    def graph(self, mode: ForwardMode, least: int, exact: bool = False) -> int:
        """A bucket of ``mode`` for ``least`` requests: a captured one that holds them, or else a new one.

        No bucket is larger than ``most``: more requests outgrow it. exact: the bucket is no larger than it must be.
        """
        captured, least = self.captures.setdefault(mode, set()), min(least, self.most)
        fitting = sorted(bucket for bucket in captured if bucket == least or (bucket > least and not exact))
        if not fitting:
            fitting = [least if exact else self.pick(range(least, self.most + 1))]
            captured.add(fitting[0])
        chosen: int = self.pick(fitting)
        return chosen

    def replay(self, mode: ForwardMode, bucket: int | None = None, order: Order | None = None) -> Replay:
        """A replay, with the mirror and, unless it is given, the order of the goal if it is the first call."""
        if bucket is None:
            bucket = self.graph(mode, max(1, len(self.running)))
        replay = Replay(mode=mode, bucket=bucket, **self._conditions(order))
        self.add(replay)
        return replay

    def eager(self, mode: ForwardMode, extend_lens: tuple[int, ...] | None = None, order: Order | None = None) -> Eager:
        """An eager call, with the mirror and the order as those of ``replay``."""
        if extend_lens is None:
            extend_lens = (1,)
            if mode is ForwardMode.EXTEND:
                extend_lens = self.draw(new_tokens(self.setup, self.scale, self.most))
        call = Eager(mode=mode, extend_lens=extend_lens, **self._conditions(order))
        self.add(call)
        return call

    def call(self, order: Order | None = None) -> Replay | Eager:
        """A replay if the limits allow one, else an eager call. order: None if any will do."""
        mode = self.graph_mode()
        return self.eager(self.eager_mode(), order=order) if mode is None else self.replay(mode, order=order)

    def again(self, call: Replay | Eager) -> None:
        """The same call once more."""
        self.add(call)

    def _conditions(self, order: Order | None) -> dict[str, Any]:
        mirrors, orders = (() if self._called else self.goal.of(name) for name in (MIRROR, ORDER))
        self._called = True
        return {
            "mirror": self.pick(mirrors if mirrors and mirrors != OWN else tuple(Mirror)),
            "order": order or self.pick(orders if orders and orders != OWN else tuple(Order)),
        }


def new_tokens(setup: Setup, scale: Scale, most: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Numbers of new tokens of the requests of a prefill."""
    lengths = seq_lens(setup)
    if (most_new := scale.most_new_tokens_of(setup)) is not None:
        lengths = lengths.map(functools.partial(min, most_new))
    return st.lists(lengths, min_size=1, max_size=most).map(tuple)
