"""Hypothesis strategies that draw scenarios. They draw structure only, and shrink towards one request and one event.

Lengths are drawn near the boundaries where implementations change behaviour; everything else follows from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hypothesis import reject
from hypothesis import strategies as st

from nsa_oracle.harness.scenarios.calls_again import CALLS_AGAIN, HAPPENINGS
from nsa_oracle.harness.scenarios.goal import ANYTHING, CACHE, NEIGHBOUR, PREPARATIONS, SITUATION, SWITCH, Goal
from nsa_oracle.harness.scenarios.limits import Limits, Sizes, within
from nsa_oracle.harness.scenarios.scales import EXTRA_ROWS, PADDING_SLOTS, SMALL, Scale, restricted
from nsa_oracle.harness.scenarios.scenario import (
    GRAPH_MODES,
    MAX_CACHE_BYTES,
    Accept,
    Capture,
    Eager,
    Event,
    Finish,
    Join,
    Remap,
    Replay,
    Scenario,
)
from nsa_oracle.harness.scenarios.script import OF_ACCEPTED, Script, accept_lengths, new_tokens, seq_lens
from nsa_oracle.harness.scenarios.setup import (
    Inputs,
    Layer,
    Mirror,
    Order,
    PageLayout,
    Regime,
    Reuse,
    Setup,
    most_coded_slots,
)
from nsa_oracle.harness.scenarios.situations import SITUATIONS
from nsa_oracle.harness.scenarios.switches import NO_SWITCHES, Switches
from nsa_oracle.reference.types import ForwardMode, KVCacheDtype, StepSemantics

_RARELY = (False,) * 39 + (True,)  # what makes a whole case nearly twice as expensive
_WEIGHTS_OF_REUSE = (Reuse.STACK, Reuse.STACK, Reuse.QUEUE, Reuse.SHUFFLED)


@st.composite
def layers(draw: st.DrawFn, scale: Scale) -> Layer | None:
    """A layer of the scale's sizes, with any cache dtype and any content; None if the scale has no layers."""
    if not scale.layers:
        return None
    regimes = (*Regime, Regime.RANDOM)  # RANDOM twice: only its numbers are rounded when they are stored
    anything: Sizes = {
        "regime": regimes,
        "kv_cache_dtype": tuple(KVCacheDtype),
        "far_slots": scale.far_slots,
        "padding_slot": PADDING_SLOTS,
        "extra_rows": EXTRA_ROWS,
        "slots_by_step": (False, True),
    }
    sizes = {**anything, **draw(st.sampled_from(scale.layers))}
    return Layer(**{name: draw(st.sampled_from(scale.limits.of(name, choices))) for name, choices in sizes.items()})


@st.composite
def optimizations(
    draw: st.DrawFn, switches: Switches, semantics: StepSemantics, wanted: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Any subset of the separate switches, or the fused ones; if steps share, sometimes also the shared-only ones.

    wanted: one switch that is on, or an empty name if none is; empty if any may be.
    """
    if wanted == ("",):
        return ()
    if wanted:
        return tuple(name for name in switches.names if name in _with(draw, switches, wanted[0]))
    if draw(st.booleans()):
        first, second = switches.fused
        chosen = [first] + ([second] if draw(st.booleans()) else [])
    else:
        chosen = sorted(draw(st.sets(st.sampled_from(switches.separate))), key=switches.separate.index)
    if semantics is StepSemantics.SHARED and draw(st.booleans()):
        chosen += switches.shared_only
    return tuple(chosen)


def _with(draw: st.DrawFn, switches: Switches, wanted: str) -> set[str]:
    """Switches that may be on together, ``wanted`` among them."""
    if wanted in switches.fused:
        return {switches.fused[0], wanted}
    return {wanted} | draw(st.sets(st.sampled_from(switches.separate)))


@st.composite
def setups(draw: st.DrawFn, scale: Scale) -> Setup:
    drawn, limits = scale.drawn(), scale.limits

    def pick(name: str, choices: Sequence[Any] = (), freely: st.SearchStrategy[Any] | None = None) -> Any:
        """An allowed one of ``choices``, or else of the field's drawn values; ``freely`` if the field has no limit."""
        if freely is not None and name not in limits.sizes:
            return draw(freely)
        return draw(st.sampled_from(limits.of(name, choices) or limits.of(name, drawn[name])))

    max_context_len = pick("max_context_len", scale.max_context_lens)
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
        paged_mqa_num_sms=pick("paged_mqa_num_sms", scale.parts),
        flashmla_num_sm_parts=pick("flashmla_num_sm_parts", scale.parts),
        pool_size=pick("pool_size", freely=st.sampled_from(pools)),
        page_layout=pick("page_layout"),
        reuse=pick("reuse", _WEIGHTS_OF_REUSE),
        drive=pick("drive"),
        padding_len=pick("padding_len"),
        eager_padding=pick("eager_padding"),
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
    """The setup with its pool reduced until content can encode every slot, and until the caches are small enough.

    Rejects the case if no size allows that.
    """
    if setup.layer is None:
        return setup
    coded = setup.layer.regime is Regime.DOMINATING
    most = most_coded_slots(setup.layer.attention_config()) if coded else math.inf
    for pool_size in (setup.pool_size, *limits.of("pool_size", range(setup.pool_size - 1, 0, -1))):
        smaller = setup.model_copy(update={"pool_size": pool_size})
        if smaller.num_slots <= most and smaller.cache_bytes <= MAX_CACHE_BYTES:
            return smaller
    return reject()


def _exceedable(index_topks: Sequence[int], max_context_len: int) -> list[int]:
    """Those of ``index_topks`` that the length of some row can exceed, or the smallest if there are none."""
    return [k for k in index_topks if k <= max(8, max_context_len)] or [min(index_topks)]


@st.composite
def events(draw: st.DrawFn, setup: Setup, seed: int, scale: Scale, goal: Goal) -> tuple[Event, ...]:
    """Captures first, as in a server's warm-up; then the situation of the goal, and then what chance brings."""
    script = Script(draw, setup, seed, scale, goal)
    if goal.of(SITUATION):
        (SITUATIONS | CALLS_AGAIN)[goal.of(SITUATION)[0]](script)
        most = scale.max_events // 3
    else:
        _warm_up(script)
        most = scale.max_events
    sequences = _event_sequences(script)
    for _ in range(draw(st.integers(0 if goal.of(SITUATION) else 1, most))):
        if not script.running and draw(st.sampled_from((True, True, True, False))):
            script.join()
        drawn = draw(sequences)
        if callable(drawn):
            drawn(script)
        else:
            script.add(*draw(drawn))
    return script.events


def _warm_up(script: Script) -> None:
    """A capture of one mode or two, if there are any, and the requests that are running at first."""
    draw, most = script.draw, script.most
    joining = draw(st.sampled_from((*range(1, most + 1), *[most] * (most // 2), 0)))
    bucket = _buckets(most, joining)
    graph_modes = script.graph_modes
    modes = draw(st.lists(st.sampled_from(graph_modes), min_size=1, max_size=2, unique=True)) if graph_modes else []
    buckets = st.sampled_from((2, 2, 2, 5)).flatmap(lambda count: st.sets(bucket, min_size=1, max_size=count))
    for mode in modes:
        script.captures[mode] = draw(buckets)
    for _ in range(joining):
        script.add(draw(_joins(script.setup, most)))


def _buckets(most: int, requests: int) -> st.SearchStrategy[int]:
    """Preferably a bucket that the first requests fill, or the largest possible one."""
    return st.one_of(st.integers(1, most), st.just(max(1, requests)), st.just(most))


def _event_sequences(script: Script) -> st.SearchStrategy[Any]:
    """What happens next to a server: a strategy for events, one or more, or a situation.

    Events that engines run back to back are drawn together, because by chance they would rarely be adjacent.
    """
    setup, scale, most, modes = script.setup, script.scale, script.most, list(script.captures)
    bucket = _buckets(most, len(script.running))
    replays = _replays(modes or GRAPH_MODES, bucket)
    of_accepted = _replays([mode for mode in modes if mode in OF_ACCEPTED] or modes or GRAPH_MODES, bucket)
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
    kinds: list[Any] = [st.tuples(*kind) for kind, weight in weighted for _ in range(weight)]
    return st.sampled_from([*kinds, *HAPPENINGS])


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
    prefills = (mode for mode in scale.limits.modes if mode is ForwardMode.EXTEND)
    return st.builds(
        Eager,
        mode=st.sampled_from((*scale.limits.modes, *prefills)),  # those twice: they occur nowhere else
        mirror=st.sampled_from(Mirror),
        order=st.sampled_from(Order),
        extend_lens=new_tokens(setup, scale, most),
    )


@st.composite
def scenarios(
    draw: st.DrawFn, scale: Scale = SMALL, switches: Switches = NO_SWITCHES, goal: Goal = ANYTHING
) -> Scenario:
    """Complete scenarios within the limits of ``scale``, with the backend's ``switches`` if it has any.

    goal: what they are built to visit. Not all of them do: the caller chooses among them.
    """
    narrowed = narrowed_to(scale, goal)
    setup = draw(setups(narrowed))
    if goal.of(CACHE):
        setup = setup.model_copy(update={"cache_pages": _tight(setup)})
    chosen = draw(optimizations(switches, setup.step_semantics, goal.of(SWITCH))) if switches.names else ()
    seed = draw(st.integers(0, 2**32 - 1))
    happened = draw(events(setup, seed, scale, goal))
    if goal.of(NEIGHBOUR) or draw(st.sampled_from(_RARELY)):
        setup = setup.model_copy(update={"neighbour_context_len": draw(_neighbours(setup, scale, goal))})
    if goal.of(PREPARATIONS) or draw(st.sampled_from(_RARELY)):
        happened = draw(_prepared_again(happened))
    return within(Scenario(setup=setup, optimizations=chosen, seed=seed, events=happened), scale.limits)


def _tight(setup: Setup) -> int:
    """Pages for the longest request, and for what each of the others has behind a prefix that it shares."""
    own = 1 + -(-setup.draft_overshoot // setup.page_size)
    return min(setup.pages_per_request + (setup.pool_size - 1) * own, setup.held_pages)


def _neighbours(setup: Setup, scale: Scale, goal: Goal) -> st.SearchStrategy[int]:
    """Context lengths of a second backend: that of the first if the goal says so, else preferably short others."""
    if goal.of(NEIGHBOUR) == ("alike",):
        return st.just(setup.max_context_len)
    lengths = sorted(n for n in scale.limits.of("max_context_len", scale.max_context_lens) if n > setup.draft_overshoot)
    others = [n for n in lengths if n != setup.max_context_len]
    return st.sampled_from((others or lengths or [setup.max_context_len])[:3])


@st.composite
def _prepared_again(draw: st.DrawFn, happened: tuple[Event, ...]) -> tuple[Event, ...]:
    """The same events, of which one call prepares its batch twice."""
    calls = [number for number, event in enumerate(happened) if isinstance(event, Replay | Eager)]
    chosen = draw(st.sampled_from(calls)) if calls else None
    return tuple(
        event.model_copy(update={"preparations": 2}) if number == chosen else event
        for number, event in enumerate(happened)
    )


def narrowed_to(scale: Scale, goal: Goal) -> Scale:
    """``scale`` with the sizes of ``goal``. Raises ValueError, in one line, if they leave nothing to draw."""
    sizes = goal.sizes()
    return restricted(scale, scale.limits & Limits(sizes)) if sizes else scale


@st.composite
def but_the_simplest(draw: st.DrawFn, cases: st.SearchStrategy[Scenario]) -> Scenario:
    """``cases`` without the simplest one, which Hypothesis would try first, whatever the seed."""
    if not draw(st.integers(0, 1 << 16)):
        reject()
    return draw(cases)
