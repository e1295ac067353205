"""Describes a scenario in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nsa_oracle.harness.errors import one_line
from nsa_oracle.harness.scenarios.batch import Batch, choose_bucket
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
from nsa_oracle.harness.scenarios.setup import Layer, Mirror, Order, Reuse, Setup
from nsa_oracle.harness.scenarios.world import Request, World
from nsa_oracle.reference.types import ForwardMode, StepSemantics

MAX_NAMES = 1000  # characters of the names of optimisations
_REUSE = {
    Reuse.STACK: "",
    Reuse.QUEUE: ", those freed last reused last",
    Reuse.SHUFFLED: ", free rows and pages reused in any order",
}


def story(scenario: Scenario, failing_event: int | None = None) -> str:
    """The setup and one line per event, in words; the event at which the scenario fails is marked."""
    lines = [_setup(scenario)]
    for number, told in enumerate(told_events(scenario)):
        mark = "  <- fails here" if number == failing_event else ""
        lines.append(f"  {number}. {told.sentence}{mark}")
    return "\n".join(lines)


@dataclass(frozen=True)
class ToldEvent:
    """An event in words. batch: of a replay or eager call. running: the requests behind it. bucket: that a replay
    uses, or None.
    """

    event: Event
    sentence: str
    batch: Batch | None
    running: tuple[Request, ...]
    bucket: int | None = None


def told_events(scenario: Scenario) -> Iterator[ToldEvent]:
    """Plays the events, and tells each. A request is one object as long as it runs."""
    world = World(scenario, poison=0)
    captured: dict[ForwardMode, set[int]] = {}
    for event in scenario.events:
        batch = world.apply(event)
        if isinstance(event, Capture):
            captured.setdefault(event.mode, set()).update(event.buckets)
        bucket = None
        if isinstance(event, Replay) and batch is not None:
            bucket = choose_bucket(event.bucket, batch.size, captured.get(event.mode, set()))
        yield ToldEvent(event, _event(event, batch, world, captured), batch, tuple(world.running), bucket)


def _setup(scenario: Scenario) -> str:
    setup = scenario.setup
    advancing = setup.step_semantics is StepSemantics.ADVANCING
    steps = "each seeing one token more than the last" if advancing else "all seeing the same metadata"
    inputs = setup.inputs
    kinds = {
        "strided": inputs.strided,
        "a wide req_to_token": inputs.wide_req_to_token,
        "a req_to_token of far rows": inputs.far_req_to_token,
    }
    views = [kind for kind, used in kinds.items() if used]
    return "\n".join(
        (
            f"A backend of {_count(setup.num_steps, 'draft step')} ({steps}) and "
            f"{_count(setup.num_draft_tokens, 'draft token')}, driven by its "
            f"{setup.drive.value.replace('_', '-')} methods;",
            f"page size {setup.page_size}, page tables {setup.max_context_len} wide, top-k {setup.index_topk}"
            f"{_schedules(setup)};",
            f"a pool of {_count(setup.pool_size, 'row')}, pages {setup.page_layout.value}{_REUSE[setup.reuse]}; inputs "
            f"{inputs.seq_lens.value} lengths, {inputs.req_pool_indices.value} indices, "
            f"{inputs.accept_length.value} accepts{''.join(', ' + view for view in views)};",
            *([] if setup.layer is None else [_layer(setup.layer)]),
            *([] if not setup.neighbour_context_len else [_neighbour(setup)]),
            *(["padding of length 0;"] if setup.padding_len == 0 else []),
            *([f"{_count(setup.eager_padding, 'request')} of padding in eager calls;"] if setup.eager_padding else []),
            *([f"a cache of {_count(setup.cache_pages, 'page')} for all requests;"] if setup.cache_pages else []),
            f"optimisations: {one_line(', '.join(scenario.optimizations), MAX_NAMES) or 'none'}; seed {scenario.seed}.",
        )
    )


def _neighbour(setup: Setup) -> str:
    return f"a second backend, of page tables {setup.neighbour_context_len} wide, prepares batches in between;"


def _preparations(event: Replay | Eager) -> str:
    some = "" if event.draft_steps is None else f", {_count(event.draft_steps, 'draft step')} of it"
    return some + ("" if event.preparations == 1 else f", prepared {event.preparations} times")


def _layer(layer: Layer) -> str:
    far = ", its slots far apart" if layer.far_slots else ""
    padding = ", slot -1 for rows without a token" if layer.padding_slot < 0 else ""
    if layer.extra_rows:
        padding += f", {_count(layer.extra_rows, 'row')} of each pass behind those of the metadata"
    if layer.slots_by_step:
        padding += ", the slots of all steps in one tensor"
    return (
        f"an attention layer of {_count(layer.num_heads, 'head')} of {layer.kv_lora_rank} + {layer.qk_rope_head_dim} "
        f"and {_count(layer.index_n_heads, 'index head')} of {layer.index_head_dim}, {layer.kv_cache_dtype.value} cache"
        f"{far}, {layer.regime.value} content{padding};"
    )


def _schedules(setup: Setup) -> str:
    text = ""
    if setup.paged_mqa_num_sms:
        text += f", paged-MQA schedule over {_count(setup.paged_mqa_num_sms, 'SM')}"
    if setup.flashmla_num_sm_parts:
        text += f", FlashMLA schedule over {_count(setup.flashmla_num_sm_parts, 'part')}"
    return text


def _event(event: Event, batch: Batch | None, world: World, captured: Mapping[ForwardMode, set[int]]) -> str:
    match event:
        case Capture():
            return f"Capture {event.mode.value} graphs, buckets {_listed(event.buckets)}."
        case Join():
            prefix = "" if event.prefix_of is None else f", sharing up to {_count(event.prefix_pages, 'prefix page')}"
            if event.pool_row is not None:
                prefix += f", on pool row {event.pool_row}"
            if event.pages:
                prefix += f", on pages {_listed(event.pages)}"
            if event.count > 1:
                return (
                    f"{event.count} requests of {event.seq_len}, {event.seq_len + 1}, ... tokens join{prefix}; "
                    f"{len(world.running)} running."
                )
            return f"A request of {_count(event.seq_len, 'token')} joins{prefix}; {len(world.running)} running."
        case Finish():
            text = f"Request {event.request} finishes"
            if event.count > 1:
                text = f"Up to {event.count} requests finish, from number {event.request} on"
            return f"{text}; {len(world.running)} running."
        case Accept():
            lengths = [request.seq_len for request in world.running]
            accepted = [request.accept_length for request in world.running]
            return f"Verification accepts {_listed(accepted)} tokens; lengths are now {_listed(lengths)}."
        case SetLengths():
            return (
                f"Requests on pool rows {_listed(event.pool_rows)} have {_listed(event.seq_lens)} tokens now, "
                f"accepted {_listed(event.accept_lengths)}."
            )
        case Remap():
            return f"Request {event.request} gets its first pages re-mapped to those of request {event.prefix_of}."
        case Replay():
            times = "" if event.times == 1 else f", {event.times} times"
            times += _preparations(event)
            assert batch is not None
            bucket = choose_bucket(event.bucket, batch.size, captured.get(event.mode, set()))
            where = "no bucket fits, so eagerly" if bucket is None else f"bucket {bucket}"
            if event.bucket not in (None, bucket):
                is_known = event.bucket in captured.get(event.mode, set())
                where += f", since {event.bucket} {'is too small' if is_known else 'was not captured'}"
            return f"Replay {event.mode.value} ({where}){times}: {_batch(batch, event.mirror, event.order)}."
        case Eager():
            return f"Eager {event.mode.value}{_preparations(event)}: {_batch(batch, event.mirror, event.order)}."


def _batch(batch: Batch | None, mirror: Mirror, order: Order) -> str:
    assert batch is not None
    if not batch.size:
        return "an empty batch"
    text = f"lengths {_listed(batch.seq_lens)}, pool rows {_listed(batch.pool_rows)}"
    if batch.mode is ForwardMode.DRAFT_EXTEND:
        text += f", accepted {_listed(batch.accept_lengths)}"
    if batch.extend_lens:
        text += f", new tokens {_listed(batch.extend_lens)}"
    if mirror in (Mirror.STALE, Mirror.AHEAD) and batch.seq_lens_cpu is not None:
        text += f", host mirror {mirror.value} at {_listed(batch.seq_lens_cpu)}"
    if mirror is Mirror.ABSENT:
        text += ", no host mirror"
    return text + ("" if order is Order.JOINED else f", order {order.value}")


def _listed(numbers: Sequence[int], most: int = 12) -> str:
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return (" ".join(map(str, numbers[:most])) or "no") + more


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
