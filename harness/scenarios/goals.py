"""Deals the goals of a run to its cases: one way to each boundary class, in rotation.

Wants that do not contradict each other share a case. Situations come first, one to a case; sizes, lengths, mirrors and
orders are dealt to these cases in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nsa_oracle.harness.scenarios.classes import (
    COPY_CHUNK,
    FEWER_STEPS,
    FLASHMLA_BLOCK,
    IDLE_AFTER_SEGMENTS,
    IDLE_IN_COMPANY,
    LONG_PREFILL,
    MANY_HEADS,
    MANY_KEYS,
    MANY_STEPS,
    MANY_SUMMED,
    MIRROR_IN_ANOTHER_ORDER,
    MIXED,
    MQA_SEGMENT,
    NO_MIRROR,
    NO_NEW_TOKEN,
    OFTEN_REPLAYED,
    ONE_DIFFERENCE,
    OVER_COMMITTED,
    PLAIN_PREFILL,
    PREFILLS,
    PRODUCTION_INDEX,
    PRODUCTION_INDEX_SIZES,
    SLOTS_BY_STEP,
)
from nsa_oracle.harness.scenarios.goal import (
    ANYTHING,
    CACHE,
    LENGTH,
    MIRROR,
    NEIGHBOUR,
    NOT_OF_THE_SETUP,
    ORDER,
    OWN,
    PREPARATIONS,
    SITUATION,
    SWITCH,
    Goal,
    Pins,
    Want,
)
from nsa_oracle.harness.scenarios.scales import Scale
from nsa_oracle.harness.scenarios.scenario import GRAPH_MODES
from nsa_oracle.harness.scenarios.setup import MAX_STEPS, Drive, IntDtype, Mirror, Order, PageLayout, Regime, Reuse
from nsa_oracle.harness.scenarios.switches import Switches
from nsa_oracle.reference.types import ForwardMode, KVCacheDtype, StepSemantics

MOST_DRAWN = max(*Scale.num_steps, *Scale.num_draft_tokens)  # what a length must leave room for
PERIODS = {False: 41, True: 17}  # cases in which each goal occurs once, without and with a layer
# The situations of the first cases, so of short profiles, in an order chosen from partial hunts of the zoo: 30 of
# 33 bugs died in the 16 cases of smoke, on some of which the order was tuned. It is not known to be the best.
FIRST_SITUATIONS = (
    *("several segments", "graph empty after requests", "nothing accepted", "small, large, small"),
    *("cached prefixes", "whole prompts", "same batch on other pages", "steps cross a FlashMLA block"),
    *("accepts", "replay DRAFT_EXTEND_V2", "replay DRAFT_EXTEND", "replay DECODE", "eager IDLE"),
    *("smaller draft extend, other accepts", "replay TARGET_VERIFY", "eager after the longest left"),
)


def goals(scale: Scale, switches: Switches, round_: int = 0) -> list[Goal]:
    """The goals of the cases of one period. Later rounds combine the same wants in other ways."""
    period = PERIODS[bool(scale.layers)]
    dealt = [ANYTHING] * period
    free_to_go = 0  # wants without a situation so far, which go to one case after the other
    for want in wants(scale, switches):
        start = 0
        if SITUATION not in want.pins:
            start, free_to_go = free_to_go + 7 * round_, free_to_go + 1
        alike = [case for case in range(period) if want.pins.get(SITUATION) == dealt[case].pins.get(SITUATION, ())]
        for case in (*alike, *((start + number) % period for number in range(period))):
            goal = dealt[case].joined(want)
            if goal is not None:
                dealt[case] = goal
                break
    return dealt


def wants(scale: Scale, switches: Switches) -> list[Want]:
    """The wants that fit the limits of ``scale``: situations first, in the order of their cases."""
    every = _of_layers(scale) if scale.layers else _of_metadata(scale, switches)
    drawn = scale.drawn()
    found = []
    for want in every:
        pins = {
            name: values if name in NOT_OF_THE_SETUP else _both(scale.limits.of(name, drawn.get(name, ())), values)
            for name, values in want.pins.items()
        }
        if all(pins.values()) and set(want.modes) <= set(scale.limits.modes):
            found.append(Want(want.name, pins, want.modes))
    return sorted(found, key=_place)


def _place(want: Want) -> int:
    """Where a want comes in the order of ``wants``."""
    (situation, *_) = want.pins.get(SITUATION, ("",))
    return (
        FIRST_SITUATIONS.index(situation) if situation in FIRST_SITUATIONS else len(FIRST_SITUATIONS) + (not situation)
    )


def _both(some: Sequence[Any], others: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(value for value in some if value in others)


def _steps(scale: Scale, least: int) -> tuple[int, ...]:
    return tuple(n for n in scale.num_steps if n >= least)


def _of_metadata(scale: Scale, switches: Switches) -> Iterator[Want]:
    yield from _segments(scale)
    yield from _pairs(scale, "")
    yield from _one_difference(scale)
    yield from _steps_of_modes(scale, "")
    yield from _prefills(scale, "")
    yield from _occupancy(scale)
    yield from _histories(scale)
    yield from _of_setups(scale, switches)
    yield from _of_calls(scale)
    yield _plain_prefill(scale, switches)


def _of_layers(scale: Scale) -> Iterator[Want]:
    prefix = "layer: "
    yield from _prefills(scale, prefix)
    yield from _pairs(scale, prefix)
    yield from _steps_of_modes(scale, prefix)
    yield from (Want(f"content {regime.value}", {"regime": (regime,)}) for regime in reversed(Regime))
    yield from (Want(f"cache {dtype.value}", {"kv_cache_dtype": (dtype,)}) for dtype in KVCacheDtype)
    ranks = tuple(scale.drawn()["kv_lora_rank"])
    smaller = tuple(rank for rank in ranks if rank < max(ranks)) or ranks  # a kernel of its own may have the largest
    ordinary: Pins = {"regime": (Regime.RANDOM,), "kv_cache_dtype": (KVCacheDtype.FP8,), "kv_lora_rank": smaller}
    yield Want("ordinary numbers in an FP8 cache", ordinary)
    yield Want("more heads than one", {"num_heads": _more_than(scale.drawn()["num_heads"], 1)})
    many_heads = {"num_heads": _more_than(scale.drawn()["num_heads"], MANY_HEADS - 1)}
    yield Want("32 heads or more, FP8 cache", {**many_heads, "kv_cache_dtype": (KVCacheDtype.FP8,)})
    yield Want("far slots", {"far_slots": (True,)})
    several_tiles = {"max_context_len": _more_than(scale.max_context_lens, 4 * 64)}
    index = {name: (size,) for name, size in PRODUCTION_INDEX_SIZES.items()}
    yield Want(PRODUCTION_INDEX, {**index, **several_tiles})
    yield Want("more keys than K", {**_around(scale, "index_topk", 1), LENGTH: ("K+1",)})
    parts = {
        "index_topk": _more_than(scale.index_topks, MANY_KEYS),
        "max_context_len": _more_than(scale.max_context_lens, MANY_KEYS + 1 + MOST_DRAWN),
        "regime": (Regime.LATTICE,),  # whose sums are exact: ordinary ones may hide a partial sum that is rounded
    }
    yield Want(MANY_SUMMED, {**parts, LENGTH: ("K", "K+1")})
    yield Want("fewer keys than K", {**_around(scale, "index_topk", 1), LENGTH: ("K-1",)})
    drafts, v2 = _more_than(scale.num_draft_tokens, 1), ForwardMode.DRAFT_EXTEND_V2
    pins = {SITUATION: (f"replay {v2.value}",), "num_draft_tokens": drafts, LENGTH: ("1",)}
    yield Want("rows without a key", pins, (v2,))
    yield Want("rows of slot -1", {**pins, "padding_slot": (-1,)}, (v2,))
    extra = {"extra_rows": _more_than(scale.drawn()["extra_rows"], 0)}
    mode = ForwardMode.DRAFT_EXTEND
    yield Want("rows behind the metadata, replay", {SITUATION: (f"replay {mode.value}",), **extra}, (mode,))
    together = {"slots_by_step": (True,), "num_steps": _steps(scale, 2)}
    yield Want(SLOTS_BY_STEP, {SITUATION: (f"replay {mode.value}",), **together}, (mode,))
    mode = ForwardMode.EXTEND
    yield Want("rows behind the metadata, eager", {SITUATION: ("cached prefixes",), **extra}, (mode,))
    yield from _company(scale, prefix)
    few = {"num_steps": (1,), "num_draft_tokens": (1,), "pool_size": (1,), "num_heads": (1,), "kv_lora_rank": (64,)}
    wide = {"max_context_len": scale.wide_context_lens, "index_topk": tuple(k for k in scale.index_topks if k < 100)}
    yield Want("rows of more than 16,384 tokens", {SITUATION: ("wide rows",), **wide, **few, LENGTH: OWN})
    yield from _long_prefills(scale)


def _long_prefills(scale: Scale) -> Iterator[Want]:
    """One, in one step and the narrowest tables that hold it: the cost of a row grows with both."""
    longest = max(scale.long_prefills, default=0) + MOST_DRAWN
    widths = sorted(_more_than(scale.limits.of("max_context_len", scale.max_context_lens), longest))[:1]
    cheap = {name: scale.limits.of(name, values) for name, values in scale.long_prefill_sizes.items()}
    pins: Pins = {
        SITUATION: ("long prefill",),
        "max_context_len": tuple(widths) if scale.long_prefills else (),
        "num_steps": (min(scale.limits.of("num_steps", scale.num_steps), default=1),),
        "pool_size": _more_than(scale.pools, 1),
        LENGTH: OWN,
        **{name: values for name, values in cheap.items() if values},
    }
    yield Want(LONG_PREFILL, pins, (ForwardMode.EXTEND,))


def _segments(scale: Scale) -> Iterator[Want]:
    decode = (ForwardMode.DECODE,)
    base = {"step_semantics": (StepSemantics.ADVANCING,), LENGTH: OWN}
    parts = tuple(n for n in scale.parts if n)
    several = tuple(n for n in parts if n > 1)  # the schedule of one multiprocessor is the same for all lengths
    mqa = {"paged_mqa_num_sms": several, "max_context_len": _more_than(scale.max_context_lens, MQA_SEGMENT)}
    mla = {
        "flashmla_num_sm_parts": parts,
        "index_topk": _more_than(scale.index_topks, FLASHMLA_BLOCK),
        "max_context_len": _more_than(scale.max_context_lens, FLASHMLA_BLOCK + 2 * MOST_DRAWN),
    }
    wide = {**mqa, "max_context_len": _more_than(scale.max_context_lens, MQA_SEGMENT + 2 * MOST_DRAWN)}
    together = {"drive": (Drive.MULTI_STEP,), LENGTH: OWN, "num_steps": _steps(scale, MANY_STEPS)}
    name = f"N >= {MANY_STEPS} multi-step replay of several paged-MQA segments"
    yield Want(name, {SITUATION: ("several segments",), **together, **wide}, decode)
    yield Want(IDLE_AFTER_SEGMENTS, {SITUATION: ("several segments",), **together, **wide}, decode)
    for name, sizes in (("paged-MQA segment", mqa), ("FlashMLA block", mla)):
        pins = {SITUATION: (f"steps cross a {name}",), **base, **sizes, "num_steps": _steps(scale, MANY_STEPS)}
        yield Want(f"N >= {MANY_STEPS} steps cross a {name}", pins, decode)
        yield Want(f"steps cross a {name}", {**pins, "num_steps": _steps(scale, 2)}, decode)


def _pairs(scale: Scale, prefix: str) -> Iterator[Want]:
    small_pages = tuple(p for p in scale.page_sizes if p <= min(scale.max_context_lens))
    moved = {"reuse": (Reuse.QUEUE, Reuse.SHUFFLED), "page_size": small_pages, LENGTH: OWN}
    ordered = {ORDER: (Order.JOINED, Order.REVERSED)}
    name = "same batch on other pages"
    yield Want(f"{prefix}{name}", {SITUATION: (name,), **moved, **ordered})
    if not prefix:
        name = "same batch on other pages, eager"
        yield Want(name, {SITUATION: (name,), **moved, **ordered})
    name = "row grown on other pages"
    yield Want(f"{prefix}{name}", {SITUATION: (name,), **moved, "reuse": (Reuse.QUEUE,)})
    name = "eager after the longest left"
    yield Want(f"{prefix}{name}", {SITUATION: (name,), LENGTH: OWN})
    name = "small after large in one bucket"
    yield Want(f"{prefix}{name}", {SITUATION: (name,)})
    if not prefix:
        name = "smaller draft extend, other accepts"
        drafts = _more_than(scale.num_draft_tokens, 1)
        pins = {SITUATION: (name,), "num_draft_tokens": drafts, LENGTH: OWN}
        yield Want(name, pins, (ForwardMode.DRAFT_EXTEND,))


def _one_difference(scale: Scale) -> Iterator[Want]:
    limits = scale.limits
    accepts, pages, length = ONE_DIFFERENCE
    ordered: Pins = {ORDER: (Order.JOINED, Order.REVERSED), LENGTH: OWN}
    drafts = _more_than(scale.num_draft_tokens, 1)
    yield Want(accepts, {SITUATION: (accepts,), "num_draft_tokens": drafts, **ordered}, (ForwardMode.DRAFT_EXTEND,))
    several = _more_than(scale.pools, 1)
    page = min(limits.of("page_size", scale.page_sizes), default=1)
    widths = _more_than(scale.max_context_lens, 2 * page + 1 + MOST_DRAWN)
    between: Pins = {"page_size": (page,), "max_context_len": widths, "pool_size": several, **ordered}
    for name in (pages, "shared prefix"):
        yield Want(name, {SITUATION: (pages,), **between})
    together = {"drive": limits.of("drive", (Drive.MULTI_STEP,)) or tuple(Drive), MIRROR: (Mirror.EQUAL,)}
    within: Pins = {"page_size": _more_than(scale.page_sizes, 1), "pool_size": several, **together}
    yield Want(length, {SITUATION: (length,), **within, **ordered})
    beyond = {"pool_size": _more_than(scale.pools, 3), "max_context_len": _more_than(scale.max_context_lens, 64)}
    name = MIRROR_IN_ANOTHER_ORDER
    yield Want(name, {SITUATION: ("mirror in another order",), **beyond, **together, **ordered})
    # The smallest sizes, because it is long.
    small = {
        name: tuple(sorted(limits.of(name, choices))[:1])
        for name, choices in (
            ("max_context_len", scale.max_context_lens),
            ("num_steps", scale.num_steps),
            ("num_draft_tokens", scale.num_draft_tokens),
        )
    }
    for name in (OFTEN_REPLAYED, "batch fills bucket"):
        yield Want(name, {SITUATION: ("often replayed",), "pool_size": several, **small, **ordered})


def _steps_of_modes(scale: Scale, prefix: str) -> Iterator[Want]:
    without_mirror: Pins = {MIRROR: (Mirror.ABSENT,), "drive": (Drive.MULTI_STEP,)}
    for mode in GRAPH_MODES:
        name = f"replay {mode.value}"
        pins: Pins = {SITUATION: (name,), "num_steps": _steps(scale, 2)}
        yield Want(f"{prefix}{name}, N > 1", pins, (mode,))
        if not prefix:
            yield Want(name, {SITUATION: (name,)}, (mode,))
            yield Want(f"second backend, {mode.value} replay", {SITUATION: (name,), NEIGHBOUR: ("alike",)}, (mode,))
            beside = {SITUATION: ("several segments",)} if mode is ForwardMode.DECODE else {}  # which has all steps
            yield Want(f"no host mirror, {mode.value} replay", {**pins, **without_mirror, **beside}, (mode,))
    mode = ForwardMode.DECODE
    for name, call in zip(FEWER_STEPS, ("replay", "eager"), strict=True):
        several: Pins = {SITUATION: (f"{call} {mode.value}",), "num_steps": _steps(scale, 2)}
        if not prefix:
            yield Want(name, {**several, "drive": (Drive.SINGLE_STEP,)}, (mode,))
        elif call == "eager":
            yield Want(f"{prefix}{name}", several, (mode,))
    for mode in ForwardMode:
        if prefix and mode is ForwardMode.IDLE:
            continue
        name = f"eager {mode.value}"
        place = {SITUATION: (name,)}
        if mode is ForwardMode.IDLE:
            place |= {MIRROR: OWN, ORDER: OWN, LENGTH: OWN}
        if mode is ForwardMode.EXTEND:
            place = {SITUATION: ("cached prefixes",)}
        yield Want(f"{prefix}{name}, N > 1", {**place, "num_steps": _steps(scale, 2)}, (mode,))
        if not prefix:
            yield Want(name, place, (mode,))
            yield Want(f"second backend, {mode.value} eagerly", {**place, NEIGHBOUR: ("alike",)}, (mode,))
            if (eagerly := f"no host mirror, {mode.value} eagerly") in NO_MIRROR:
                yield Want(eagerly, {**place, "num_steps": _steps(scale, 2), **without_mirror}, (mode,))


def _prefills(scale: Scale, prefix: str) -> Iterator[Want]:
    around = {**_around(scale, "index_topk", 1), LENGTH: OWN}
    for situation, names in (
        ("cached prefixes", (PREFILLS[0], "prefill beyond K")),
        ("whole prompts", (*PREFILLS[1:], "prefill within K", "K between the lengths")),
    ):
        for name in names:
            yield Want(f"{prefix}{name}", {SITUATION: (situation,), **around}, (ForwardMode.EXTEND,))


def _occupancy(scale: Scale) -> Iterator[Want]:
    steps, drafts = (1, 2), (1, 2, 3, 4)
    for name, size in (("batch of 5..8", 5), ("batch of more than 8", 9)):
        widths = tuple(
            width for width in scale.max_context_lens if scale.most_requests(width, max(steps) * max(drafts)) >= size
        )
        pins: Pins = {SITUATION: (name,), "max_context_len": widths, "num_steps": steps, "num_draft_tokens": drafts}
        pools = tuple(n for n in scale.pools if n >= size)
        throng = scale.limits.of("pool_size", (scale.throng + 2,)) if scale.throng and size > 8 else ()
        yield Want(name, {**pins, "pool_size": throng or pools})
    yield Want("batch padded", {SITUATION: ("replay, padded",)})
    several = {"eager_padding": _more_than(scale.drawn()["eager_padding"], 0)}
    mode = ForwardMode.IDLE
    yield Want("eager IDLE of padding", {SITUATION: (f"eager {mode.value}",), **several}, (mode,))
    mode = ForwardMode.DECODE
    yield Want("eager call padded", {SITUATION: (f"eager {mode.value}",), **several}, (mode,))
    yield Want("padding of length 0", {SITUATION: ("replay, padded",), "padding_len": (0,)})
    yield Want("batch outgrows buckets", {SITUATION: ("outgrown",)})
    idle: Pins = {SITUATION: ("graph empty after requests",)}
    yield from (Want(name, idle) for name in ("batch empty", "graph empty after requests"))
    # In the graph, what a second backend has done to shared buffers would be undone.
    yield Want(IDLE_IN_COMPANY, {**idle, NEIGHBOUR: ("alike",), SWITCH: ("",)}, (ForwardMode.DECODE,))
    for name in ("full graph, nothing accepted", "accept 0", "accept none at all"):
        yield Want(name, {SITUATION: ("nothing accepted",)}, (ForwardMode.DRAFT_EXTEND,))
    drafts_to_part = {
        SITUATION: ("accepts",),
        "num_draft_tokens": _more_than(scale.num_draft_tokens, 2),
        LENGTH: OWN,
    }
    many = {"num_draft_tokens": _more_than(scale.num_draft_tokens, 8), LENGTH: OWN}
    yield Want("draft extend over 8 tokens", {SITUATION: ("all accepted",), **many}, (ForwardMode.DRAFT_EXTEND,))
    for name in ("accept partial", "accept 1", "accept all", "accept mixed"):
        yield Want(name, drafts_to_part)


def _histories(scale: Scale) -> Iterator[Want]:
    for name in ("small, large, small", "small after large", "several buckets"):
        yield Want(name, {SITUATION: ("small, large, small",)})
    for name in ("mode change", "eager between replays"):
        yield Want(name, {SITUATION: ("mode change",)})
    recycled = {SITUATION: ("recycled",), "reuse": (Reuse.STACK,)}
    for name in ("request finishes", "request joins between replays", "pool row recycled", "page recycled"):
        yield Want(name, recycled)
    yield Want(f"reuse {Reuse.STACK.value}", recycled)
    yield Want(f"reuse {Reuse.QUEUE.value}", {SITUATION: ("row grown on other pages",), "reuse": (Reuse.QUEUE,)})
    shuffled = {SITUATION: ("same batch on other pages",), "reuse": (Reuse.SHUFFLED,)}
    yield Want(f"reuse {Reuse.SHUFFLED.value}", shuffled)
    full_pages = {
        "page_size": tuple(p for p in scale.page_sizes if p <= 16),
        "max_context_len": _more_than(scale.max_context_lens, 16 + MOST_DRAWN),
        LENGTH: OWN,
    }
    yield Want("prefix re-mapped", {SITUATION: ("prefix re-mapped",), **full_pages})
    long = _more_than(scale.max_context_lens, COPY_CHUNK + MOST_DRAWN)
    yield Want("several copy chunks", {SITUATION: ("several copy chunks",), "max_context_len": long, LENGTH: OWN})


def _of_setups(scale: Scale, switches: Switches) -> Iterator[Want]:
    for switch in reversed(switches.names):  # those inside the graph first: most bugs need them
        shared = {"step_semantics": (StepSemantics.SHARED,)} if switch in switches.shared_only else {}
        yield Want(f"switch {switch}", {SWITCH: (switch,), **shared})
    if switches.names:
        yield Want("no switch", {SWITCH: ("",)})
    for prefix, name in (("N", "num_steps"), ("nd", "num_draft_tokens")):
        yield Want(f"{prefix} 1", {name: (1,)})
        yield Want(f"{prefix} 2..8", {name: tuple(range(2, 9))})
        yield Want(f"{prefix} over 8", {name: tuple(range(9, MAX_STEPS + 1))})
    yield from (Want(f"page size {size}", {"page_size": (size,)}) for size in scale.page_sizes)
    odd = tuple(width for width in scale.max_context_lens if any(width % size for size in scale.page_sizes))
    yield Want("W not a multiple of P", {"page_size": _more_than(scale.page_sizes, 1), "max_context_len": odd})
    yield from (Want(f"pages {layout.value}", {"page_layout": (layout,)}) for layout in PageLayout)
    yield from (Want(f"{dtype.value} lengths", {"seq_lens": (dtype,)}) for dtype in IntDtype)
    yield Want("strided inputs", {"strided": (True,)})
    yield Want("wide req_to_token", {"wide_req_to_token": (True,)})
    several = _more_than(scale.pools, 1)
    yield Want("far req_to_token", {"far_req_to_token": (True,), "pool_size": several})
    yield from (Want(f"drive {drive.value}", {"drive": (drive,)}) for drive in Drive)
    yield from (Want(f"steps {each.value}", {"step_semantics": (each,)}) for each in StepSemantics)
    parts = _more_than(scale.parts, 0)
    yield Want("paged MQA schedule", {"paged_mqa_num_sms": parts})
    yield Want("FlashMLA schedule", {"flashmla_num_sm_parts": parts})


def _of_calls(scale: Scale) -> Iterator[Want]:
    yield from (Want(f"mirror {mirror.value}", {MIRROR: (mirror,)}) for mirror in Mirror)
    yield from (Want(f"order {order.value}", {ORDER: (order,)}) for order in Order)
    for name, sizes in (
        ("1", {}),
        ("limit", {}),
        *((f"P{sign}", _around(scale, "page_size", off)) for sign, off in (("-1", -1), ("", 0), ("+1", 1))),
        *((f"K{sign}", _around(scale, "index_topk", off)) for sign, off in (("-1", -1), ("", 0), ("+1", 1))),
    ):
        yield Want(f"length {name}", {LENGTH: (name,), **sizes})
    yield from _company(scale, "")


def _plain_prefill(scale: Scale, switches: Switches) -> Want:
    pins: Pins = {
        SITUATION: ("prefills",),
        "strided": (True,),
        "pool_size": _more_than(scale.pools, 1),
        LENGTH: OWN,
        **({SWITCH: ("",)} if switches.names else {}),
    }
    return Want(PLAIN_PREFILL, pins, (ForwardMode.EXTEND,))


def _company(scale: Scale, prefix: str) -> Iterator[Want]:
    """What else happens around the calls of a case."""
    cycle = (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.EXTEND)
    if not prefix:
        yield Want("drafts behind a verification", {SITUATION: ("serving cycle",)}, cycle[:2])
        yield Want("prefill between replays", {SITUATION: ("serving cycle",)}, cycle)
    for names, least in ((NO_NEW_TOKEN[2:], 2), ((*NO_NEW_TOKEN[:2], MIXED), 1)):
        chunks: Pins = {SITUATION: ("chunks",), "pool_size": _more_than(scale.pools, least), LENGTH: OWN}
        yield from (Want(f"{prefix}{name}", chunks, cycle[2:]) for name in names)
    yield Want(f"{prefix}second backend", {NEIGHBOUR: ("other",)})
    yield Want(f"{prefix}second backend, alike", {NEIGHBOUR: ("alike",)})
    yield Want(f"{prefix}prepared twice", {PREPARATIONS: (2,)})
    wide = _more_than(scale.max_context_lens, 100)
    several = {"pool_size": _more_than(scale.pools, 2), "max_context_len": wide, LENGTH: OWN}
    small_pages = tuple(p for p in scale.page_sizes if p <= 16)
    tight = {SITUATION: ("cached prefixes",), CACHE: ("tight",), "page_size": small_pages, **several}
    yield Want(f"{prefix}{OVER_COMMITTED}", tight, cycle[2:])


def _around(scale: Scale, name: str, off: int) -> dict[str, tuple[int, ...]]:
    """Sizes at which a request can be ``off`` tokens longer than the field ``name`` says, and has at least one."""
    drawn = scale.limits.of(name, scale.drawn()[name])
    widths = scale.limits.of("max_context_len", scale.max_context_lens)
    longest = max(widths, default=0) - MOST_DRAWN
    fitting = tuple(value for value in drawn if 1 <= value + off <= longest)
    least = min(fitting, default=0) + off + MOST_DRAWN
    return {name: fitting, "max_context_len": tuple(width for width in widths if width >= least)}


def _more_than(values: Sequence[int], least: int) -> tuple[int, ...]:
    return tuple(value for value in values if value > least)
