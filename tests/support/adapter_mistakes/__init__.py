"""Mistakes that authors of backends and layers make, each with what must be said about it."""

from __future__ import annotations

from tests.support.adapter_mistakes.layers import global_state, layers
from tests.support.adapter_mistakes.metadata import declarations, metadata, steps
from tests.support.adapter_mistakes.mistake import HEADER, Mistake
from tests.support.adapter_mistakes.naming import construction, naming

__all__ = ["HEADER", "Mistake", "mistakes"]


def mistakes() -> list[Mistake]:
    """All of them."""
    groups = (naming, construction, steps, metadata, declarations, layers, global_state)
    return [mistake for group in groups for mistake in group()]
