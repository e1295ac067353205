"""The default subject: ``optimized/``. Apart from ``bugs``, no other module of the harness imports it.

Importing Triton fixes how kernels run in a process, so the imports are inside the functions that need them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.protocol import MultiStepBackend, SparseAttention
from nsa_oracle.harness.scenarios.limits import LAYER_FIELDS, Limits, declared
from nsa_oracle.harness.scenarios.switches import Switches
from nsa_oracle.reference.types import AttentionConfig, BackendConfig


def optimized_backend(
    config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]
) -> MultiStepBackend:
    """The backend of ``optimized/`` with the switches that the scenario names.

    Raises ScenarioError if a name is unknown or the switches cannot be combined under ``config``.
    """
    from nsa_oracle.optimized.multi_step import MultiStepBackend as Optimized
    from nsa_oracle.optimized.optimizations import Optimizations

    check_optimizations(optimizations, config)
    return Optimized(config, req_to_token, Optimizations.from_names(optimizations))


def check_optimizations(names: Sequence[str], config: BackendConfig) -> None:
    """Raises ScenarioError if a name is unknown or the switches cannot be combined under ``config``."""
    from nsa_oracle.optimized.optimizations import Optimizations

    try:
        Optimizations.from_names(names).check(config)
    except ValueError as error:
        raise ScenarioError(f"optimizations: {error}") from None


OPTIMIZED_SWITCHES = Switches(
    separate=("precompute", "transform_table_cache", "strided_indices_cache", "batched_copy", "vectorized_seqlens"),
    fused=("one_launch", "in_graph"),
    shared_only=("aliased_steps",),
    check=check_optimizations,
)


def optimized_layer(config: BackendConfig, attention: AttentionConfig) -> SparseAttention:
    """The layer of ``optimized/``."""
    from nsa_oracle.optimized.layer import SparseAttention as Optimized

    return Optimized(config, attention)


def limits_of_optimized_layer() -> Limits:
    """The limits that the layer of ``optimized/`` declares."""
    from nsa_oracle.optimized.layer import SparseAttention as Optimized

    return declared(Optimized, LAYER_FIELDS, "no layer")
