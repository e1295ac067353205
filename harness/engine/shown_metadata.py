"""The metadata that a backend shows to attention, or a finding that says why it cannot be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nsa_oracle.harness import fields
from nsa_oracle.harness.errors import meant
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.subjects.declarations import Declarations
from nsa_oracle.harness.subjects.names import BuiltBackend, attn_backends_of
from nsa_oracle.harness.subjects.result_checks import WrongResult, described, unreadable_field
from nsa_oracle.reference.types import ForwardMode, Metadata

_REQUIRED = [field.name for field in dataclasses.fields(Metadata) if field.default is dataclasses.MISSING]
_FIELDS = "an object with the fields of Metadata (nsa_oracle.reference.types)"


def steps_of(backend: BuiltBackend, count: int) -> Sequence[object]:
    """The single-step backends of ``backend``; itself, if it is one. Raises WrongResult unless there are ``count``."""
    steps = attn_backends_of(backend)
    steps = (backend,) if steps is None else steps
    if len(steps) != count:
        got, expected = (f"{number} step{'' if number == 1 else 's'}" for number in (len(steps), count))
        raise WrongResult(Finding(Kind.SHAPE, "attn_backends", got, expected, place=f"of {type(backend).__name__}"))
    return steps


def shown_metadata(
    backend: BuiltBackend,
    steps: Sequence[object],
    after: str,
    declarations: Declarations,
    mode: ForwardMode,
    device: torch.device,
) -> list[Metadata]:
    """The metadata that each of ``steps`` exposes, the first of ``backend``, ``after`` the method of that name.

    Raises WrongResult if there is none, if a required field does not exist, or if the harness cannot read a field as
    memory of ``device``. declarations: of the backend, for its own fields and those that are not judged in ``mode``.
    """
    alone = attn_backends_of(backend) is None
    places = [type(backend).__name__ + ("" if alone else f".attn_backends[{step}]") for step in range(len(steps))]
    shown = [_shown(holder, places[step], step, after) for step, holder in enumerate(steps)]
    for step, metadata in enumerate(shown):
        for name, tensor in fields.tensors(metadata, declarations.own_names).items():
            is_judged = not declarations.lists(declarations.unjudged, mode, name)
            finding = unreadable_field(name, tensor, device, is_judged, step)
            if finding is not None:
                raise WrongResult(finding)
    return shown


def _shown(holder: Any, owner: str, step: int, after: str) -> Metadata:
    place = f"{owner}.forward_metadata"
    if not hasattr(type(holder), "forward_metadata") and not hasattr(holder, "forward_metadata"):
        metadata: object = None
        got = f"no such attribute: it was not set by {after}"
    else:
        metadata = holder.forward_metadata  # a property may raise
        got = f"None: it was not set by {after}"
    if metadata is None:
        raise _unusable(place, got, step)
    if isinstance(metadata, type):
        raise _unusable(place, f"the class {metadata.__name__} itself", step)
    if isinstance(metadata, Mapping):
        raise _unusable(place, f"{described(metadata)} (types.SimpleNamespace(**fields) has them as attributes)", step)
    if isinstance(metadata, list) or (isinstance(metadata, tuple) and not hasattr(metadata, "_fields")):
        raise _unusable(place, described(metadata), step)
    for name in _REQUIRED:
        if not hasattr(metadata, name):
            near = meant(name, (other for other in dir(metadata) if other not in _REQUIRED and other[:1] != "_"), 0.85)
            mend = f" (did you mean {near}?)" if near else ""
            raise _unusable(place, f"{described(metadata)} without {name}{mend}", step)
    return metadata  # type: ignore[return-value]  # it has the fields


def _unusable(place: str, got: str, step: int) -> WrongResult:
    return WrongResult(Finding(Kind.RESULT, place, got, _FIELDS, step))
