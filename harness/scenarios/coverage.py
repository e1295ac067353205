"""Boundary classes: the corners of the scenario space that a scenario visits, so that a run can report its coverage.

A class is a short name. ``all_classes`` lists all of them; a test proves that each can be reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from nsa_oracle.harness.scenarios.regime import Regime
from nsa_oracle.harness.scenarios.scenario import (
    GRAPH_MODES,
    Accept,
    Capture,
    Drive,
    Eager,
    Finish,
    Join,
    Mirror,
    Order,
    PageLayout,
    Remap,
    Replay,
    Scenario,
    Setup,
)
from nsa_oracle.harness.scenarios.switches import Switches
from nsa_oracle.harness.scenarios.world import Batch, World, choose_bucket
from nsa_oracle.reference.types import ForwardMode, KVCacheDtype, StepSemantics

COPY_CHUNK = 2048  # tokens; kernels copy a longer row in several pieces

LAYER_CLASSES: tuple[str, ...] = (
    *(f"content {regime.value}" for regime in Regime),
    *(f"cache {dtype.value}" for dtype in KVCacheDtype),
    *("far slots", "more heads than one", "more keys than K", "fewer keys than K", "rows without a key"),
)
METADATA_CLASSES: tuple[str, ...] = (
    *(f"replay {mode.value}" for mode in GRAPH_MODES),
    *(f"eager {mode.value}" for mode in ForwardMode),
    *("batch of 5..8", "batch of more than 8"),
    *("batch empty", "batch padded", "batch fills bucket", "batch outgrows buckets"),
    *("graph empty after requests", "full graph, nothing accepted"),
    *("length 1", "length P-1", "length P", "length P+1", "length K-1", "length K", "length K+1", "length limit"),
    *("accept 0", "accept 1", "accept partial", "accept all", "accept mixed", "accept none at all"),
    *("N 1", "N 2..7", "N 8", "nd 1", "nd 2..7", "nd 8"),
    *("page size 1", "page size 16", "page size 32", "page size 64", "W not a multiple of P"),
    *(f"pages {layout.value}" for layout in PageLayout),
    *("shared prefix", "prefix re-mapped", "cached prefix extended"),
    *("int32 lengths", "int64 lengths", "strided inputs", "wide req_to_token", "far req_to_token"),
    *(f"mirror {mirror.value}" for mirror in Mirror),
    *(f"order {order.value}" for order in Order),
    *(f"drive {drive.value}" for drive in Drive),
    *(f"steps {semantics.value}" for semantics in StepSemantics),
    *("several buckets", "small after large", "small, large, small", "mode change", "eager between replays"),
    *("request finishes", "request joins between replays", "pool row recycled", "page recycled"),
    *("paged MQA schedule", "FlashMLA schedule", "several copy chunks"),
)


def switch_classes(switches: Switches) -> tuple[str, ...]:
    """One class per switch and one for cases without switches; none for a backend that has no switches."""
    return (*(f"switch {name}" for name in switches.names), "no switch") if switches.names else ()


def all_classes(switches: Switches) -> tuple[str, ...]:
    """Every class that cases of a backend with ``switches`` can visit, in report order."""
    return (*METADATA_CLASSES, *switch_classes(switches), *LAYER_CLASSES)


def classes_of(scenario: Scenario) -> set[str]:
    """The classes that ``scenario`` visits. Needs no backend and no tensor library."""
    return set(_visited(scenario))


def _visited(scenario: Scenario) -> Iterator[str]:
    yield from _setup_classes(scenario.setup)
    yield from (f"switch {name}" for name in scenario.optimizations)
    if not scenario.optimizations:
        yield "no switch"

    setup = scenario.setup
    world = World(scenario, poison=0)
    buckets: set[tuple[ForwardMode, int]] = set()
    served: set[tuple[ForwardMode, int]] = set()  # graphs that were replayed with requests
    ran: list[tuple[ForwardMode, int, bool]] = []  # mode, batch size, whether in a graph
    used_rows: set[int] = set()
    used_pages: set[int] = set()
    for event in scenario.events:
        before = {id(r) for r in world.running}
        freed = used_pages - {page for r in world.running for page in r.pages}
        batch = world.apply(event)
        match event:
            case Capture():
                buckets |= {(event.mode, bs) for bs in event.buckets}
                if len({bs for mode, bs in buckets if mode is event.mode}) > 1:
                    yield "several buckets"
            case Join():
                joined = [r for r in world.running if id(r) not in before]
                if joined and ran:
                    yield "request joins between replays"
                if (
                    joined
                    and event.prefix_of is not None
                    and any(joined[0].pages[0] == r.pages[0] for r in world.running[:-1])
                ):
                    yield "shared prefix"
                if any(r.pool_row in used_rows for r in joined):
                    yield "pool row recycled"
            case Finish() if before:
                yield "request finishes"
            case Remap() if len(world.running) > 1:
                target = world.running[event.request % len(world.running)]
                source = world.running[event.prefix_of % len(world.running)]
                if target is not source and target.pages[0] == source.pages[0]:
                    yield "prefix re-mapped"
            case Accept() if world.running:
                yield from _accept_classes([r.accept_length for r in world.running], setup.num_draft_tokens)
            case Replay() | Eager():
                assert batch is not None
                bucket = None
                if isinstance(event, Replay):
                    captured = [bs for mode, bs in buckets if mode is event.mode]
                    bucket = choose_bucket(event.bucket, batch.size, captured)
                    yield from _bucket_classes(batch, bucket)
                    if bucket is not None and batch.size:
                        served.add((event.mode, bucket))
                    elif (event.mode, bucket) in served:
                        yield "graph empty after requests"
                in_graph = bucket is not None
                yield from _batch_classes(batch, setup, event)
                yield f"{'replay' if in_graph else 'eager'} {event.mode.value}"
                ran.append((event.mode, batch.size, in_graph))
        pages = {page for r in world.running for page in r.pages}
        if pages & freed:
            yield "page recycled"
        used_pages |= pages
        used_rows |= {r.pool_row for r in world.running}
    yield from _sequence_classes(ran)


def _bucket_classes(batch: Batch, bucket: int | None) -> Iterator[str]:
    if bucket is None:
        yield "batch outgrows buckets"
    elif batch.size < bucket:
        yield "batch padded"
    else:
        yield "batch fills bucket"
        if batch.mode is ForwardMode.DRAFT_EXTEND and not any(batch.accept_lengths):
            yield "full graph, nothing accepted"


def _setup_classes(setup: Setup) -> Iterator[str]:
    yield f"N {_one_to_eight(setup.num_steps)}"
    yield f"nd {_one_to_eight(setup.num_draft_tokens)}"
    yield f"page size {setup.page_size}"
    if setup.max_context_len % setup.page_size:
        yield "W not a multiple of P"
    yield f"pages {setup.page_layout.value}"
    yield f"{setup.inputs.seq_lens.value} lengths"
    if setup.inputs.strided:
        yield "strided inputs"
    if setup.inputs.wide_req_to_token:
        yield "wide req_to_token"
    if setup.inputs.far_req_to_token and setup.pool_size > 1:
        yield "far req_to_token"
    if setup.layer is not None:
        yield f"content {setup.layer.regime.value}"
        yield f"cache {setup.layer.kv_cache_dtype.value}"
        if setup.layer.far_slots:
            yield "far slots"
        if setup.layer.num_heads > 1:
            yield "more heads than one"
    yield f"drive {setup.drive.value}"
    yield f"steps {setup.step_semantics.value}"
    if setup.paged_mqa_num_sms:
        yield "paged MQA schedule"
    if setup.flashmla_num_sm_parts:
        yield "FlashMLA schedule"


def _accept_classes(accepted: list[int], num_draft_tokens: int) -> Iterator[str]:
    for length in set(accepted):
        if length == 0:
            yield "accept 0"
        if length == 1:
            yield "accept 1"
        if 1 < length < num_draft_tokens:
            yield "accept partial"
        if length == num_draft_tokens:
            yield "accept all"
    if len(set(accepted)) > 1:
        yield "accept mixed"
    if not any(accepted):
        yield "accept none at all"


def _batch_classes(batch: Batch, setup: Setup, event: Replay | Eager) -> Iterator[str]:
    if not batch.size:
        yield "batch empty"
        return
    if batch.size > 4:
        yield "batch of 5..8" if batch.size <= 8 else "batch of more than 8"
    yield f"mirror {event.mirror.value}"
    yield f"order {event.order.value}"
    page, topk = setup.page_size, setup.index_topk
    for name, length in (
        *(("1", 1), ("P-1", page - 1), ("P", page), ("P+1", page + 1)),
        *(("K-1", topk - 1), ("K", topk), ("K+1", topk + 1), ("limit", setup.max_seq_len)),
    ):
        if length in batch.seq_lens:
            yield f"length {name}"
    if setup.layer is not None:
        yield from _key_classes(batch, setup)
    if max(batch.seq_lens) > COPY_CHUNK:
        yield "several copy chunks"
    if batch.mode is ForwardMode.EXTEND and batch.extend_lens != batch.seq_lens:
        yield "cached prefix extended"


def _key_classes(batch: Batch, setup: Setup) -> Iterator[str]:
    if max(batch.seq_lens) > setup.index_topk:
        yield "more keys than K"
    if min(batch.seq_lens) < setup.index_topk:
        yield "fewer keys than K"
    if batch.mode is ForwardMode.DRAFT_EXTEND_V2 and min(batch.seq_lens) < setup.num_draft_tokens:
        yield "rows without a key"


def _sequence_classes(ran: list[tuple[ForwardMode, int, bool]]) -> Iterator[str]:
    replays = [(mode, size) for mode, size, in_graph in ran if in_graph]
    for (mode, size), (next_mode, next_size) in pairwise(replays):
        if mode is not next_mode:
            yield "mode change"
        elif next_size < size:
            yield "small after large"
    for mode in GRAPH_MODES:
        sizes = [size for m, size in replays if m is mode]
        if any(a < b > c for a, b, c in zip(sizes, sizes[1:], sizes[2:], strict=False)):
            yield "small, large, small"
    kinds = [in_graph for _, _, in_graph in ran]
    if any(a and not b and c for a, b, c in zip(kinds, kinds[1:], kinds[2:], strict=False)):
        yield "eager between replays"


def _one_to_eight(number: int) -> str:
    return str(number) if number in (1, 8) else "2..7"
