"""Content of small and of production's sizes, and what tests compare it with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch

from nsa_oracle.harness.content.content import Content
from nsa_oracle.harness.scenarios.setup import Regime
from nsa_oracle.reference.types import AttentionConfig

SMALL = AttentionConfig(4, 64, 16, 3, 32, sm_scale=math.log(2))
BIG = AttentionConfig(sm_scale=math.log(2))
EXACT = [regime for regime in Regime if regime.is_exact]
SLOTS = [64, 65, 7, 130, 99, 100, 3, 1000, 2**15 - 1, 12, 13, 14, 15, 16, 17, 18]
both = pytest.mark.parametrize("attention", [SMALL, BIG], ids=["small", "production"])
each_exact = pytest.mark.parametrize("regime", EXACT)
each = pytest.mark.parametrize("regime", list(Regime))


def row(content: Content, slots: Sequence[int], pool_row: int = 3, version: int = 9) -> tuple[torch.Tensor, ...]:
    """One row that sees ``slots``: q [H, D], index_q [IH, ID], weights [IH], k [n, D], index_k [n, ID]."""
    k, index_k = content.keys(slots, version - 1)
    q, index_q, weights = content.queries([(pool_row, 1)], version, [slots])
    return q[0], index_q[0], weights[0], k, index_k


def quantize(x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The FP8 caches' rule, by itself: values e4m3 [n, d], scales float32 [n, d / tile]."""
    tiles = x.float().unflatten(-1, (-1, tile))
    amax = tiles.abs().amax(-1)
    scales = torch.where(amax == 0, torch.ones_like(amax), amax / 448)
    return (tiles / scales[..., None]).flatten(-2).to(torch.float8_e4m3fn), scales


def as_bytes(*tensors: torch.Tensor) -> bytes:
    return b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)


def index_logits(
    index_q: torch.Tensor, weights: torch.Tensor, index_k: torch.Tensor, attention: AttentionConfig
) -> list[Fraction]:
    """By the definition, in rational numbers."""
    values, scales = quantize(index_k, attention.index_head_dim)
    dots = torch.relu(index_q.double() @ values.double().T)
    return [
        Fraction(float(scales[j, 0]))
        * sum(Fraction(float(w)) * Fraction(float(d)) for w, d in zip(weights, dots[:, j], strict=True))
        for j in range(len(index_k))
    ]
