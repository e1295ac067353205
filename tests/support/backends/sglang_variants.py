"""SGLang's adapters with one declaration deleted, or with one that they do not need.

``v0_5_23__roles_target`` is the adapter of 0.5.23 without the declaration ``roles_target`` of ``deletions``, and
``v0_5_23__for_nothing_waivers`` has one of ``ADDITIONS`` more; ``v0_5_23__no_change`` is as it is.
"""

from __future__ import annotations

from typing import Any

from nsa_oracle.harness.subjects.adapters.sglang import PUBLISHED, Sglang
from tests.support.backends import variants

BY_NAME: dict[str, type[Sglang]] = {adapter.__name__: adapter for adapter in PUBLISHED.adapters.values()}


def deletions(adapter: type[Sglang]) -> dict[str, dict[str, Any]]:
    """Each declaration of the adapter by name, and the attributes that it would have without it."""
    found = variants.deletions(adapter, {"step_semantics": ("shared", "advancing")})
    return {**found, "unread": {"unread": ()}}


def __getattr__(name: str) -> type[Sglang]:
    adapter, found, what = name.partition("__")
    if not found or adapter not in BY_NAME:
        raise AttributeError(name)
    made: type[Sglang] = variants.variant(BY_NAME[adapter], deletions(BY_NAME[adapter]), what)
    return made
