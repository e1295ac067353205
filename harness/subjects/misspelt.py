"""Finds declarations of a backend under a misspelt name, which would be ignored silently."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nsa_oracle.harness.errors import meant
from nsa_oracle.harness.fields import FIELDS
from nsa_oracle.harness.scenarios.batch import Padding
from nsa_oracle.harness.scenarios.limits import BACKEND_FIELDS
from nsa_oracle.harness.scenarios.setup import Mirror
from nsa_oracle.harness.subjects.declarations import ANY_MODE, STEP_COUNTS, OwnField, Waiver
from nsa_oracle.reference.types import ForwardMode

_CUTOFF = 0.8
_MODES = {mode.value for mode in ForwardMode}
_FIELDS = {field.name for field in FIELDS}


def misspelt_declaration(owner: object) -> str:
    """A line on an attribute of ``owner`` that was probably meant as a declaration, or "".

    Its name must be like that of a declaration that is not there, or that a base class alone has, and its value must
    have the form of that one: a backend may have attributes of its own.
    """
    owners = inspect.getmro(owner) if isinstance(owner, type) else (owner, *inspect.getmro(type(owner)))
    known = set[str]()
    for one in owners:
        attributes = getattr(one, "__dict__", {})
        known |= set(attributes)
        for name, value in attributes.items():
            near = meant(name, _FORMS, _CUTOFF)
            if near and near not in known and name not in _FORMS and _FORMS[near](value):
                return f"it has {name}: did you mean {near}?"
    return ""


def _lists(value: Any, of: Callable[[Any], bool]) -> bool:
    return (
        isinstance(value, Sequence | set | frozenset)
        and not isinstance(value, str)
        and bool(value)
        and all(map(of, value))
    )


def _maps(value: Any, key: Callable[[Any], bool], to: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(key(k) and to(v) for k, v in value.items())


def _is_mode(value: Any) -> bool:
    return isinstance(value, ForwardMode) or (isinstance(value, str) and value in _MODES)


def _are_fields_by_mode(value: Any) -> bool:
    return _maps(value, lambda k: k == ANY_MODE or _is_mode(k), lambda v: _lists(v, _FIELDS.__contains__))


def _are_mirrors(value: Any) -> bool:
    states = {mirror.value for mirror in Mirror}
    return _maps(value, lambda k: k in ("graph", "eager") or _is_mode(k), lambda v: _lists(v, states.__contains__))


def _is_or_lists(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind) or _lists(value, lambda one: isinstance(one, kind))


_FORMS: dict[str, Callable[[Any], bool]] = {
    "sizes": lambda value: _maps(value, BACKEND_FIELDS.__contains__, lambda v: True),
    "modes": lambda value: _lists(value, _is_mode),
    "mirrors": _are_mirrors,
    "roles": lambda value: _maps(value, lambda k: isinstance(k, str), lambda v: _lists(v, _is_mode)),
    "step_backends": lambda value: isinstance(value, str) and value in STEP_COUNTS,
    "padding": lambda value: _maps(value, _is_mode, lambda v: isinstance(v, Padding)),
    "absent": _are_fields_by_mode,
    "unjudged": _are_fields_by_mode,
    "own_fields": _is_or_lists(OwnField),
    "waivers": _is_or_lists(Waiver),
}
