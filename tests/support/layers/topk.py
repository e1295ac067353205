"""Layers that are wrong in top-k or its transforms."""

from __future__ import annotations

import torch

from nsa_oracle.reference import topk
from nsa_oracle.reference.layer import SparseAttention


class Select(SparseAttention):
    """The reference's top-k and its transforms with seams."""

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        width = self.config.index_topk
        positions = torch.full((len(logits), width), -1, dtype=torch.int32, device=logits.device)
        for row, length in enumerate(seqlens_expanded.tolist()):
            chosen = self.choose(logits[row], length)[:width]
            positions[row, : len(chosen)] = chosen.int()
        return positions

    def topk_transform_paged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor
    ) -> torch.Tensor:
        return self.paged(self.topk_indices(logits, seqlens_expanded), page_table_1)

    def topk_transform_ragged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, topk_indices_offset: torch.Tensor
    ) -> torch.Tensor:
        return self.ragged(self.topk_indices(logits, seqlens_expanded), topk_indices_offset)

    def choose(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        return best(self.order(logits[:length]), self.config.index_topk).sort().values

    def order(self, scores: torch.Tensor) -> torch.Tensor:
        """What to sort by."""
        return torch.where(scores.isnan(), -torch.inf, scores) + 0.0

    def paged(self, positions: torch.Tensor, page_table_1: torch.Tensor) -> torch.Tensor:
        return topk.transform_paged(positions, page_table_1)

    def ragged(self, positions: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return topk.transform_ragged(positions, offsets)


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    return torch.sort(scores, descending=True, stable=True).indices[:count]


class TiesToHigher(Select):
    """Of equal scores the later positions are kept."""

    def choose(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        last_first = self.order(logits[:length]).flip(0)
        return (length - 1 - best(last_first, self.config.index_topk)).sort().values


class OneTooFew(Select):
    """K - 1 of more than K tokens are kept."""

    def choose(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        kept = min(self.config.index_topk, length) if length <= self.config.index_topk else self.config.index_topk - 1
        return best(self.order(logits[:length]), kept).sort().values


class BestFirst(Select):
    """Positions come in order of score."""

    def choose(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        return best(self.order(logits[:length]), self.config.index_topk)


class Descending(Select):
    """The last position comes first."""

    def choose(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        return super().choose(logits, length).flip(0)


class LooksBeyondRow(Select):
    """Positions are chosen among all columns, so that short rows are filled up with tokens that they do not see."""

    def choose(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        return super().choose(logits, len(logits))


class LeavesGap(Select):
    """A row with fewer than K tokens has a -1 before its last one."""

    def choose(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        chosen = super().choose(logits, length)
        if 0 < len(chosen) < self.config.index_topk:
            chosen = torch.cat([chosen[:-1], chosen.new_tensor([-1]), chosen[-1:]])
        return chosen


class RepeatsLast(Select):
    """Short rows are filled up with their last token."""

    def choose(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        chosen = super().choose(logits, length)
        missing = self.config.index_topk - len(chosen)
        return torch.cat([chosen, chosen[-1:].expand(missing if len(chosen) else 0)])


class ChoosesOneTwice(Select):
    """The first position that is kept of a long row is kept twice, for the second."""

    def choose(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        chosen = super().choose(logits, length)
        if length > self.config.index_topk > 1:
            chosen[1] = chosen[0]
        return chosen


class ClipsThresholdBin(Select):
    """Scores that agree in their upper 12 bits, one bin of a histogram, are taken in order of position."""

    def order(self, scores: torch.Tensor) -> torch.Tensor:
        bits = super().order(scores).contiguous().view(torch.int32)
        return (bits >> 20 << 20).view(torch.float32)


class ReversesNegatives(Select):
    """Scores are compared by their bits, which order negative numbers the other way round."""

    def order(self, scores: torch.Tensor) -> torch.Tensor:
        return super().order(scores).contiguous().view(torch.int32).double()


class FastPathLosesLast(Select):
    """A row of exactly K tokens loses its last one."""

    def choose(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        chosen = super().choose(logits, length)
        return chosen[:-1] if length == self.config.index_topk else chosen


class FastPathForOneMore(Select):
    """A row of K + 1 tokens counts as one that keeps all, and is cut off."""

    def choose(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        few = length <= self.config.index_topk + 1
        return torch.arange(length, device=logits.device) if few else super().choose(logits, length)


class FirstOfEqual(Select):
    """Of equal scores in a long row only the first is kept."""

    def choose(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        if length <= self.config.index_topk:
            return super().choose(logits, length)
        scores = self.order(logits[:length]).tolist()
        different = [position for position, score in enumerate(scores) if score not in scores[:position]]
        return torch.tensor(different, device=logits.device)


class DoesNotMap(Select):
    """Positions are handed on as if they were slots."""

    def paged(self, positions: torch.Tensor, page_table_1: torch.Tensor) -> torch.Tensor:
        return positions


class MapsByFirstRow(Select):
    """Every row is mapped by the page table of the first."""

    def paged(self, positions: torch.Tensor, page_table_1: torch.Tensor) -> torch.Tensor:
        return super().paged(positions, page_table_1[:1].expand_as(page_table_1))


class MapsNothingToFirst(Select):
    """A -1 becomes the row's first slot."""

    def paged(self, positions: torch.Tensor, page_table_1: torch.Tensor) -> torch.Tensor:
        return super().paged(positions.clamp(min=0), page_table_1)


class ForgetsOffset(Select):
    """Places in the concatenated KV start from 0 for each request."""

    def ragged(self, positions: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return positions


class OffsetOfPreviousRow(Select):
    """A row gets the offset of the row before."""

    def ragged(self, positions: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return super().ragged(positions, torch.cat([offsets[:1], offsets[:-1]]))


class OffsetsNothing(Select):
    """A -1 is shifted by the offset, too."""

    def ragged(self, positions: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return positions + offsets[:, None]
