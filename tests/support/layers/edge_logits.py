"""Layers whose top-k is wrong about numbers that an indexer hardly ever gives."""

from __future__ import annotations

import torch

from tests.support.layers.topk import Select


class OrdersNaNFirst(Select):
    """NaN counts as the largest score."""

    def order(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.where(scores.isnan(), torch.inf, scores) + 0.0


class OrdersNaNLast(Select):
    """NaN counts as less than -inf."""

    def order(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.where(scores.isnan(), -torch.inf, scores.double().clamp(min=-1e300)) + 0.0


class OrdersZerosBySign(Select):
    """-0.0 comes behind 0.0."""

    def order(self, scores: torch.Tensor) -> torch.Tensor:
        bits = torch.where(scores.isnan(), -torch.inf, scores).view(torch.int32)
        return torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits).double()


class IgnoresLowBits(Select):
    """The last 8 bits of a score are not compared."""

    def order(self, scores: torch.Tensor) -> torch.Tensor:
        bits = super().order(scores).contiguous().view(torch.int32)
        return (bits >> 8 << 8).view(torch.float32)


class FlushesDenormals(Select):
    """Denormals count as 0."""

    def order(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.where(scores.abs() < torch.finfo(torch.float32).tiny, 0, super().order(scores))


class TakesInfinityForNothing(Select):
    """An infinity of either sign is what no token has."""

    def order(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.where(scores.isinf(), -torch.inf, super().order(scores))


class CompetesWithBeyond(Select):
    """Columns beyond the row compete with it, and what they win is left out."""

    def choose(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        chosen = super().choose(logits, len(logits))
        return chosen[chosen < length]


class DropsNaNOfShortRows(Select):
    """A short row leaves out its tokens that have no score."""

    def choose(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        chosen = super().choose(logits, length)
        return chosen[~logits[chosen].isnan()] if length <= self.config.index_topk else chosen
