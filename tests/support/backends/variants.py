"""Adapters with one declaration deleted, or with one more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nsa_oracle.harness.subjects.declarations import Waiver
from nsa_oracle.reference.types import ForwardMode

ADDITIONS: Mapping[str, Mapping[str, Any]] = {
    "no_change": {},
    "for_nothing_waivers": {"waivers": (Waiver("DECODE", "cache_seqlens_int32", "it might differ one day"),)},
    "for_nothing_absent": {"absent": {"DECODE": ("paged_mqa_schedule_metadata",)}},
    "for_nothing_absent_nowhere": {"absent": {"DECODE": ("token_to_batch_idx",)}},
}


def deletions(adapter: Any, sizes: Mapping[str, tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    """Each declaration of the adapter by name, and the attributes that it would have without it.

    sizes: those of ``sizes`` that say how it differs from the contract, and what could be drawn without them. The
    others are what its engine passes, or a choice.
    """
    all_modes = tuple(mode.value for mode in ForwardMode)
    found: dict[str, dict[str, Any]] = {
        "roles": {"roles": None},
        **{f"sizes_{name}": {"sizes": {**adapter.sizes, name: values}} for name, values in sizes.items()},
    }
    if set(adapter.modes) != set(all_modes):
        found["modes"] = {"modes": all_modes}
    for what in ("empty_batches", "empty_replays", "empty_chunks"):
        if not getattr(adapter, what, True):
            found[what] = {what: True}
    for role, modes in adapter.roles.items():
        other = next(name for name in ("target", "draft_extend_v2", "draft") if name in adapter.roles and name != role)
        merged = {**adapter.roles, other: (*adapter.roles[other], *modes)}
        steps = {name: count for name, count in getattr(adapter, "step_backends", {}).items() if name != role}
        found[f"roles_{role}"] = {"roles": {name: served for name, served in merged.items() if name != role}}
        if steps:
            found[f"roles_{role}"]["step_backends"] = steps
    for what in ("step_backends", "mirrors", "padding", "absent"):
        declared: Mapping[str, Any] = getattr(adapter, what, {})
        for key in declared:
            found[f"{what}_{key}"] = {what: {other: value for other, value in declared.items() if other != key}}
    for what in ("own_fields", "waivers"):
        listed = getattr(adapter, what, ())
        for number in range(len(listed)):
            found[f"{what}_{number}"] = {what: listed[:number] + listed[number + 1 :]}
    return found


def variant(adapter: Any, deleted: Mapping[str, Mapping[str, Any]], what: str) -> Any:
    """The adapter without the declaration ``what``, or with the addition of that name."""
    given = deleted.get(what)
    if given is None:
        given = {key: _joined(getattr(adapter, key, None), value) for key, value in ADDITIONS[what].items()}
    return type(adapter.__name__, (adapter,), dict(given))


def _joined(declared: Any, more: Any) -> Any:
    if not isinstance(more, Mapping):
        return (*(declared or ()), *more)
    declared = declared or {}
    return {**declared, **{key: (*declared.get(key, ()), *names) for key, names in more.items()}}
