"""The boundary classes that a scenario visits, so that a run can report its coverage. ``classes`` has their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nsa_oracle.harness.scenarios.batch import Batch, choose_bucket
from nsa_oracle.harness.scenarios.classes import (
    ALSO_WITH_A_LAYER,
    COMPANY,
    COPY_CHUNK,
    FEWER_STEPS,
    FLASHMLA_BLOCK,
    IDLE_AFTER_SEGMENTS,
    IDLE_IN_COMPANY,
    LONG_PREFILL,
    MANY_HEADS,
    MANY_KEYS,
    MANY_NEW,
    MANY_REPLAYS,
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
    PAIRS,
    PLAIN_PREFILL,
    PRODUCTION_INDEX,
    PRODUCTION_INDEX_SIZES,
    SLOTS_BY_STEP,
    WIDE,
)
from nsa_oracle.harness.scenarios.scenario import (
    GRAPH_MODES,
    Accept,
    Capture,
    Eager,
    Finish,
    Join,
    Remap,
    Replay,
    Scenario,
    SetLengths,
)
from nsa_oracle.harness.scenarios.setup import Drive, Mirror, Regime, Setup
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.reference.types import ForwardMode, KVCacheDtype, StepSemantics


def classes_of(scenario: Scenario) -> set[str]:
    """The classes that ``scenario`` visits. Needs no backend and no tensor library."""
    visited = set(_visited(scenario))
    if scenario.setup.layer is not None:
        visited |= {f"layer: {name}" for name in visited & set(ALSO_WITH_A_LAYER)}
    return visited


@dataclass(frozen=True)
class _Call:
    """One replay or eager call. bucket: None if eager. pages: of each request of the batch."""

    batch: Batch
    bucket: int | None
    pages: tuple[tuple[int, ...], ...]

    @property
    def kind(self) -> tuple[ForwardMode, int | None]:
        """What two calls have in common that may share state: the mode, and the graph if there is one."""
        return self.batch.mode, self.bucket


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
    calls: list[_Call] = []
    used_rows: set[int] = set()
    used_pages: set[int] = set()
    held: set[int] = set()  # pages of running requests
    for event in scenario.events:
        before = {id(r) for r in world.running}
        freed = used_pages - held
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
                if joined and freed:
                    yield f"reuse {setup.reuse.value}"
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
            case Accept() | SetLengths() if world.running:
                yield from _accept_classes([r.accept_length for r in world.running], setup.num_draft_tokens)
            case Replay() | Eager():
                assert batch is not None
                bucket = None
                if isinstance(event, Replay):
                    captured = [bs for mode, bs in buckets if mode is event.mode]
                    bucket = choose_bucket(event.bucket, batch.size, captured)
                    yield from _bucket_classes(batch, bucket)
                    if bucket is not None and batch.size < bucket and not setup.padding_len:
                        yield "padding of length 0"
                    if bucket is not None and batch.size:
                        served.add((event.mode, bucket))
                    elif (event.mode, bucket) in served:
                        yield "graph empty after requests"
                in_graph = bucket is not None
                if setup.neighbour_context_len:
                    yield from _company_classes(batch, setup, in_graph)
                if batch.size and event.preparations > 1:
                    yield "prepared twice"
                if not in_graph and setup.eager_padding and event.mode is not ForwardMode.EXTEND:
                    yield "eager IDLE of padding" if batch.mode is ForwardMode.IDLE else "eager call padded"
                yield from _batch_classes(batch, setup, event)
                together = batch.size and setup.num_steps > 1 and setup.drive is Drive.MULTI_STEP
                mirrorless = f"no host mirror, {batch.mode.value} {'replay' if in_graph else 'eagerly'}"
                if together and event.mirror is Mirror.ABSENT and mirrorless in NO_MIRROR:
                    yield mirrorless
                several = batch.mode is ForwardMode.EXTEND and batch.size > 1
                if several and setup.inputs.strided and not scenario.optimizations:
                    yield PLAIN_PREFILL
                name = f"{'replay' if in_graph else 'eager'} {event.mode.value}"
                yield name
                if setup.num_steps > 1 and (batch.size or event.mode is ForwardMode.IDLE):
                    yield f"{name}, N > 1"
                if batch.mode is ForwardMode.DECODE:
                    yield from _segment_classes(batch, setup, in_graph)
                is_told = setup.drive is Drive.SINGLE_STEP or setup.layer is not None
                if batch.size and is_told and (batch.draft_steps or setup.num_steps) < setup.num_steps:
                    yield FEWER_STEPS[not in_graph]
                if in_graph and setup.num_steps > 1 and setup.layer is not None and setup.layer.slots_by_step:
                    yield SLOTS_BY_STEP
                if batch.size and setup.layer is not None and setup.layer.extra_rows:
                    yield f"rows behind the metadata, {'replay' if in_graph else 'eager'}"
                ran.append((event.mode, batch.size, in_graph))
                pages = {r.pool_row: tuple(r.pages) for r in world.running}
                calls.append(_Call(batch, bucket, tuple(pages[row] for row in batch.pool_rows)))
        held = set().union(*(r.pages for r in world.running))
        if held & freed:
            yield "page recycled"
        used_pages |= held
        used_rows |= {r.pool_row for r in world.running}
    yield from _sequence_classes(ran)
    yield from _pair_classes(calls, setup.page_size)
    if setup.paged_mqa_num_sms > 1:
        yield from _idle_classes(calls)


def _company_classes(batch: Batch, setup: Setup, in_graph: bool) -> Iterator[str]:
    """Classes of a call in between whose preparation and use a second backend prepares a batch."""
    if batch.size:
        yield COMPANY[1] if setup.neighbour_context_len == setup.max_context_len else COMPANY[0]
    if not in_graph:
        if batch.size or batch.mode is ForwardMode.IDLE:
            yield f"second backend, {batch.mode.value} eagerly"
    elif batch.size:
        yield f"second backend, {batch.mode.value} replay"
    elif batch.mode is ForwardMode.IDLE:
        yield IDLE_IN_COMPANY


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
    yield f"N {_few_or_many(setup.num_steps)}"
    yield f"nd {_few_or_many(setup.num_draft_tokens)}"
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
        if setup.layer.regime is Regime.RANDOM and setup.layer.kv_cache_dtype is KVCacheDtype.FP8:
            yield "ordinary numbers in an FP8 cache"
        if setup.layer.far_slots:
            yield "far slots"
        if setup.layer.num_heads > 1:
            yield "more heads than one"
        if setup.layer.num_heads >= MANY_HEADS and setup.layer.kv_cache_dtype is KVCacheDtype.FP8:
            yield "32 heads or more, FP8 cache"
        index = {"index_n_heads": setup.layer.index_n_heads, "index_head_dim": setup.layer.index_head_dim}
        if {**index, "page_size": setup.page_size} == PRODUCTION_INDEX_SIZES:
            yield PRODUCTION_INDEX
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
    if isinstance(event, Replay) and _in_another_order(batch):
        yield MIRROR_IN_ANOTHER_ORDER
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
    if batch.mode is ForwardMode.DRAFT_EXTEND and max(batch.accept_lengths) > 8:
        yield "draft extend over 8 tokens"
    if max(batch.seq_lens) > COPY_CHUNK:
        yield "several copy chunks"
    if sum(batch.seq_lens) > setup.num_slots:
        yield OVER_COMMITTED
    if min(batch.seq_lens) <= topk < max(batch.seq_lens):
        yield "K between the lengths"
    if batch.mode is ForwardMode.EXTEND:
        yield from _prefill_classes(batch, topk)


def _in_another_order(batch: Batch) -> bool:
    """Whether the host mirror has the right lengths, and those at both ends in their places, but not all of them."""
    lengths, mirror = batch.seq_lens, batch.seq_lens_cpu
    if mirror is None or mirror == lengths:
        return False
    return (mirror[0], mirror[-1]) == (lengths[0], lengths[-1]) and sorted(mirror) == sorted(lengths)


def _prefill_classes(batch: Batch, topk: int) -> Iterator[str]:
    whole = [new == length for new, length in zip(batch.extend_lens, batch.seq_lens, strict=True)]
    if not all(whole):
        yield "cached prefix extended"
    if any(whole):
        yield "prefill from the first token"
    if not any(batch.extend_lens):
        yield NO_NEW_TOKEN[1]
    if batch.size > 1:
        yield "prefill of several requests"
        if 0 in batch.extend_lens and any(batch.extend_lens):
            yield NO_NEW_TOKEN[0]
        some = [number for number, new in enumerate(batch.extend_lens) if new]
        if some and 0 in batch.extend_lens[some[0] : some[-1]]:
            yield NO_NEW_TOKEN[2]
        decodes = [new == 1 < length for new, length in zip(batch.extend_lens, batch.seq_lens, strict=True)]
        if any(decodes) and max(batch.extend_lens) > 1:
            yield MIXED
    if max(batch.seq_lens) > topk:
        yield "prefill beyond K"
    if min(batch.seq_lens) <= topk:
        yield "prefill within K"


def _segment_classes(batch: Batch, setup: Setup, in_graph: bool) -> Iterator[str]:
    """Classes of schedules whose work is not the same for all lengths, or for all steps of one call."""
    steps = setup.num_steps
    advancing = setup.step_semantics is StepSemantics.ADVANCING

    def crossed(size: int, most: int) -> bool:
        """Whether a row of the last step needs more units of ``size`` tokens than in the first one."""
        return any(min(n + 1, most) <= unit < min(n + steps, most) for n in batch.seq_lens for unit in _units(n, size))

    for name, parts, size, most in (
        ("paged-MQA segment", setup.paged_mqa_num_sms, MQA_SEGMENT, setup.max_context_len),
        ("FlashMLA block", setup.flashmla_num_sm_parts, FLASHMLA_BLOCK, setup.index_topk),
    ):
        if parts and advancing and crossed(size, most):
            yield f"steps cross a {name}"
            if steps >= MANY_STEPS:
                yield f"N >= {MANY_STEPS} steps cross a {name}"
    together = in_graph and steps >= MANY_STEPS and setup.drive is Drive.MULTI_STEP
    if together and setup.paged_mqa_num_sms > 1 and max(batch.seq_lens) > MQA_SEGMENT:
        yield f"N >= {MANY_STEPS} multi-step replay of several paged-MQA segments"


def _units(length: int, size: int) -> Sequence[int]:
    """The multiples of ``size`` that the next few tokens behind ``length`` may pass."""
    return range(-(-length // size) * size, length + 2 * size, size)


def _key_classes(batch: Batch, setup: Setup) -> Iterator[str]:
    if setup.max_context_len > WIDE:
        yield "rows of more than 16,384 tokens"
    if sum(batch.extend_lens) > MANY_NEW:
        yield LONG_PREFILL
    if max(batch.seq_lens) > setup.index_topk:
        yield "more keys than K"
    if min(batch.seq_lens) < setup.index_topk:
        yield "fewer keys than K"
    assert setup.layer is not None
    if min(max(batch.seq_lens), setup.index_topk) > MANY_KEYS and setup.layer.regime in (Regime.LATTICE, Regime.RANDOM):
        yield MANY_SUMMED
    if batch.mode is ForwardMode.DRAFT_EXTEND_V2 and min(batch.seq_lens) < setup.num_draft_tokens:
        yield "rows without a key"
        if setup.layer.padding_slot < 0:
            yield "rows of slot -1"


def _sequence_classes(ran: list[tuple[ForwardMode, int, bool]]) -> Iterator[str]:
    replays = [(mode, size) for mode, size, in_graph in ran if in_graph]
    for (mode, size), (next_mode, next_size) in pairwise(replays):
        if mode is not next_mode:
            yield "mode change"
        elif next_size < size:
            yield "small after large"
    served = [mode for mode, size in replays if size]
    if ForwardMode.TARGET_VERIFY in served and ForwardMode.DECODE in served[served.index(ForwardMode.TARGET_VERIFY) :]:
        yield "drafts behind a verification"
    for mode in GRAPH_MODES:
        sizes = [size for m, size in replays if m is mode]
        in_mode = [number for number, (m, _, in_graph) in enumerate(ran) if m is mode and in_graph]
        between = {m for a, b in pairwise(in_mode) for m, size, in_graph in ran[a + 1 : b] if size and not in_graph}
        if ForwardMode.EXTEND in between:
            yield "prefill between replays"
        if any(a < b > c for a, b, c in zip(sizes, sizes[1:], sizes[2:], strict=False)):
            yield "small, large, small"
    kinds = [in_graph for _, _, in_graph in ran]
    if any(a and not b and c for a, b, c in zip(kinds, kinds[1:], kinds[2:], strict=False)):
        yield "eager between replays"


def _idle_classes(calls: Sequence[_Call]) -> Iterator[str]:
    """Of graphs in which the schedule of padding alone differs from that of the call before."""
    longest: dict[int, int] = {}  # of the last batch of each DECODE graph
    for call in calls:
        if call.bucket is not None and call.batch.mode.is_decode_or_idle:
            if not call.batch.size and longest.get(call.bucket, 0) > MQA_SEGMENT:
                yield IDLE_AFTER_SEGMENTS
            longest[call.bucket] = max(call.batch.seq_lens, default=0)


def _pair_classes(calls: Sequence[_Call], page_size: int) -> Iterator[str]:
    last: dict[tuple[ForwardMode, int | None], _Call] = {}
    replayed: Counter[tuple[ForwardMode, int | None]] = Counter()
    for call in calls:
        before = last.get(call.kind)
        last[call.kind] = call
        if not call.batch.size:
            continue
        if call.bucket is not None:
            replayed[call.kind] += 1
            if replayed[call.kind] > MANY_REPLAYS:
                yield OFTEN_REPLAYED
        if before is None:
            continue
        now, then = call.batch, before.batch
        if call.bucket is not None and now.pool_rows == then.pool_rows:
            yield from _one_difference(call, before, page_size)
        if (now.seq_lens, now.accept_lengths) == (then.seq_lens, then.accept_lengths) and call.pages != before.pages:
            yield PAIRS[0]
            if call.bucket is None:
                yield PAIRS[1]
        lengths = dict(zip(then.pool_rows, then.seq_lens, strict=True))
        pages = dict(zip(then.pool_rows, before.pages, strict=True))
        for row, length, held in zip(now.pool_rows, now.seq_lens, call.pages, strict=True):
            if row in pages and length > lengths[row] and held[0] != pages[row][0]:
                yield "row grown on other pages"
        if call.bucket is None and max(now.seq_lens) < max(then.seq_lens, default=0):
            yield "eager after the longest left"
        if call.bucket is not None and now.size < then.size:
            yield "small after large in one bucket"
            if now.mode is ForwardMode.DRAFT_EXTEND and now.accept_lengths != then.accept_lengths[: now.size]:
                yield "smaller draft extend, other accepts"


def _one_difference(call: _Call, before: _Call, page_size: int) -> Iterator[str]:
    """Classes of two replays of one graph for the same requests."""
    lengths, lengths_before = call.batch.seq_lens, before.batch.seq_lens
    if lengths != lengths_before:
        if call.pages == before.pages and max(lengths) == max(lengths_before):
            yield ONE_DIFFERENCE[2]
        return
    same_accepts = call.batch.accept_lengths == before.batch.accept_lengths
    if call.batch.mode is ForwardMode.DRAFT_EXTEND and call.pages == before.pages and not same_accepts:
        yield ONE_DIFFERENCE[0]
    for now, then, length in zip(call.pages, before.pages, lengths, strict=True):
        last = -(-length // page_size) - 1
        if same_accepts and (now[0], now[last]) == (then[0], then[last]) and now[:last] != then[:last]:
            yield ONE_DIFFERENCE[1]


def _few_or_many(number: int) -> str:
    return "1" if number == 1 else "2..8" if number <= 8 else "over 8"
