"""vLLM's adapter of 0.33 with one declaration deleted, or with one that it does not need; as ``sglang_variants``."""

from __future__ import annotations

from typing import Any

from nsa_oracle.harness.subjects.adapters.vllm import Vllm, v0_33
from tests.support.backends import variants


def deletions() -> dict[str, dict[str, Any]]:
    """Each declaration by name, and the attributes that the adapter would have without it."""
    sizes = {"step_semantics": ("shared", "advancing"), "num_steps": (1, 2), "flashmla_num_sm_parts": (0, 3)}
    return variants.deletions(v0_33, sizes)


def __getattr__(name: str) -> type[Vllm]:
    adapter, found, what = name.partition("__")
    if not found or adapter != "v0_33":
        raise AttributeError(name)
    made: type[Vllm] = variants.variant(v0_33, deletions(), what)
    return made
