"""The switches of the backend. Every valid combination computes the same metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from nsa_oracle.reference.types import BackendConfig, StepSemantics


@dataclass(frozen=True)
class Optimizations:
    """Which optimisations are on; all off is the original: a Python loop, N separate computations.

    precompute: compute what the steps share once, then copy it into the step buffers.
    transform_table_cache: keep the index tensor that derives ``real_page_table`` from ``page_table_1``.
    strided_indices_cache: one such index tensor for all backend instances, as wide as the context, sliced.
    batched_copy: one launch copies all fields into all step buffers (without ``precompute``: one launch per step).
    vectorized_seqlens: one launch computes the length fields of all requests, instead of a Python loop over them.
    one_launch: one launch fills all fields of all steps; the five above then have no effect.
    in_graph: that launch is captured in the graph, so that a replay prepares its own metadata. Needs ``one_launch``.
    aliased_steps: all steps share one buffer, nothing is copied. Needs ``StepSemantics.SHARED``.
    """

    precompute: bool = False
    transform_table_cache: bool = False
    strided_indices_cache: bool = False
    batched_copy: bool = False
    vectorized_seqlens: bool = False
    one_launch: bool = False
    in_graph: bool = False
    aliased_steps: bool = False

    def __post_init__(self) -> None:
        if self.in_graph and not self.one_launch:
            raise ValueError("in_graph needs one_launch: only that launch can be captured")

    @classmethod
    def from_names(cls, names: Iterable[str]) -> Optimizations:
        """The named optimisations, on. Raises ValueError for an unknown name or an impossible combination."""
        chosen = list(names)
        unknown = [name for name in chosen if name not in OPTIMIZATION_NAMES]
        if unknown:
            known = ", ".join(OPTIMIZATION_NAMES)
            raise ValueError(f"unknown optimization '{unknown[0]}'; the known ones are {known}")
        return cls(**dict.fromkeys(chosen, True))

    @property
    def names(self) -> tuple[str, ...]:
        """The optimisations that are on, in the order of the fields."""
        return tuple(field.name for field in dataclasses.fields(self) if getattr(self, field.name))

    def check(self, config: BackendConfig) -> None:
        """Raises ValueError if these optimisations cannot serve ``config``."""
        if self.aliased_steps and config.step_semantics is not StepSemantics.SHARED:
            raise ValueError("aliased_steps needs shared step semantics: advancing steps differ")


OPTIMIZATION_NAMES = tuple(field.name for field in dataclasses.fields(Optimizations))
