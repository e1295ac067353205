"""Declared limits of a backend or a layer: allowed sizes and forward modes. Nothing outside them is judged."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from nsa_oracle.harness.errors import meant, one_line
from nsa_oracle.harness.scenarios.complaints import complaint_about_value
from nsa_oracle.harness.scenarios.scenario import Capture, Inputs, Layer, Scenario, Setup
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.reference.types import ForwardMode

Sizes = Mapping[str, Sequence[Any]]
"""Allowed values by name of a field of ``Setup``, ``Inputs`` or ``Layer``."""

BACKEND_FIELDS: dict[str, FieldInfo] = {
    **{name: info for name, info in Setup.model_fields.items() if name not in ("inputs", "layer")},
    **Inputs.model_fields,
}
LAYER_FIELDS: dict[str, FieldInfo] = {**BACKEND_FIELDS, **Layer.model_fields}


@dataclass(frozen=True)
class Limits:
    """Allowed values by field, and allowed modes of captures, replays and eager calls.

    A field that ``sizes`` does not name may have any value.
    """

    sizes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    modes: tuple[ForwardMode, ...] = tuple(ForwardMode)

    def of(self, name: str, choices: Iterable[Any]) -> tuple[Any, ...]:
        """The elements of ``choices`` that are allowed for the field ``name``."""
        allowed = self.sizes.get(name)
        return tuple(choice for choice in choices if allowed is None or choice in allowed)

    def __and__(self, other: Limits) -> Limits:
        """Limits that allow what both operands allow."""
        sizes = {**self.sizes, **{name: self.of(name, values) for name, values in other.sizes.items()}}
        return Limits(sizes, tuple(mode for mode in self.modes if mode in other.modes))

    def misfit(self, scenario: Scenario) -> str | None:
        """The first thing in ``scenario`` that is not allowed, such as "page_size 1", or None.

        Limits on layer sizes do not apply to a scenario without a layer.
        """
        setup = scenario.setup
        known = {**dict(setup), **dict(setup.inputs), **dict(setup.layer or ())}
        for name, allowed in self.sizes.items():
            if name in known and known[name] not in allowed:
                return f"{name} {shown(known[name])}"
        modes = () if self.modes == tuple(ForwardMode) else modes_of(scenario)
        return next((f"mode {mode.value}" for mode in modes if mode not in self.modes), None)

    def excluded(self, drawn: Mapping[str, Sequence[Any]]) -> list[str]:
        """The values among those ``drawn`` and the modes that are not allowed, such as "page_size 1, 16"."""
        lines = []
        for name, choices in drawn.items():
            if refused := [shown(choice) for choice in choices if choice not in self.of(name, choices)]:
                lines.append(f"{name} {', '.join(refused)}")
        if refused := [mode.value for mode in ForwardMode if mode not in self.modes]:
            lines.append(f"modes {', '.join(refused)}")
        return lines


EVERYTHING = Limits()


def modes_of(scenario: Scenario) -> list[ForwardMode]:
    """The modes of a scenario's captures, replays and eager calls, in order. An empty DECODE batch counts as IDLE."""
    world = World(scenario, poison=0)
    modes = []
    for event in scenario.events:
        batch = world.apply(event)
        if isinstance(event, Capture):
            modes.append(event.mode)
        if batch is not None:
            modes.append(batch.mode)
    return modes


def within(scenario: Scenario, limits: Limits) -> Scenario:
    """``scenario`` without the captures and calls whose modes ``limits`` does not allow."""
    if limits.modes == tuple(ForwardMode):
        return scenario
    kept = scenario.model_copy(update={"events": ()})
    for event in scenario.events:
        more = kept.model_copy(update={"events": (*kept.events, event)})
        if set(modes_of(more)) <= set(limits.modes):
            kept = more
    return kept


def shown(value: object) -> str:
    """A field's value as text; of a member of an enum, its value."""
    return str(value.value if isinstance(value, enum.Enum) else value)


def declared(owner: object, fields: Mapping[str, FieldInfo], no_owner: str) -> Limits:
    """The limits that ``owner`` declares in its attributes ``sizes`` and ``modes``. Both are optional.

    fields: the fields that ``sizes`` may name. no_owner: subject of the message about any other field, such as "no
    backend". Raises ValueError, in one line that names the cause and the remedy, if the declaration is malformed.
    """
    sizes, modes = getattr(owner, "sizes", None), getattr(owner, "modes", None)
    return Limits(
        {} if sizes is None else _checked_sizes(sizes, fields, no_owner),
        tuple(ForwardMode) if modes is None else _checked_modes(modes),
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


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"


def _brief(value: object) -> str:
    return one_line(value if isinstance(value, str) else repr(value), 60)
