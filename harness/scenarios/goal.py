"""The goal of a drawn case: what it is built to visit, as wants that do not contradict each other.

A want is one boundary class with what leads to it: allowed sizes, a situation, the length of the first request, the
mirror and the order of the first call, a switch. Everything that a goal leaves open is drawn at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nsa_oracle.reference.types import ForwardMode

SITUATION, LENGTH, MIRROR, ORDER, SWITCH = "situation", "first length", "mirror", "order", "switch"
NEIGHBOUR, PREPARATIONS, CACHE = "second backend", "preparations", "cache"
NOT_OF_THE_SETUP = (SITUATION, LENGTH, MIRROR, ORDER, SWITCH, NEIGHBOUR, PREPARATIONS, CACHE)
OWN = ("own",)  # the situation decides; wants of a value of their own go to other cases

Pins = Mapping[str, tuple[Any, ...]]
"""Allowed values by field of the setup, or by one of ``NOT_OF_THE_SETUP``."""


@dataclass(frozen=True)
class Want:
    """One class to visit. modes: which the subject must have, all of them."""

    name: str
    pins: Pins
    modes: tuple[ForwardMode, ...] = ()


@dataclass(frozen=True)
class Goal:
    """The wants of one case. names: the classes that it is built to visit."""

    names: tuple[str, ...] = ()
    pins: Pins = field(default_factory=dict)

    def of(self, name: str) -> tuple[Any, ...]:
        """The allowed values of ``name``; empty if any is."""
        return self.pins.get(name, ())

    def sizes(self) -> dict[str, tuple[Any, ...]]:
        """The pins of fields of the setup."""
        return {name: values for name, values in self.pins.items() if name not in NOT_OF_THE_SETUP}

    def joined(self, want: Want) -> Goal | None:
        """The goal with one more want, or None if they contradict each other."""
        pins = dict(self.pins)
        for name, values in want.pins.items():
            pins[name] = tuple(value for value in values if value in pins.get(name, values))
            if not pins[name]:
                return None
        return Goal((*self.names, want.name), pins)


ANYTHING = Goal()
