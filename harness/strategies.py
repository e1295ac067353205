"""Hypothesis strategies that draw scenarios. They draw structure only, and shrink towards one request and one event.

Lengths are drawn near the boundaries where implementations change behaviour; everything else follows from the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

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
    Mirror,
    Order,
    PageLayout,
    Remap,
    Replay,
    Scenario,
    Setup,
)
from optimized.optimizations import OPTIMIZATION_NAMES
from reference.types import ForwardMode, StepSemantics


@dataclass(frozen=True)
class Scale:
    """How large scenarios get. Small ones keep Triton's interpreter quick; a GPU takes larger ones for free."""

    max_context_lens: tuple[int, ...]
    max_requests: int
    max_events: int
    max_rows: int  # of one request over all steps
    crowds: tuple[int, ...]  # how many requests may join at once, beside 1
    parts: tuple[int, ...]  # multiprocessors or parts that a schedule is dealt over; 0 leaves it out


SMALL = Scale(
    max_context_lens=(20, 33, 67, 130, 261, 520, 2300),
    max_requests=4,
    max_events=12,
    max_rows=16,
    crowds=(2,),
    parts=(0, 1, 3),
)
LARGE = Scale(
    max_context_lens=(33, 261, 2300, 4100, 9001),
    max_requests=48,
    max_events=24,
    max_rows=512,
    crowds=(3,),
    parts=(0, 1, 7, 132),
)

PREPARATION_SWITCHES = OPTIMIZATION_NAMES[: OPTIMIZATION_NAMES.index("one_launch")]


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
    num_steps = draw(st.sampled_from((1, 2, 3, 4, 8)))
    # Every step writes every row: what the interpreter does one store at a time must stay few.
    most_rows = scale.max_rows // (num_steps * (1 + max_context_len // 1000))
    num_draft_tokens = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if n <= max(2, most_rows)]))
    return Setup(
        page_size=draw(st.sampled_from((1, 16, 32, 64))),
        max_context_len=max_context_len,
        index_topk=draw(st.sampled_from([k for k in (4, 8, 17, 64, 200, 2048) if k <= max(8, max_context_len)])),
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
        ),
    )


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
