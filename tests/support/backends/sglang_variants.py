"""SGLang's adapters with one declaration deleted, or with one that they do not need.

``v0_5_23__roles_target`` is the adapter of 0.5.23 without the declaration ``roles_target`` of ``deletions``, and
``v0_5_23__for_nothing_waivers`` has one of ``ADDITIONS`` more; ``v0_5_23__no_change`` is as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nsa_oracle.harness.subjects.adapters.sglang import PACKAGE, Sglang
from nsa_oracle.harness.subjects.declarations import Waiver
from nsa_oracle.reference.types import ForwardMode

BY_NAME: dict[str, type[Sglang]] = {adapter.__name__: adapter for adapter in PACKAGE.adapters.values()}
ADDITIONS: Mapping[str, Mapping[str, Any]] = {
    "no_change": {},
    "for_nothing_waivers": {"waivers": (Waiver("DECODE", "cu_seqlens_k", "it might differ one day"),)},
    "for_nothing_absent": {"absent": {"DECODE": ("paged_mqa_schedule_metadata",)}},
    "for_nothing_absent_nowhere": {"absent": {"DECODE": ("token_to_batch_idx",)}},
}


def deletions(adapter: type[Sglang]) -> dict[str, dict[str, Any]]:
    """Each declaration of the adapter by name, and the attributes that it would have without it.

    Of ``sizes`` only what differs from the contract: the others are what SGLang's runners pass, or a choice.
    """
    found: dict[str, dict[str, Any]] = {
        "roles": {"roles": None},
        "modes": {"modes": tuple(mode.value for mode in ForwardMode)},
        "step_semantics": {"sizes": {**adapter.sizes, "step_semantics": ("shared", "advancing")}},
        "empty_batches": {"empty_batches": True},
        "unread": {"unread": ()},
    }
    if set(adapter.modes) == set(found["modes"]["modes"]):
        del found["modes"]  # it declares nothing
    for role, modes in adapter.roles.items():
        other = "target" if role != "target" else "draft_extend_v2"
        merged = {**adapter.roles, other: (*adapter.roles[other], *modes)}
        found[f"roles_{role}"] = {"roles": {name: served for name, served in merged.items() if name != role}}
        found[f"step_backends_{role}"] = {
            "step_backends": {name: count for name, count in adapter.step_backends.items() if name != role}
        }
    for what in ("mirrors", "padding", "absent"):
        declared: Mapping[str, Any] = getattr(adapter, what, {})
        for key in declared:
            found[f"{what}_{key}"] = {what: {other: value for other, value in declared.items() if other != key}}
    for what in ("own_fields", "waivers"):
        listed = getattr(adapter, what, ())
        for number in range(len(listed)):
            found[f"{what}_{number}"] = {what: listed[:number] + listed[number + 1 :]}
    return found


def __getattr__(name: str) -> type[Sglang]:
    adapter, found, what = name.partition("__")
    if not found or adapter not in BY_NAME:
        raise AttributeError(name)
    given = deletions(BY_NAME[adapter]).get(what)
    if given is None:
        added = ADDITIONS[what]
        given = {key: _joined(getattr(BY_NAME[adapter], key, None), value) for key, value in added.items()}
    return type(adapter, (BY_NAME[adapter],), given)


def _joined(declared: Any, more: Any) -> Any:
    return {**(declared or {}), **more} if isinstance(more, Mapping) else (*(declared or ()), *more)
