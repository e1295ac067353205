"""Regimes: the kinds of content of a layer's inputs."""

from __future__ import annotations

import enum

from nsa_oracle.reference.types import AttentionConfig

MAX_CODE_BITS = 24


class Regime(enum.Enum):
    """Kind of content of a layer's inputs, the simplest first."""

    DOMINATING = "dominating"  # one key has all the weight; the output is its value, which encodes its slot
    EQUAL = "equal"  # all keys weigh the same and all index scores are equal
    LATTICE = "lattice"  # weights 2^0 .. 2^-8, many tied index scores
    RANDOM = "random"  # ordinary numbers; nothing is exact

    @property
    def is_exact(self) -> bool:
        """Whether ``logits`` and ``out`` have a single right bit pattern, given that sm_scale is ln 2."""
        return self is not Regime.RANDOM


def most_coded_slots(attention: AttentionConfig) -> int:
    """Number of slots that can have distinct keys in the DOMINATING regime."""
    return 1 << min(attention.qk_rope_head_dim - 1, MAX_CODE_BITS)
