"""Hypothesis strategies that draw scenarios. They draw structure only, and shrink towards one request and one event.

Lengths are drawn near the boundaries where implementations change behaviour; everything else follows from the seed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from hypothesis import reject
from hypothesis import strategies as st

from nsa_oracle.harness.scenarios.limits import Limits, Sizes, within
from nsa_oracle.harness.scenarios.regime import Regime, most_coded_slots
from nsa_oracle.harness.scenarios.scales import SMALL, Scale
from nsa_oracle.harness.scenarios.scenario import (
    GRAPH_MODES,
    Accept,
    Capture,
    Eager,
    Event,
    Finish,
    Inputs,
    Join,
    Layer,
    Mirror,
    Order,
    PageLayout,
    Remap,
    Replay,
    Scenario,
    Setup,
)
from nsa_oracle.harness.scenarios.switches import NO_SWITCHES, Switches
from nsa_oracle.reference.types import ForwardMode, KVCacheDtype, StepSemantics

_OF_ACCEPTED = (ForwardMode.DRAFT_EXTEND, ForwardMode.DRAFT_EXTEND_V2)
_POWERS_OF_TWO = tuple(1 << power for power in range(6, 13))  # boundaries of tiles, blocks and chunks


@st.composite
def layers(draw: st.DrawFn, scale: Scale) -> Layer | None:
    """A layer of the scale's sizes, with any cache dtype and any content; None if the scale has no layers."""
    if not scale.layers:
        return None
    regimes = (*Regime, Regime.RANDOM)  # RANDOM twice: only its numbers are rounded when they are stored
    anything: Sizes = {"regime": regimes, "kv_cache_dtype": tuple(KVCacheDtype), "far_slots": scale.far_slots}
    sizes = {**anything, **draw(st.sampled_from(scale.layers))}
    return Layer(**{name: draw(st.sampled_from(scale.limits.of(name, choices))) for name, choices in sizes.items()})


@st.composite
def optimizations(draw: st.DrawFn, switches: Switches, semantics: StepSemantics) -> tuple[str, ...]:
    """Any subset of the separate switches, or the fused ones; if steps share, sometimes also the shared-only ones."""
    if draw(st.booleans()):
        first, second = switches.fused
        chosen = [first] + ([second] if draw(st.booleans()) else [])
    else:
        chosen = sorted(draw(st.sets(st.sampled_from(switches.separate))), key=switches.separate.index)
    if semantics is StepSemantics.SHARED and draw(st.booleans()):
        chosen += switches.shared_only
    return tuple(chosen)


@st.composite
def setups(draw: st.DrawFn, scale: Scale) -> Setup:
    drawn, limits = scale.drawn(), scale.limits

    def pick(name: str, choices: Sequence[Any] = (), freely: st.SearchStrategy[Any] | None = None) -> Any:
        """An allowed one of ``choices``, or else of the field's drawn values; ``freely`` if the field has no limit."""
        if freely is not None and name not in limits.sizes:
            return draw(freely)
        return draw(st.sampled_from(limits.of(name, choices) or limits.of(name, drawn[name])))

    max_context_len = pick("max_context_len")
    num_steps = pick("num_steps")
    # Every step writes every row, and the interpreter executes one store at a time, so there must be few.
    most_rows = scale.max_rows // (num_steps * (1 + max_context_len // 1000))
    num_draft_tokens = pick("num_draft_tokens", [n for n in scale.num_draft_tokens if n <= max(2, most_rows)])
    index_topks = limits.of("index_topk", scale.index_topks)
    most_requests = scale.most_requests(max_context_len, num_steps * num_draft_tokens)
    largest_pool = most_requests + 2
    pools = (*range(1, largest_pool + 1), *[largest_pool] * largest_pool)  # half the time the largest
    layer = draw(layers(scale))
    far = layer is not None and layer.far_slots
    setup = Setup(
        page_size=pick("page_size"),
        max_context_len=max_context_len,
        index_topk=pick("index_topk", _exceedable(index_topks, max_context_len)),
        num_steps=num_steps,
        num_draft_tokens=num_draft_tokens,
        step_semantics=pick("step_semantics"),
        paged_mqa_num_sms=pick("paged_mqa_num_sms"),
        flashmla_num_sm_parts=pick("flashmla_num_sm_parts"),
        pool_size=pick("pool_size", freely=st.sampled_from(pools)),
        page_layout=pick("page_layout"),
        drive=pick("drive"),
        inputs=Inputs(
            seq_lens=pick("seq_lens"),
            req_pool_indices=pick("req_pool_indices"),
            accept_length=pick("accept_length"),
            strided=pick("strided", freely=st.booleans()),
            wide_req_to_token=pick("wide_req_to_token", freely=st.booleans()),
            far_req_to_token=pick("far_req_to_token", (False,) if far else scale.far_req_to_token),
        ),
        layer=layer,
    )
    return _with_codes_for_all(_from_the_far_end(setup, limits), limits)


def _from_the_far_end(setup: Setup, limits: Limits) -> Setup:
    """With far caches, the setup with a layout that gives requests the last pages first: only those lie far."""
    low = setup.page_layout in (PageLayout.CONTIGUOUS, PageLayout.INTERLEAVED)
    if setup.layer is None or not setup.layer.far_slots or not low:
        return setup
    layouts = limits.of("page_layout", (PageLayout.DESCENDING, PageLayout.SHUFFLED, setup.page_layout))
    return setup.model_copy(update={"page_layout": layouts[0]})


def _with_codes_for_all(setup: Setup, limits: Limits) -> Setup:
    """The setup with its pool reduced until content can encode every slot. Rejects the case if no size allows that."""
    if setup.layer is None or setup.layer.regime is not Regime.DOMINATING:
        return setup
    most = most_coded_slots(setup.layer.attention_config())
    for pool_size in (setup.pool_size, *limits.of("pool_size", range(setup.pool_size - 1, 0, -1))):
        smaller = setup.model_copy(update={"pool_size": pool_size})
        if smaller.num_pages * smaller.page_size <= most:
            return smaller
    return reject()


def _exceedable(index_topks: Sequence[int], max_context_len: int) -> list[int]:
    """Those of ``index_topks`` that the length of some row can exceed, or the smallest if there are none."""
    return [k for k in index_topks if k <= max(8, max_context_len)] or [min(index_topks)]


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


@st.composite
def events(draw: st.DrawFn, setup: Setup, scale: Scale) -> tuple[Event, ...]:
    """Captures first, as in a server's warm-up; then requests join, draft, verify and finish; some late captures."""
    rows = setup.num_steps * setup.num_draft_tokens
    most = min(scale.most_requests(setup.max_context_len, rows), setup.pool_size)
    joining = draw(st.sampled_from((*range(most + 1), *[most] * (most // 2))))  # a third of the time the maximum
    # Preferably a bucket that the first requests fill, or the largest possible one.
    bucket = st.one_of(st.integers(1, most), st.just(max(1, joining)), st.just(most))
    graph_modes = [mode for mode in GRAPH_MODES if mode in scale.limits.modes]
    modes = draw(st.lists(st.sampled_from(graph_modes), min_size=1, max_size=2, unique=True)) if graph_modes else []
    buckets = st.sampled_from((2, 2, 2, 5)).flatmap(lambda count: st.sets(bucket, min_size=1, max_size=count))
    captures = {mode: tuple(sorted(draw(buckets))) for mode in modes}
    drawn: list[Event] = [Capture(mode=mode, buckets=chosen) for mode, chosen in captures.items()]

    # Counts are drawn separately, because st.lists favours short lists.
    drawn += [draw(_joins(setup, most)) for _ in range(joining)]
    sequences = _event_sequences(setup, scale, most, modes, bucket)
    for _ in range(draw(st.integers(1, scale.max_events))):
        drawn += draw(draw(sequences))
    return tuple(drawn)


def _event_sequences(
    setup: Setup, scale: Scale, most: int, modes: Sequence[ForwardMode], bucket: st.SearchStrategy[int]
) -> st.SearchStrategy[st.SearchStrategy[tuple[Event, ...]]]:
    """Strategies for the next events, one or more, of a server that has captured graphs of ``modes``.

    Events that engines run back to back are drawn together, because by chance they would rarely be adjacent.
    """
    replays = _replays(modes or GRAPH_MODES, bucket)
    of_accepted = _replays([mode for mode in modes if mode in _OF_ACCEPTED] or modes or GRAPH_MODES, bucket)
    eager_calls = _eager_calls(setup, scale, most)
    accepts = st.builds(Accept, accept_lengths=accept_lengths(setup, most))
    joins = _joins(setup, most, (1,) * 4 + scale.crowds)  # crowds are rare: they soon exceed every bucket
    finishes = st.builds(Finish, request=st.integers(0, most - 1))
    all_finish = st.just(Finish(request=0, count=most))  # a rank runs out of work; its rows and pages are reused
    remaps = st.builds(
        Remap, request=st.integers(0, most - 1), prefix_of=st.integers(0, most - 1), prefix_pages=st.integers(1, 3)
    )
    late_captures = st.builds(Capture, mode=st.sampled_from(modes or GRAPH_MODES), buckets=st.tuples(bucket))
    weighted: tuple[tuple[tuple[st.SearchStrategy[Any], ...], int], ...] = (
        *(((replays,), 11 if modes else 0), ((eager_calls,), 3 if modes else 13)),
        *(((accepts,), 1), ((accepts, of_accepted), 3 if modes else 0)),
        *(((joins,), 2), ((finishes,), 2), ((remaps,), 1), ((late_captures,), 1 if modes else 0)),
        ((replays, all_finish, replays, joins), 1 if modes else 0),
    )
    # st.one_of has no weights.
    return st.sampled_from([st.tuples(*kind) for kind, weight in weighted for _ in range(weight)])


def _joins(setup: Setup, most: int, counts: tuple[int, ...] = (1,)) -> st.SearchStrategy[Join]:
    return st.builds(
        Join,
        seq_len=seq_lens(setup),
        count=st.sampled_from(counts),
        prefix_of=st.one_of(st.none(), st.integers(0, most - 1)),
        prefix_pages=st.integers(1, 3),
    )


def _replays(modes: Sequence[ForwardMode], bucket: st.SearchStrategy[int]) -> st.SearchStrategy[Replay]:
    return st.builds(
        Replay,
        mode=st.sampled_from(modes),
        bucket=st.one_of(st.none(), bucket),
        mirror=st.sampled_from(Mirror),
        order=st.sampled_from(Order),
        times=st.sampled_from((1, 1, 1, 2)),
    )


def _eager_calls(setup: Setup, scale: Scale, most: int) -> st.SearchStrategy[Eager]:
    new_tokens = seq_lens(setup)
    if scale.most_new_tokens is not None:
        new_tokens = new_tokens.map(functools.partial(min, scale.most_new_tokens))
    never_replayed = (mode for mode in scale.limits.modes if mode not in GRAPH_MODES)
    return st.builds(
        Eager,
        mode=st.sampled_from((*scale.limits.modes, *never_replayed)),  # those twice: they occur nowhere else
        mirror=st.sampled_from(Mirror),
        order=st.sampled_from(Order),
        extend_lens=st.lists(new_tokens, min_size=1, max_size=most).map(tuple),
    )


@st.composite
def scenarios(draw: st.DrawFn, scale: Scale = SMALL, switches: Switches = NO_SWITCHES) -> Scenario:
    """Complete scenarios within the limits of ``scale``, with the backend's ``switches`` if it has any."""
    setup = draw(setups(scale))
    scenario = Scenario(
        setup=setup,
        optimizations=draw(optimizations(switches, setup.step_semantics)) if switches.names else (),
        seed=draw(st.integers(0, 2**32 - 1)),
        events=draw(events(setup, scale)),
    )
    return within(scenario, scale.limits)
