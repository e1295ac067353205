"""Simplifies the record of a failing scenario, after Hypothesis has shrunk the choices that generated it.

Hypothesis cannot drop an event if later choices depend on its choices. In the finished record nothing depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Event, Finish, Join, Replay, Scenario, SetLengths
from nsa_oracle.harness.scenarios.setup import Inputs, Layer, Mirror, Order, Setup

SIMPLEST_SETUP: dict[str, Any] = {
    "paged_mqa_num_sms": 0,
    "flashmla_num_sm_parts": 0,
    "num_steps": 1,
    "num_draft_tokens": 1,
    "page_size": 1,
    **{name: Setup.model_fields[name].default for name in ("step_semantics", "page_layout", "reuse", "drive")},
    "inputs": Inputs(),
    "layer": None,
    "neighbour_context_len": 0,
    "padding_len": 1,
    "cache_pages": 0,
    "eager_padding": 0,
}
SMALLEST_LAYER = Layer()
SIMPLEST_LAYER: dict[str, Any] = {
    "far_slots": False,
    "padding_slot": 0,
    "extra_rows": 0,
    "slots_by_step": False,
    "regime": SMALLEST_LAYER.regime,
    "kv_cache_dtype": SMALLEST_LAYER.kv_cache_dtype,
}
MOST_TRIALS = 400
MOST_TRIALS_OF_A_HANG = 8  # each may take the whole time limit of a case
MANY_EVENTS = 64  # more than cases are drawn with


def simplify(scenario: Scenario, still_fails: Callable[[Scenario], bool], most_trials: int = MOST_TRIALS) -> Scenario:
    """The scenario after every simplification under which it ``still_fails``, with at most ``most_trials`` trials.

    Cycles through the simplifications and always continues behind the last one tried: one that did not help rarely
    helps later, so it is tried again only after all others.
    """
    changes, place, since = list(_changes(scenario)), 0, 0
    tried = {scenario}
    while since < len(changes):  # until no change of a whole cycle has helped
        place %= len(changes)
        candidate = _changed(scenario, changes[place])
        place, since = place + 1, since + 1
        if candidate is None or candidate in tried:
            continue
        if len(tried) > most_trials:
            break
        tried.add(candidate)
        if still_fails(candidate):
            scenario, changes = candidate, list(_changes(candidate))
            place, since = place - 1, 0  # the next change of its kind now has its index
    return scenario


def _changed(scenario: Scenario, changes: dict[str, Any]) -> Scenario | None:
    try:
        return Scenario.model_validate({**dict(scenario), **changes})
    except ValidationError:
        return None


def _changes(scenario: Scenario) -> Iterator[dict[str, Any]]:
    yield from _simpler_layers(scenario.setup)  # first, since it makes all later trials cheaper
    events = scenario.events
    yield from _shorter(events)
    for number in reversed(range(len(events))):
        yield {"events": events[:number] + events[number + 1 :]}
    for number, event in enumerate(events):
        for simpler in _simpler_events(event):
            yield {"events": (*events[:number], simpler, *events[number + 1 :])}
    for name in scenario.optimizations:
        yield {"optimizations": tuple(other for other in scenario.optimizations if other != name)}
    for name, value in SIMPLEST_SETUP.items():
        yield {"setup": scenario.setup.model_copy(update={name: value})}
    for name, field in Inputs.model_fields.items():  # one by one, for failures that need some of them
        inputs = scenario.setup.inputs.model_copy(update={name: field.default})
        yield {"setup": scenario.setup.model_copy(update={"inputs": inputs})}
    yield {"seed": 0}


def _shorter(events: tuple[Event, ...]) -> Iterator[dict[str, Any]]:
    """The events without a stretch of them: first halves, then smaller ones. Only for records of servers."""
    size = len(events) // 2 if len(events) > MANY_EVENTS else 0
    while size > 1:
        for start in reversed(range(0, len(events), size)):
            yield {"events": events[:start] + events[start + size :]}
        size //= 2


def _simpler_layers(setup: Setup) -> Iterator[dict[str, Any]]:
    layer = setup.layer
    if layer is None:
        return
    kept = {name: getattr(layer, name) for name in SIMPLEST_LAYER}
    for candidate in (
        SMALLEST_LAYER.model_copy(update={**kept, "num_heads": 1, "index_n_heads": 1}),
        SMALLEST_LAYER.model_copy(update={**kept, "num_heads": min(layer.num_heads, 16)}),
        layer.model_copy(update={"num_heads": 1}),
        layer.model_copy(update={"num_heads": max(1, layer.num_heads // 2)}),
        layer.model_copy(update={"index_n_heads": 1}),
        *(layer.model_copy(update={name: value}) for name, value in SIMPLEST_LAYER.items()),
    ):
        if _size(candidate) <= _size(layer):
            yield {"setup": setup.model_copy(update={"layer": candidate})}


def _size(layer: Layer) -> int:
    return layer.num_heads * layer.kv_lora_rank + layer.index_n_heads * layer.index_head_dim


def _simpler_events(event: object) -> Iterator[object]:
    if isinstance(event, Capture) and len(event.buckets) > 1:
        for bucket in event.buckets:
            yield event.model_copy(update={"buckets": tuple(other for other in event.buckets if other != bucket)})
    if isinstance(event, Join):
        yield from _with(event, {"count": 1}, {"count": (event.count + 1) // 2}, {"prefix_of": None})
        yield from _with(event, {"pages": ()}, {"pool_row": None})
    if isinstance(event, Finish):
        yield from _with(event, {"count": 1}, {"count": (event.count + 1) // 2}, {"request": 0})
    if isinstance(event, SetLengths):
        yield from _fewer_set(event)
    if isinstance(event, Replay | Eager):
        yield from _with(event, {"preparations": 1}, {"draft_steps": None})
    if isinstance(event, Replay):
        yield from _with(event, {"times": 1}, {"bucket": None}, {"mirror": Mirror.EQUAL}, {"order": Order.JOINED})
    if isinstance(event, Replay | Eager):
        yield from _with(event, {"pool_rows": ()}, {"mirror": Mirror.EQUAL, "seq_lens_cpu": ()}, {"seq_lens_cpu": ()})


def _with(event: BaseModel, *changes: dict[str, Any]) -> Iterator[object]:
    for change in changes:
        yield event.model_copy(update=change)


def _fewer_set(event: SetLengths) -> Iterator[SetLengths]:
    """The event without each of its requests."""
    for left_out in range(len(event.pool_rows) if len(event.pool_rows) > 1 else 0):
        numbers = {
            name: tuple(number for place, number in enumerate(getattr(event, name)) if place != left_out)
            for name in ("pool_rows", "seq_lens", "accept_lengths")
        }
        yield event.model_copy(update=numbers)
