"""Hypothesis strategies that draw scenarios. They draw structure only, and shrink towards one request and one event.

Lengths are drawn near the boundaries where implementations change behaviour; everything else follows from the seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from harness.content import Regime
from harness.scenario import (
    GRAPH_MODES,
    Accept,
    Capture,
    Drive,
    Eager,
    Event,
    Finish,
    Inputs,
    IntDtype,
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
from optimized.optimizations import OPTIMIZATION_NAMES
from reference.types import ForwardMode, KVCacheDtype, StepSemantics

Sizes = Mapping[str, Sequence[Any]]
"""The values that fields of ``Layer`` or ``Setup`` may take."""


@dataclass(frozen=True)
class Scale:
    """How large scenarios get. Small ones keep Triton's interpreter quick; a GPU takes larger ones for free."""

    max_context_lens: tuple[int, ...]
    max_requests: int
    max_events: int
    max_rows: int  # of one request over all steps
    crowds: tuple[int, ...]  # how many requests may join at once, beside 1
    parts: tuple[int, ...]  # multiprocessors or parts that a schedule is dealt over; 0 leaves it out
    layers: tuple[Sizes, ...] = ()  # of the attention layer behind the metadata, alternatives; none: metadata alone
    page_sizes: tuple[int, ...] = (1, 16, 32, 64)
    index_topks: tuple[int, ...] = (4, 8, 17, 64, 200, 2048)
    num_steps: tuple[int, ...] = (1, 2, 3, 4, 8)


SMALL = Scale(
    max_context_lens=(20, 33, 67, 130, 261, 520, 2300),
    max_requests=4,
    max_events=12,
    max_rows=16,
    crowds=(2,),
    parts=(0, 1, 3, 6),  # 6: neither fills whole vectors with a schedule nor comes near it by chance
)
LARGE = Scale(
    max_context_lens=(33, 261, 2300, 4100, 9001),
    max_requests=48,
    max_events=24,
    max_rows=512,
    crowds=(3,),
    parts=(0, 1, 7, 132),
)
# With a layer behind: what the interpreter computes must stay few numbers; a GPU takes the sizes of production.
SMALL_LAYER = Scale(
    max_context_lens=(20, 33, 67, 130, 261, 1100),  # several tiles and several chunks of keys
    max_requests=3,
    max_events=6,
    max_rows=6,
    crowds=(2,),
    parts=(0,),
    layers=(
        {
            "num_heads": (1, 2, 3, 16),
            "kv_lora_rank": (64,),
            "qk_rope_head_dim": (16,),
            "index_n_heads": (1, 2, 4),
            "index_head_dim": (32,),
        },
    ),
    index_topks=(4, 8, 17, 64, 200, 520, 1030),
    num_steps=(1, 2, 3),
)
LARGE_LAYER = Scale(
    max_context_lens=(33, 261, 2300, 4100),
    max_requests=8,
    max_events=12,
    max_rows=32,
    crowds=(3,),
    parts=(0, 132),
    layers=(
        {
            "num_heads": (16, 32, 64, 128),
            "kv_lora_rank": (512,),
            "qk_rope_head_dim": (64,),
            "index_n_heads": (64,),
            "index_head_dim": (128,),
        },
        {
            "num_heads": (1, 3, 20),
            "kv_lora_rank": (64, 256),
            "qk_rope_head_dim": (16, 32),
            "index_n_heads": (1, 4, 32),
            "index_head_dim": (32, 64),
        },
    ),
    index_topks=(4, 64, 200, 512, 2048),
    num_steps=(1, 2, 4),
)

_RARELY = (False,) * 5 + (True,)
PREPARATION_SWITCHES = OPTIMIZATION_NAMES[: OPTIMIZATION_NAMES.index("one_launch")]


def restricted(scale: Scale, sizes: Sizes) -> Scale:
    """``scale`` with nothing drawn but ``sizes``, for a layer that is made for those alone.

    Raises ValueError if nothing is left to draw, or there is no such size.
    """
    if unknown := sorted(set(sizes) - {*Layer.model_fields, *Setup.model_fields}):
        raise ValueError(f"sizes: neither a layer nor its setup has '{unknown[0]}'")

    def allowed(name: str, choices: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(choice for choice in choices if choice in sizes.get(name, choices))

    alternatives = ({name: allowed(name, choices) for name, choices in layer.items()} for layer in scale.layers)
    left = replace(
        scale,
        layers=tuple({**layer, **_only(sizes)} for layer in alternatives if all(layer.values())),
        page_sizes=allowed("page_size", scale.page_sizes),
        index_topks=allowed("index_topk", scale.index_topks),
    )
    if not (left.layers and left.page_sizes and left.index_topks):
        raise ValueError(f"none of the sizes that are drawn fit {dict(sizes)}")
    return left


def _only(sizes: Sizes) -> Sizes:
    """Restrictions on what is not a size of the scale: what caches and content are drawn."""
    return {name: sizes[name] for name in ("kv_cache_dtype", "regime", "far_slots") if name in sizes}


@st.composite
def layers(draw: st.DrawFn, scale: Scale) -> Layer | None:
    """A layer of the scale's sizes, of any cache and content."""
    if not scale.layers:
        return None
    anything: Sizes = {"regime": tuple(Regime), "kv_cache_dtype": tuple(KVCacheDtype), "far_slots": _RARELY}
    sizes = {**anything, **draw(st.sampled_from(scale.layers))}
    return Layer(**{name: draw(st.sampled_from(tuple(choices))) for name, choices in sizes.items()})


@st.composite
def optimizations(draw: st.DrawFn, semantics: StepSemantics) -> tuple[str, ...]:
    """Any subset of the five switches, or the one-launch path in either wiring; steps aliased where that is sound."""
    if draw(st.booleans()):
        chosen = ["one_launch"] + (["in_graph"] if draw(st.booleans()) else [])
    else:
        chosen = sorted(draw(st.sets(st.sampled_from(PREPARATION_SWITCHES))), key=PREPARATION_SWITCHES.index)
    if semantics is StepSemantics.SHARED and draw(st.booleans()):
        chosen.append("aliased_steps")
    return tuple(chosen)


@st.composite
def setups(draw: st.DrawFn, scale: Scale) -> Setup:
    max_context_len = draw(st.sampled_from(scale.max_context_lens))
    num_steps = draw(st.sampled_from(scale.num_steps))
    # Every step writes every row: what the interpreter does one store at a time must stay few.
    most_rows = scale.max_rows // (num_steps * (1 + max_context_len // 1000))
    num_draft_tokens = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if n <= max(2, most_rows)]))
    return Setup(
        page_size=draw(st.sampled_from(scale.page_sizes)),
        max_context_len=max_context_len,
        index_topk=draw(st.sampled_from(_not_wasted(scale.index_topks, max_context_len))),
        num_steps=num_steps,
        num_draft_tokens=num_draft_tokens,
        step_semantics=draw(st.sampled_from(StepSemantics)),
        paged_mqa_num_sms=draw(st.sampled_from(scale.parts)),
        flashmla_num_sm_parts=draw(st.sampled_from(scale.parts)),
        pool_size=draw(st.integers(1, scale.max_requests + 2)),
        page_layout=draw(st.sampled_from(PageLayout)),
        drive=draw(st.sampled_from(Drive)),
        inputs=Inputs(
            seq_lens=draw(st.sampled_from((IntDtype.INT64, IntDtype.INT32))),
            req_pool_indices=draw(st.sampled_from((IntDtype.INT64, IntDtype.INT32))),
            accept_length=draw(st.sampled_from((IntDtype.INT32, IntDtype.INT64))),
            strided=draw(st.booleans()),
            wide_req_to_token=draw(st.booleans()),
            far_req_to_token=draw(st.sampled_from(_RARELY)),
        ),
        layer=draw(layers(scale)),
    )


def _not_wasted(index_topks: Sequence[int], max_context_len: int) -> list[int]:
    """Those that some row can exceed; the least, if there are none."""
    return [k for k in index_topks if k <= max(8, max_context_len)] or [min(index_topks)]


def seq_lens(setup: Setup) -> st.SearchStrategy[int]:
    """Lengths of a running request: any, and with preference those next to a boundary."""
    page, topk, limit = setup.page_size, setup.index_topk, setup.max_seq_len
    near = {1, 2, page - 1, page, page + 1, topk - 1, topk, topk + 1, 255, 256, 257, limit - 1, limit}
    return st.one_of(st.integers(1, limit), st.sampled_from(sorted(n for n in near if 1 <= n <= limit)))


@st.composite
def accept_lengths(draw: st.DrawFn, setup: Setup, requests: int) -> tuple[int, ...]:
    """Mixed accepts, or one and the same for everybody: 0 and nd must happen to whole batches too."""
    one = st.integers(0, setup.num_draft_tokens)
    if draw(st.booleans()):
        return (draw(one),)
    return tuple(draw(st.lists(one, min_size=1, max_size=max(1, requests))))


@st.composite
def events(draw: st.DrawFn, setup: Setup, scale: Scale) -> tuple[Event, ...]:
    """Captures first, as a server warms up; then requests come, draft, verify and go; sometimes a later capture."""
    most = min(scale.max_requests, setup.pool_size)
    bucket = st.integers(1, most)
    modes = draw(st.lists(st.sampled_from(GRAPH_MODES), min_size=1, max_size=2, unique=True))
    captures = {mode: tuple(sorted(draw(st.sets(bucket, min_size=1, max_size=2)))) for mode in modes}
    drawn: list[Event] = [Capture(mode=mode, buckets=buckets) for mode, buckets in captures.items()]

    mirrors, orders = st.sampled_from(Mirror), st.sampled_from(Order)
    joins = st.builds(
        Join,
        seq_len=seq_lens(setup),
        count=st.sampled_from((1,) * 9 + scale.crowds),  # a crowd soon outgrows every bucket
        prefix_of=st.one_of(st.none(), st.integers(0, most - 1)),
        prefix_pages=st.integers(1, 3),
    )
    replays = st.builds(
        Replay,
        mode=st.sampled_from(modes),
        bucket=st.one_of(st.none(), bucket),
        mirror=mirrors,
        order=orders,
        times=st.sampled_from((1, 1, 1, 2)),
    )
    accepts = st.builds(Accept, accept_lengths=accept_lengths(setup, most))
    finishes = st.builds(Finish, request=st.integers(0, most - 1))
    eager_calls = st.builds(
        Eager,
        mode=st.sampled_from(ForwardMode),
        mirror=mirrors,
        order=orders,
        extend_lens=st.lists(seq_lens(setup), min_size=1, max_size=most).map(tuple),
    )
    remaps = st.builds(
        Remap, request=st.integers(0, most - 1), prefix_of=st.integers(0, most - 1), prefix_pages=st.integers(1, 3)
    )
    late_captures = st.builds(Capture, mode=st.sampled_from(modes), buckets=st.tuples(bucket))
    weighted: tuple[tuple[st.SearchStrategy[Any], int], ...] = (
        *((replays, 11), (accepts, 3), (joins, 2), (finishes, 2), (eager_calls, 2)),
        *((remaps, 1), (late_captures, 1)),
    )
    kinds = st.sampled_from([kind for kind, weight in weighted for _ in range(weight)])  # one_of would not weigh

    # Counts are drawn apart: st.lists by itself favours short ones.
    drawn += [draw(joins) for _ in range(draw(st.integers(0, most)))]
    drawn += [draw(draw(kinds)) for _ in range(draw(st.integers(1, scale.max_events)))]
    return tuple(drawn)


@st.composite
def scenarios(draw: st.DrawFn, scale: Scale = SMALL, switches: bool = True) -> Scenario:
    """Whole scenarios. ``switches``: draw the optimisations of ``optimized/`` too."""
    setup = draw(setups(scale))
    return Scenario(
        setup=setup,
        optimizations=draw(optimizations(setup.step_semantics)) if switches else (),
        seed=draw(st.integers(0, 2**32 - 1)),
        events=draw(events(setup, scale)),
    )
