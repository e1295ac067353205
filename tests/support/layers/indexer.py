"""Layers that are wrong in the indexer."""

from __future__ import annotations

import torch

from nsa_oracle.reference import kv_cache
from nsa_oracle.reference.layer import SparseAttention


class Indexer(SparseAttention):
    """The reference's indexer with seams."""

    beyond = -torch.inf

    def indexer_logits(
        self,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        index_k_cache: torch.Tensor,
        real_page_table: torch.Tensor,
        seqlens_expanded: torch.Tensor,
        max_seq_len_k: int,
    ) -> torch.Tensor:
        logits = torch.full((len(index_q), max_seq_len_k), self.beyond, device=index_q.device)
        for row, length in enumerate(seqlens_expanded.tolist()):
            visible = min(self.visible(length), max_seq_len_k)
            keys, scales = self.keys(index_k_cache, self.table(real_page_table, row), visible)
            scored = self.score(index_q[row].double(), self.weights(index_weights[row]).double(), keys, scales)
            logits[row, :visible] = scored.float()
        return logits

    def visible(self, length: int) -> int:
        return length

    def table(self, real_page_table: torch.Tensor, row: int) -> torch.Tensor:
        return real_page_table[row]

    def weights(self, weights: torch.Tensor) -> torch.Tensor:
        return weights

    def keys(self, cache: torch.Tensor, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.arange(length, device=cache.device)
        slots = pages[tokens // self.config.page_size].long() * self.config.page_size + tokens % self.config.page_size
        keys, scales = kv_cache.load_index_k(self.attention, cache, slots)
        return keys.double(), scales.double()

    def score(self, q: torch.Tensor, w: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return scales * (w @ torch.relu(q @ keys.T))


class LeavesOutRelu(Indexer):
    """Negative products count as well."""

    def score(self, q: torch.Tensor, w: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return scales * (w @ (q @ keys.T))


class ReluAfterWeights(Indexer):
    """Heads are weighted before the relu, so that a negative weight takes nothing off."""

    def score(self, q: torch.Tensor, w: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return scales * torch.relu(w[:, None] * (q @ keys.T)).sum(0)


class ReluAfterSum(Indexer):
    """The relu is taken of the sum over heads."""

    def score(self, q: torch.Tensor, w: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return scales * torch.relu(w @ (q @ keys.T))


class DropsIndexScale(Indexer):
    """The scale of a key is forgotten."""

    def score(self, q: torch.Tensor, w: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return super().score(q, w, keys, torch.ones_like(scales))


class NeighbourHeadWeight(Indexer):
    """An index head gets the weight of the one before."""

    def weights(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.roll(1)


class RoundsWeights(Indexer):
    """Weights are rounded to bf16."""

    def weights(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.bfloat16()


class DropsLastIndexHead(Indexer):
    """The last index head is left out."""

    def score(self, q: torch.Tensor, w: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return super().score(q[:-1], w[:-1], keys, scales) if len(w) > 1 else super().score(q, w, keys, scales)


class LengthOneShort(Indexer):
    """The last visible token gets no score."""

    def visible(self, length: int) -> int:
        return max(0, length - 1)


class LengthOneLong(Indexer):
    """The token behind the last visible one gets a score."""

    def visible(self, length: int) -> int:
        return length + 1


class SkipsPartialPage(Indexer):
    """Only whole pages are scored."""

    def visible(self, length: int) -> int:
        return length // self.config.page_size * self.config.page_size


class TableOfFirstRow(Indexer):
    """Every row is scored over the pages of the first."""

    def table(self, real_page_table: torch.Tensor, row: int) -> torch.Tensor:
        return real_page_table[0]


class ZeroBeyondRow(Indexer):
    """Columns beyond the row are 0."""

    beyond = 0.0


class ZeroTimesUnreadKey(Indexer):
    """Scores are summed over whole pages, what is not visible times 0."""

    def keys(self, cache: torch.Tensor, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.config.page_size
        keys, scales = super().keys(cache, pages, -(-length // size) * size)
        return keys[:length], scales[:length] + (0 * scales).sum()


class ScoresNaNAsZero(Indexer):
    """A NaN is replaced before it is compared with anything."""

    def score(self, q: torch.Tensor, w: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return super().score(q, w, keys, scales).nan_to_num(nan=0.0)


class InfiniteKeysCount(Indexer):
    """A NaN among the elements of a key counts as 448, so that a key with an infinite scale gets an infinite score."""

    def score(self, q: torch.Tensor, w: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return super().score(q, w, keys.nan_to_num(nan=448.0), scales)


class LimitsScale(Indexer):
    """The scale of a key has an upper limit."""

    def score(self, q: torch.Tensor, w: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return super().score(q, w, keys, scales.clamp(max=2.0**100))
