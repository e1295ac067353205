"""Declared limits of a backend or a layer: allowed sizes and forward modes. Nothing outside them is judged."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from nsa_oracle.harness.errors import meant, one_line
from nsa_oracle.harness.scenarios.batch import Batch, choose_bucket
from nsa_oracle.harness.scenarios.complaints import complaint_about_value
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Event, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Inputs, Layer, Mirror, Setup
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.reference.types import ForwardMode

Sizes = Mapping[str, Sequence[Any]]
"""Allowed values by name of a field of ``Setup``, ``Inputs`` or ``Layer``."""

BACKEND_FIELDS: dict[str, FieldInfo] = {
    **{
        name: info
        for name, info in Setup.model_fields.items()
        if name not in ("inputs", "layer", "neighbour_context_len", "cache_pages")
    },
    **Inputs.model_fields,
}
LAYER_FIELDS: dict[str, FieldInfo] = {**BACKEND_FIELDS, **Layer.model_fields}


@dataclass(frozen=True)
class Limits:
    """Allowed values by field, and allowed modes of captures, replays and eager calls.

    A field that ``sizes`` does not name may have any value. mirrors: allowed states of the host mirror, by mode, or
    else by "graph" and "eager"; any state where nothing is named. empty_batches: whether eager calls without a request
    are allowed. empty_replays: whether replays are in which every request pads the batch. empty_chunks: whether a
    request may take part in EXTEND without a new token. fewer_steps: whether a call may run some of the draft steps.
    """

    sizes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    modes: tuple[ForwardMode, ...] = tuple(ForwardMode)
    mirrors: Mapping[str, tuple[Mirror, ...]] = field(default_factory=dict)
    empty_batches: bool = True
    empty_replays: bool = True
    empty_chunks: bool = True
    fewer_steps: bool = True

    def of(self, name: str, choices: Iterable[Any]) -> tuple[Any, ...]:
        """The elements of ``choices`` that are allowed for the field ``name``."""
        allowed = self.sizes.get(name)
        return tuple(choice for choice in choices if allowed is None or choice in allowed)

    def __and__(self, other: Limits) -> Limits:
        """Limits that allow what both operands allow."""
        sizes = {**self.sizes, **{name: self.of(name, values) for name, values in other.sizes.items()}}
        modes = tuple(mode for mode in self.modes if mode in other.modes)
        return Limits(
            sizes,
            modes,
            {**self.mirrors, **other.mirrors},
            self.empty_batches and other.empty_batches,
            self.empty_replays and other.empty_replays,
            self.empty_chunks and other.empty_chunks,
            self.fewer_steps and other.fewer_steps,
        )

    def allowed_mirrors(self, call: EngineCall) -> tuple[Mirror, ...]:
        """The states that the host mirror may have in ``call``."""
        kind = "graph" if call.in_graph else "eager"
        return self.mirrors.get(call.batch.mode.value) or self.mirrors.get(kind) or tuple(Mirror)

    @property
    def restrict_calls(self) -> bool:
        """Whether a call may be refused for anything but the setup."""
        allows_all = self.empty_batches and self.empty_replays and self.empty_chunks and self.fewer_steps
        return bool(self.mirrors) or not allows_all or self.modes != tuple(ForwardMode)

    def refused(self, call: EngineCall) -> str | None:
        """What is not allowed in ``call``, or None."""
        if call.batch.mode not in self.modes:
            return f"mode {call.batch.mode.value}"
        if not call.size and not (self.empty_replays if call.in_graph else self.empty_batches):
            return "an empty batch"
        if 0 in call.batch.extend_lens and not self.empty_chunks:
            return "a request without a new token"
        if call.batch.draft_steps is not None and not self.fewer_steps:
            return "a call of some draft steps"
        if call.event.mirror not in self.allowed_mirrors(call):
            return f"mirror {call.event.mirror.value}"
        return None

    def misfit(self, scenario: Scenario) -> str | None:
        """The first thing in ``scenario`` that is not allowed, such as "page_size 1", or None.

        Limits on layer sizes do not apply to a scenario without a layer.
        """
        setup = scenario.setup
        known = {**dict(setup), **dict(setup.inputs), **dict(setup.layer or ())}
        for name, allowed in self.sizes.items():
            if name in known and known[name] not in allowed:
                return f"{name} {shown(known[name])}"
        if not self.restrict_calls:
            return None
        for event, calls in calls_of(scenario):
            if isinstance(event, Capture) and event.mode not in self.modes:
                return f"mode {event.mode.value}"
            for call in calls:
                if (refusal := self.refused(call)) is not None:
                    return refusal
        return None

    def excluded(self, drawn: Mapping[str, Sequence[Any]]) -> list[str]:
        """The values among those ``drawn`` and the modes that are not allowed, such as "page_size 1, 16"."""
        lines = []
        for name, choices in drawn.items():
            if refused := [shown(choice) for choice in choices if choice not in self.of(name, choices)]:
                lines.append(f"{name} {', '.join(refused)}")
        if refused := [mode.value for mode in ForwardMode if mode not in self.modes]:
            lines.append(f"modes {', '.join(refused)}")
        for where, mirrors in self.mirrors.items():
            if refused := [mirror.value for mirror in Mirror if mirror not in mirrors]:
                lines.append(f"mirror {', '.join(refused)} ({where})")
        empty = {
            "empty batches": self.empty_batches,
            "replays without a request": self.empty_replays,
            "EXTEND of a request without a new token": self.empty_chunks,
            "calls of some draft steps": self.fewer_steps,
        }
        return [*lines, *(what for what, is_allowed in empty.items() if not is_allowed)]


EVERYTHING = Limits()


@dataclass(frozen=True)
class EngineCall:
    """One replay (``in_graph``) or eager call that an engine makes for ``event``, with its batch before padding.

    padding: requests that pad the batch of an eager call.
    """

    event: Replay | Eager
    batch: Batch
    in_graph: bool
    padding: int = 0

    @property
    def size(self) -> int:
        """Requests of an eager call, padding included."""
        return self.batch.size + self.padding


def calls_of(scenario: Scenario) -> Iterator[tuple[Event, tuple[EngineCall, ...]]]:
    """Yields each event, and the call that it makes, if it makes one."""
    world, captured = World(scenario, poison=0), set[tuple[ForwardMode, int]]()
    for event in scenario.events:
        batch = world.apply(event)
        if isinstance(event, Capture):
            captured |= {(event.mode, bucket) for bucket in event.buckets}
        if batch is None or not isinstance(event, Replay | Eager):
            yield event, ()
            continue
        in_graph = False
        if isinstance(event, Replay):
            fitting = [bucket for mode, bucket in captured if mode is event.mode]
            in_graph = choose_bucket(event.bucket, batch.size, fitting) is not None
        padding = 0 if in_graph or batch.mode is ForwardMode.EXTEND else scenario.setup.eager_padding
        yield event, (EngineCall(event, batch, in_graph, padding),)


def modes_of(scenario: Scenario) -> list[ForwardMode]:
    """The modes of a scenario's captures, replays and eager calls, in order. An empty DECODE batch counts as IDLE."""
    modes = []
    for event, calls in calls_of(scenario):
        modes += [event.mode] if isinstance(event, Capture) else [call.batch.mode for call in calls]
    return modes


def within(scenario: Scenario, limits: Limits) -> Scenario:
    """``scenario`` with allowed mirrors, and without the captures and calls that ``limits`` does not allow."""
    if not limits.restrict_calls:
        return scenario
    kept = scenario.model_copy(update={"events": ()})
    for event in scenario.events:
        for allowed in _variants(event, limits):
            more = kept.model_copy(update={"events": (*kept.events, allowed)})
            if limits.misfit(more) is None:
                kept = more
                break
    return kept


def _variants(event: Event, limits: Limits) -> list[Event]:
    """The event, and the same with each other mirror."""
    if not isinstance(event, Replay | Eager) or not limits.mirrors:
        return [event]
    return [event, *(event.model_copy(update={"mirror": mirror}) for mirror in Mirror if mirror is not event.mirror)]


def shown(value: object) -> str:
    """A field's value as text; of a member of an enum, its value."""
    return str(value.value if isinstance(value, enum.Enum) else value)


def declared(owner: object, fields: Mapping[str, FieldInfo], no_owner: str) -> Limits:
    """The limits that ``owner`` declares in its attributes ``sizes``, ``modes``, ``mirrors``, ``empty_batches``,
    ``empty_replays``, ``empty_chunks`` and ``fewer_steps``. All are optional.

    fields: the fields that ``sizes`` may name. no_owner: subject of the message about any other field, such as "no
    backend". Raises ValueError, in one line that names the cause and the remedy, if the declaration is malformed.
    """
    sizes, modes = getattr(owner, "sizes", None), getattr(owner, "modes", None)
    return Limits(
        {} if sizes is None else _checked_sizes(sizes, fields, no_owner),
        tuple(ForwardMode) if modes is None else _checked_modes(modes),
        _checked_mirrors(getattr(owner, "mirrors", {})),
        bool(getattr(owner, "empty_batches", True)),
        bool(getattr(owner, "empty_replays", True)),
        bool(getattr(owner, "empty_chunks", True)),
        bool(getattr(owner, "fewer_steps", True)),
    )


def _checked_sizes(sizes: object, fields: Mapping[str, FieldInfo], no_owner: str) -> dict[str, tuple[Any, ...]]:
    if not isinstance(sizes, Mapping):
        raise ValueError(
            f"sizes must map fields to allowed values, as {{'page_size': (64,)}} does; it is {_kind(sizes)}"
        )
    for name in sizes:
        if name in ("inputs", "layer"):
            raise ValueError(f"sizes: name the fields of '{name}' themselves, not '{name}'")
        if name not in fields:
            near = meant(name, fields) if isinstance(name, str) else ""
            mend = f"did you mean {near}?" if near else f"choose from {', '.join(fields)}"
            raise ValueError(f"sizes: {no_owner} has '{_brief(name)}'; {mend}")
    return {name: _checked_values(name, values, fields[name]) for name, values in sizes.items()}


def _checked_values(name: str, values: object, info: FieldInfo) -> tuple[Any, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise ValueError(f"sizes: '{name}' must have a list or tuple of allowed values, not {_brief(values)}")
    if not values:
        raise ValueError(f"sizes: '{name}' allows no value at all")
    return tuple(_checked_value(name, value, info) for value in values)


def _checked_value(name: str, value: object, info: FieldInfo) -> Any:
    kind: Any = info.annotation
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if value in list(kind):
            return value
        named = {member.value: member for member in kind}
        if isinstance(value, str) and value in named:
            return named[value]
        raise ValueError(f"sizes: '{name}' cannot be {_brief(value)}; choose from {', '.join(named)}")
    checked: TypeAdapter[Any] = TypeAdapter(Annotated[(kind, *info.metadata)] if info.metadata else kind)
    try:
        return checked.validate_python(value, strict=True)
    except ValidationError as error:
        raise ValueError(f"sizes: '{name}' cannot be {_brief(value)}: it {complaint_about_value(error)}") from None


def _checked_modes(modes: object) -> tuple[ForwardMode, ...]:
    known = {mode.value: mode for mode in ForwardMode}
    if not isinstance(modes, Sequence | set | frozenset) or isinstance(modes, str | bytes):
        raise ValueError(f"modes must be a list or tuple of modes, not {_brief(modes)}")
    for mode in modes:
        if not isinstance(mode, ForwardMode) and not (isinstance(mode, str) and mode in known):
            near = meant(mode, known) if isinstance(mode, str) else ""
            mend = f"did you mean {near}?" if near else f"choose from {', '.join(known)}"
            raise ValueError(f"modes: there is no {_brief(mode)}; {mend}")
    if not modes:
        raise ValueError("modes allows no mode at all")
    return tuple(mode for mode in ForwardMode if mode in modes or mode.value in modes)


def _checked_mirrors(mirrors: object) -> dict[str, tuple[Mirror, ...]]:
    if not isinstance(mirrors, Mapping):
        raise ValueError(f"mirrors must map modes, 'graph' or 'eager' to states of the mirror; it is {_kind(mirrors)}")
    known = {mirror.value: mirror for mirror in Mirror}
    places = ("graph", "eager", *(mode.value for mode in ForwardMode))
    for place, states in mirrors.items():
        if place not in places:
            raise ValueError(f"mirrors: there is no '{_brief(place)}'; choose from {', '.join(places)}")
        if isinstance(states, str) or not isinstance(states, Sequence) or not states or set(states) - set(known):
            raise ValueError(f"mirrors: '{place}' must list some of {', '.join(known)}, not {_brief(states)}")
    return {str(place): tuple(known[state] for state in states) for place, states in mirrors.items()}


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"


def _brief(value: object) -> str:
    return one_line(value if isinstance(value, str) else repr(value), 60)
