"""Attention layers with one planted bug each, and clean ones that use a freedom the contract leaves them.

Most derive from the reference, which cannot be captured: they are judged without graphs. Those at the end derive from
``optimized/`` and are wrong in a captured graph only. Each is a factory of (config, attention), as ``--oracle-layer
planted_layers:NAME`` wants it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from nsa_oracle.harness.engine.passes import map_tensors
from nsa_oracle.optimized.layer import SparseAttention as Capturable
from nsa_oracle.reference import kv_cache, topk
from nsa_oracle.reference.layer import SparseAttention
from nsa_oracle.reference.types import (
    FP8_MAX,
    AttentionCaches,
    AttentionConfig,
    AttentionInputs,
    AttentionOutputs,
    BackendConfig,
    KVCacheDtype,
    Metadata,
)

Clean = SparseAttention


def to_bytes(x: torch.Tensor) -> torch.Tensor:
    """The bytes of ``x`` [..., n]: uint8 [..., n * itemsize]."""
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


# Store


class Store(SparseAttention):
    """The reference's store with seams."""

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        self.store_kv(caches.kv, inputs.k, inputs.out_cache_loc)
        self.store_index_k(caches.index_k, inputs.index_k, inputs.out_cache_loc)

    def store_kv(self, cache: torch.Tensor, k: torch.Tensor, slots: torch.Tensor) -> None:
        fp8 = self.attention.kv_cache_dtype is KVCacheDtype.FP8
        cache[slots, 0] = torch.cat(self.parts(k), dim=-1) if fp8 else k

    def parts(self, k: torch.Tensor) -> Sequence[torch.Tensor]:
        """The bytes of tokens in the FP8 cache: latent, scales, RoPE."""
        rank = self.attention.kv_lora_rank
        values, scales = self.quantize(k[:, :rank], self.attention.quant_tile)
        return to_bytes(values), to_bytes(scales), to_bytes(k[:, rank:])

    def store_index_k(self, cache: torch.Tensor, k: torch.Tensor, slots: torch.Tensor) -> None:
        values, scales = self.quantize(k, self.attention.index_head_dim)
        pages, offsets = slots // self.config.page_size, slots % self.config.page_size
        self.put(cache, pages, offsets, to_bytes(values), to_bytes(scales))

    def put(
        self, cache: torch.Tensor, pages: torch.Tensor, offsets: torch.Tensor, key: torch.Tensor, scale: torch.Tensor
    ) -> None:
        dim = self.attention.index_head_dim
        write_bytes(cache, pages, offsets * dim, key)
        write_bytes(cache, pages, self.config.page_size * dim + 4 * offsets, scale)

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        return kv_cache.quantize(x, tile)


def write_bytes(cache: torch.Tensor, pages: torch.Tensor, first: torch.Tensor, values: torch.Tensor) -> None:
    """``values`` [n, bytes] to the bytes from ``first`` [n] on of ``pages`` [n]."""
    cache[pages[:, None], first[:, None] + torch.arange(values.shape[1], device=cache.device)] = values


class WritesNextSlot(Store):
    """Keys go one slot too far."""

    def store_kv(self, cache: torch.Tensor, k: torch.Tensor, slots: torch.Tensor) -> None:
        super().store_kv(cache, k, slots + 1)


class WritesTwoSlots(Store):
    """A key spills over into the slot behind its own."""

    def store_kv(self, cache: torch.Tensor, k: torch.Tensor, slots: torch.Tensor) -> None:
        super().store_kv(cache, k, slots + 1)
        super().store_kv(cache, k, slots)


class SkipsLastRow(Store):
    """The last row's keys are not written."""

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        super().store_cache(caches, map_tensors(inputs, lambda tensor: tensor[:-1]))


class StoresInFirstStepOnly(Store):
    """Later draft steps leave the slots of their keys as they were."""

    calls = 0

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        if self.calls % self.config.speculative_num_steps == 0:
            super().store_cache(caches, inputs)
        self.calls += 1


class RowsWithoutTokenWriteToSlotOne(Store):
    """The keys of rows that stand for no token go to slot 1, which is somebody's when pages hold one token."""

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        slots = torch.where(inputs.out_cache_loc == 0, 1, inputs.out_cache_loc)
        super().store_cache(caches, dataclasses.replace(inputs, out_cache_loc=slots))


class NeighbourTileScale(Store):
    """A tile of the latent gets the scale of the one before."""

    def parts(self, k: torch.Tensor) -> Sequence[torch.Tensor]:
        values, scales, rope = super().parts(k)
        return values, scales.roll(4, dims=1), rope


class StoresReciprocalScale(Store):
    """What is stored is the factor that the values were multiplied by."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = super().quantize(x, tile)
        return values, 1 / scales


class ScalesToTwoHundredForty(Store):
    """The largest value of a tile becomes 240, the maximum of another FP8 type."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        _, scales = super().quantize(x * (FP8_MAX / 240), tile)
        scaled = x.float().unflatten(-1, (-1, tile)) / scales.unsqueeze(-1)
        return scaled.flatten(-2).to(torch.float8_e4m3fn), scales


class ZeroScaleOfZeroTile(Store):
    """A tile of zeros gets the scale 0."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = super().quantize(x, tile)
        zero = (values.float() == 0).view(*scales.shape, tile).all(dim=-1)
        return values, scales.masked_fill(zero, 0)


class UnscaledLatents(Store):
    """Latents are cast as they are, with scales of 1."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        if tile == self.attention.index_head_dim:
            return super().quantize(x, tile)
        return x.float().to(torch.float8_e4m3fn), torch.ones_like(x.float()[:, :: self.attention.quant_tile])


class OneScaleForAllTiles(Store):
    """The largest of the whole latent decides the scale of every tile."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = super().quantize(x, x.shape[-1])
        return values, scales.expand(-1, x.shape[-1] // tile)


class RoundsTowardsZero(Store):
    """The cast to e4m3 cuts off instead of rounding to nearest."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = super().quantize(x, tile)
        away = values.float().abs() > (x.float().unflatten(-1, (-1, tile)) / scales.unsqueeze(-1)).flatten(-2).abs()
        return (values.view(torch.uint8) - away.to(torch.uint8)).view(torch.float8_e4m3fn), scales


class NanStaysAlone(Store):
    """A NaN does not enter the largest magnitude of its tile."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = super().quantize(x.nan_to_num(0, math.inf, -math.inf), tile)
        return torch.where(x.isnan(), math.nan, values.float()).to(torch.float8_e4m3fn), scales


class InfinityIsTheLargest(Store):
    """An infinite element counts as the largest finite one."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        return super().quantize(x.nan_to_num(math.nan), tile)


class TiesAwayFromZero(Store):
    """What lies half-way between two e4m3 numbers becomes the larger one."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = super().quantize(x, tile)
        scaled = (x.float().unflatten(-1, (-1, tile)) / scales.unsqueeze(-1)).flatten(-2).abs()
        bits = values.view(torch.uint8) & 0x7F
        next_one = torch.where(bits < 0x7E, bits + 1, bits).view(torch.float8_e4m3fn).float()
        tied = (bits < 0x7E) & (scaled - values.float().abs() == next_one - scaled)
        return (values.view(torch.uint8) + tied.to(torch.uint8)).view(torch.float8_e4m3fn), scales


class FlushesDenormalKeys(Store):
    """A denormal element counts as zero."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        return super().quantize(torch.where(x.abs() < torch.finfo(x.dtype).tiny, 0 * x, x), tile)


class OtherNan(Store):
    """Clean. The NaN that it makes are negative, and full of ones."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = super().quantize(x, tile)
        codes = values.view(torch.uint8).masked_fill(values.float().isnan(), 0xFF)
        bits = scales.view(torch.int32).masked_fill(scales.isnan(), -1)
        return codes.view(torch.float8_e4m3fn), bits.view(torch.float32)


class RopeBeforeScales(Store):
    """The RoPE part lies where the scales belong, and the scales behind it."""

    def parts(self, k: torch.Tensor) -> Sequence[torch.Tensor]:
        values, scales, rope = super().parts(k)
        return values, rope, scales


class InterleavesIndexScales(Store):
    """Each index key is followed by its scale, instead of all keys of a page by all scales."""

    def put(
        self, cache: torch.Tensor, pages: torch.Tensor, offsets: torch.Tensor, key: torch.Tensor, scale: torch.Tensor
    ) -> None:
        write_bytes(cache, pages, offsets * self.attention.index_page_bytes(1), torch.cat([key, scale], dim=1))


class IndexKeyWithoutOffset(Store):
    """Index keys go to the start of their page, whatever their place in it."""

    def put(
        self, cache: torch.Tensor, pages: torch.Tensor, offsets: torch.Tensor, key: torch.Tensor, scale: torch.Tensor
    ) -> None:
        super().put(cache, pages, torch.zeros_like(offsets), key, scale)


class IndexKeyToNextPage(Store):
    """Index keys go to the page behind their own."""

    def put(
        self, cache: torch.Tensor, pages: torch.Tensor, offsets: torch.Tensor, key: torch.Tensor, scale: torch.Tensor
    ) -> None:
        super().put(cache, pages + 1, offsets, key, scale)


# Indexer


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


# Top-k


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


# Attention


class Attention(SparseAttention):
    """The reference's attention with seams, in any dtype."""

    dtype = torch.float64

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rank = self.attention.kv_lora_rank
        out = torch.zeros(*q.shape[:2], rank, dtype=torch.bfloat16, device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
        for row in range(len(q)):
            slots = self.slots(indices[row])
            if len(slots):
                row_out, row_lse = self.attend(q[row].to(self.dtype), self.keys(kv_cache, slots).to(self.dtype))
                out[row], lse[row] = row_out.float().bfloat16(), row_lse.float()
        return out, lse

    def slots(self, indices: torch.Tensor) -> torch.Tensor:
        return indices[indices >= 0]

    def keys(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return kv_cache.load_kv(self.attention, cache, slots)

    def attend(self, q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One row's heads over its keys."""
        exponents = self.exponents(q, keys)
        largest = exponents.amax(1, keepdim=True)
        weights = torch.exp2(exponents - largest)
        return self.finish(weights @ self.values(keys), weights.sum(1, keepdim=True), largest)

    def exponents(self, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[H, n], to the base 2. The factor is 1.0 for an sm_scale of ln 2."""
        return (q @ keys.T) * torch.tensor(self.attention.sm_scale * math.log2(math.e)).item()

    def values(self, keys: torch.Tensor) -> torch.Tensor:
        return keys[:, : self.attention.kv_lora_rank]

    def finish(
        self, acc: torch.Tensor, total: torch.Tensor, largest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return acc / total, ((largest + total.log2()) * math.log(2)).squeeze(1)


class Chunked(Attention):
    """The same one chunk of keys after the other, with a running maximum."""

    chunk = 3

    def attend(self, q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads = len(q)
        acc = q.new_zeros(heads, self.attention.kv_lora_rank)
        total, largest = q.new_zeros(heads, 1), q.new_full((heads, 1), -torch.inf)
        for begin in range(0, len(keys), self.chunk):
            part = keys[self.bounds(begin, len(keys))]
            exponents = self.exponents(q, part)
            grown = torch.maximum(largest, exponents.amax(1, keepdim=True))
            weights, factor = torch.exp2(exponents - grown), self.factor(largest, grown)
            acc = self.stored(acc * factor + weights @ self.values(part))
            total, largest = self.stored(total * factor + weights.sum(1, keepdim=True)), grown
        return self.finish(acc, total, largest)

    def bounds(self, begin: int, end: int) -> slice:
        return slice(begin, begin + self.chunk)

    def factor(self, largest: torch.Tensor, grown: torch.Tensor) -> torch.Tensor:
        return torch.exp2(largest - grown)

    def stored(self, numbers: torch.Tensor) -> torch.Tensor:
        """What an accumulator holds between two chunks."""
        return numbers


class LeaksSlotZero(Attention):
    """An index of -1 reads slot 0 like any other."""

    def slots(self, indices: torch.Tensor) -> torch.Tensor:
        return indices.clamp(min=0)


class ZeroTimesSlotZero(Attention):
    """The value behind a -1 is read from slot 0, and weighs 0."""

    def attend(self, q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().attend(q, keys[: self.live])
        return out + 0 * self.values(keys[self.live :]).sum(0), lse

    def slots(self, indices: torch.Tensor) -> torch.Tensor:
        self.live = int((indices >= 0).sum())
        return indices.clamp(min=0) if self.live else indices[:0]


class LeavesOutScale(Attention):
    """q.k is not scaled."""

    def exponents(self, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return (q @ keys.T) * math.log2(math.e)


class IgnoresRope(Attention):
    """Scores come from the latent part alone."""

    def exponents(self, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        rank = self.attention.kv_lora_rank
        return super().exponents(q[:, :rank], keys[:, :rank])


class ValuesFromRope(Attention):
    """The value is the end of the key instead of its beginning."""

    def values(self, keys: torch.Tensor) -> torch.Tensor:
        return keys[:, self.attention.qk_rope_head_dim :]


class TruncatesLatents(Attention):
    """The last quarter of the value is not read."""

    def values(self, keys: torch.Tensor) -> torch.Tensor:
        values = super().values(keys).clone()
        values[:, -self.attention.quant_tile :] = 0
        return values


class NextHeadsQuery(Attention):
    """A head gets the query of the next."""

    def attend(self, q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().attend(q.roll(-1, dims=0), keys)


class IgnoresTileScales(Attention):
    """Latents of the FP8 cache are taken as they are, their scales unread."""

    def keys(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        keys = super().keys(cache, slots)
        if self.attention.kv_cache_dtype is KVCacheDtype.FP8:
            rank = self.attention.kv_lora_rank
            keys[:, :rank] = cache[slots.long(), 0, :rank].view(torch.float8_e4m3fn).bfloat16()
        return keys


class LosesLastIndex(Attention):
    """The last of K indices is not looked at."""

    def slots(self, indices: torch.Tensor) -> torch.Tensor:
        return super().slots(indices[:-1])


class QueriesInFp8(Attention):
    """Queries are rounded to e4m3."""

    def attend(self, q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().attend(q.to(torch.float8_e4m3fn).to(self.dtype), keys)


class RoughExponential(Attention):
    """Weights are a thousandth too large where they are not 1."""

    def attend(self, q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        exponents = self.exponents(q, keys)
        largest = exponents.amax(1, keepdim=True)
        weights = torch.exp2(exponents - largest)
        weights = torch.where(weights < 1, 1.001 * weights, weights)
        return self.finish(weights @ self.values(keys), weights.sum(1, keepdim=True), largest)


class DropsRescale(Chunked):
    """What earlier chunks gave keeps its weight when the maximum grows."""

    def factor(self, largest: torch.Tensor, grown: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(grown)


class LosesKeyAtBoundary(Chunked):
    """Chunks but the first begin one key late."""

    def bounds(self, begin: int, end: int) -> slice:
        return slice(begin + (0 < begin < end - 1), begin + self.chunk)


class DoublesKeyAtBoundary(Chunked):
    """Chunks but the first begin one key early."""

    def bounds(self, begin: int, end: int) -> slice:
        return slice(max(0, begin - 1), begin + self.chunk)


class AccumulatesInBf16(Chunked):
    """Accumulators are bf16."""

    def stored(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers.bfloat16().to(numbers.dtype)


class StopsAtFirstNothing(Attention):
    """Indices behind the first -1 are not looked at."""

    def slots(self, indices: torch.Tensor) -> torch.Tensor:
        return indices[: int((indices >= 0).long().cumprod(0).sum())]


class RoundsBeforeDividing(Attention):
    """The numerator is rounded to bf16, and the quotient once more."""

    def finish(
        self, acc: torch.Tensor, total: torch.Tensor, largest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().finish(acc.bfloat16().to(acc.dtype), total, largest)
        return out, lse


class LseInBaseTwo(Attention):
    """The lse is a logarithm to the base 2."""

    def finish(
        self, acc: torch.Tensor, total: torch.Tensor, largest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().finish(acc, total, largest)
        return out, lse / math.log(2)


class LseWithoutMaximum(Attention):
    """The lse is the logarithm of the sum as it stands, the maximum taken off."""

    def finish(
        self, acc: torch.Tensor, total: torch.Tensor, largest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().finish(acc, total, largest)[0], total.log().squeeze(1)


class DividesNothingByNothing(SparseAttention):
    """A row without a key divides 0 by 0."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        out[(indices < 0).all(dim=1)] = torch.nan
        return out, lse


class ZeroLseOfNothing(SparseAttention):
    """The lse of a row without a key is 0."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        return out, torch.where(lse == -torch.inf, 0, lse)


class SplitsByBatch(Chunked):
    """How many keys a chunk has follows from the number of rows, and with it the order of the sum."""

    dtype = torch.float32

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.chunk = 1 + len(q)
        return super().sparse_mla(q, kv_cache, indices)


class SumsInOrderOfSlots(Chunked):
    """Keys are added up in the order in which they lie in the cache."""

    dtype = torch.float32
    chunk = 1

    def slots(self, indices: torch.Tensor) -> torch.Tensor:
        return super().slots(indices).sort().values


class StartsFromWorkspace(Attention):
    """Accumulators are taken as they come from the allocator."""

    def finish(
        self, acc: torch.Tensor, total: torch.Tensor, largest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().finish(acc + torch.empty_like(acc), total, largest)


# The layer as a whole


class WithoutStore(SparseAttention):
    """Writes nothing at all."""

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        pass


class StoresAfterwards(SparseAttention):
    """The keys of a pass are written when it has been computed."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = WithoutStore(self.config, self.attention).forward(inputs, caches, metadata)
        self.store_cache(caches, inputs)
        return outputs


class AttendsBesideStore(SparseAttention):
    """Attention reads the keys as they were before the pass; the indexer waits for its own."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        before = caches.kv.clone()
        outputs = super().forward(inputs, caches, metadata)
        out, lse = self.sparse_mla(inputs.q, before, outputs.indices)
        return AttentionOutputs(outputs.logits, outputs.indices, out, lse)


class LengthsOfRequests(SparseAttention):
    """Every draft token sees all of its request."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        requests, rows = len(metadata.cache_seqlens_int32), len(metadata.seqlens_expanded)
        if requests and rows % requests == 0:
            lengths = metadata.cache_seqlens_int32.repeat_interleave(rows // requests)
            metadata = dataclasses.replace(metadata, seqlens_expanded=lengths)
        return super().forward(inputs, caches, metadata)


class AttendsToLastSelection(SparseAttention):
    """Attention runs beside top-k and sees the slots of the call before."""

    last: torch.Tensor | None = None

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        seen = self.last if self.last is not None and self.last.shape == outputs.indices.shape else outputs.indices
        self.last = outputs.indices
        out, lse = self.sparse_mla(inputs.q, caches.kv, seen)
        return AttentionOutputs(outputs.logits, outputs.indices, out, lse)


class Raises(SparseAttention):
    """Attention raises."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("no kernel image\nis available")


class OutInFloat32(SparseAttention):
    """Outputs are not rounded."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        return out.float(), lse


class OneRowTooFew(SparseAttention):
    """The last row of the lse is missing."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        return out, lse[:-1]


class WritesBeyondOutput(SparseAttention):
    """One number is written behind a buffer of the layer's own."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        buffer = torch.empty_like(lse)
        buffer.as_strided((1,), (1,), buffer.storage_offset() + buffer.numel()).fill_(1)
        return out, lse


# Clean ones


class InFloat32(Attention):
    """Attention in float32 throughout."""

    dtype = torch.float32


class OnlineInFloat32(Chunked):
    """A running softmax in float32."""

    dtype = torch.float32


class Bf16Weights(Attention):
    """Weights are rounded to bf16 for the product with the values, as matrix units want them."""

    dtype = torch.float32

    def attend(self, q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        exponents = self.exponents(q, keys)
        largest = exponents.amax(1, keepdim=True)
        weights = torch.exp2(exponents - largest)
        acc = weights.bfloat16().float() @ self.values(keys)
        return self.finish(acc, weights.sum(1, keepdim=True), largest)


class IndexerInFloat32(Indexer):
    """Index scores in float32, scaled before the sum over heads."""

    def score(self, q: torch.Tensor, w: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return (w.float()[:, None] * torch.relu(q.float() @ keys.float().T) * scales.float()).sum(0)


# Top-k of numbers that an indexer hardly ever gives


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


# Writes to what it is given


class ScalesKeysInPlace(Store):
    """Keys are scaled where they lie, and left so."""

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        super().store_cache(caches, inputs)
        inputs.k.mul_(2)


class ClearsIndexKeys(Indexer):
    """What no token has is taken out of the cache for good."""

    def keys(self, cache: torch.Tensor, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = super().keys(cache, pages, length)
        cache[0] = 0
        return found


class MasksLogitsInPlace(Select):
    """Columns beyond the row are made -inf in the caller's memory."""

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        for row, length in enumerate(seqlens_expanded.tolist()):
            logits[row, length:] = -torch.inf
        return super().topk_indices(logits, seqlens_expanded)


class MasksTableInPlace(Select):
    """Dead cells of the page table are made -1 in the caller's memory."""

    def topk_transform_paged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor
    ) -> torch.Tensor:
        for row, length in enumerate(seqlens_expanded.tolist()):
            page_table_1[row, length:] = -1
        return super().topk_transform_paged(logits, seqlens_expanded, page_table_1)


class ShiftsOffsetsInPlace(Select):
    """The offsets of rows are used as a workspace."""

    def ragged(self, positions: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        places = super().ragged(positions, offsets)
        offsets.zero_()
        return places


class ClampsIndicesInPlace(Attention):
    """A -1 becomes a 0 once it has been seen."""

    def slots(self, indices: torch.Tensor) -> torch.Tensor:
        slots = super().slots(indices)
        indices.clamp_(min=0)
        return slots


class ScalesQueriesInPlace(Attention):
    """Queries are scaled where they lie."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = super().sparse_mla(q, kv_cache, indices)
        q.mul_(0.5)
        return found


class CleansCache(Attention):
    """NaN in the cache is replaced before it can do harm."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = super().sparse_mla(q, kv_cache, indices)
        kv_cache[0] = 0
        return found


class ClipsMetadata(SparseAttention):
    """What other layers of the model will read is clipped to K."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        metadata.seqlens_expanded.clamp_(max=self.config.index_topk)
        return outputs


class ReplacesMetadata(SparseAttention):
    """What other layers of the model will read is another tensor."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        metadata.real_page_table = metadata.real_page_table + 1
        return outputs


class NarrowsMetadata(SparseAttention):
    """The next layer is told that tables are narrower."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        metadata.max_seq_len_k -= 1
        return outputs


class ZeroesIndexQueries(SparseAttention):
    """Index queries are a workspace of the layer as a whole."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        inputs.index_weights.zero_()
        return outputs


# Slots far apart


class SlotsInInt32(Attention):
    """The first element of a slot is kept in 32 bits."""

    def keys(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        found = slots.long() * cache.stride(0) < 1 << 31
        return super().keys(cache, torch.where(found, slots, 0))


class SlotsInUint32(Attention):
    """The first element of a slot is kept in 32 bits without a sign."""

    def keys(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        found = slots.long() * cache.stride(0) < 1 << 32
        return super().keys(cache, torch.where(found, slots, 0))


class BytesInInt32(Attention):
    """The first byte of a slot is kept in 32 bits, and memory is read at whatever address results."""

    def keys(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        size = cache.element_size()
        first = (slots.long() * cache.stride(0) * size).to(torch.int32).long() // size
        return torch.stack([super(BytesInInt32, self).keys(self.at(cache, int(n)), slots[:1] * 0)[0] for n in first])

    def at(self, cache: torch.Tensor, first: int) -> torch.Tensor:
        """One slot that begins at element ``first`` of the cache."""
        return cache.as_strided((1, *cache.shape[1:]), cache.stride(), cache.storage_offset() + first)


class IndexPagesInInt32(Indexer):
    """The first byte of a page of index keys is kept in 32 bits."""

    def keys(self, cache: torch.Tensor, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = pages.long() * cache.stride(0) < 1 << 31
        return super().keys(cache, torch.where(found, pages, 0), length)


class IndexPagesInUint32(Indexer):
    """The first byte of a page of index keys is kept in 32 bits without a sign."""

    def keys(self, cache: torch.Tensor, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = pages.long() * cache.stride(0) < 1 << 32
        return super().keys(cache, torch.where(found, pages, 0), length)


class StoresInInt32(Store):
    """Keys whose slot begins beyond 2^31 elements go to slot 0."""

    def store_kv(self, cache: torch.Tensor, k: torch.Tensor, slots: torch.Tensor) -> None:
        super().store_kv(cache, k, torch.where(slots * cache.stride(0) < 1 << 31, slots, 0))


# Wrong in a captured graph only


class FreezesPlan(Capturable):
    """The largest length is looked up when a batch size comes for the first time, and kept."""

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        super().__init__(config, attention)
        self.plans: dict[int, int] = {}

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        lengths = metadata.seqlens_expanded
        if len(lengths) not in self.plans:
            self.plans[len(lengths)] = int(lengths.max())
        planned = lengths.clamp(max=self.plans[len(lengths)])
        return super().forward(inputs, caches, dataclasses.replace(metadata, seqlens_expanded=planned))


class KeepsFirst(Capturable):
    """A layer that can keep a tensor of each name and size from its first call on."""

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        super().__init__(config, attention)
        self.first: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def keep(self, name: str, values: torch.Tensor) -> torch.Tensor:
        if (name, values.shape) not in self.first:
            self.first[name, values.shape] = values.clone()
        return self.first[name, values.shape]


class ReturnsWarmUp(KeepsFirst):
    """The lse that is handed out was made outside the graph, which does not write it."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        return out, self.keep("lse", lse)


class ReadsOldCache(KeepsFirst):
    """Index keys are read from a copy that was made at the first call."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        old = self.keep("index_k", caches.index_k)
        outputs = super().forward(inputs, caches, metadata)
        logits = self.indexer_logits(
            inputs.index_q,
            inputs.index_weights,
            old,
            metadata.real_page_table,
            metadata.seqlens_expanded,
            metadata.max_seq_len_k,
        )
        return dataclasses.replace(outputs, logits=logits)


class AddsToWorkspace(KeepsFirst):
    """Attention adds its result to a workspace that nothing empties before the next replay."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        workspace = self.keep("out", torch.zeros_like(out))
        return workspace.add_(out.nan_to_num()).clone(), lse


class AttendsToLastReplay(KeepsFirst):
    """Attention sees the slots that the replay before selected."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        last = self.keep("indices", outputs.indices)
        out, lse = self.sparse_mla(inputs.q, caches.kv, last)
        last.copy_(outputs.indices)
        return AttentionOutputs(outputs.logits, outputs.indices, out, lse)


class LooksAtLengths(Capturable):
    """The host wants to know the largest length in every call."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        assert int(metadata.seqlens_expanded.max()) >= 0
        return super().forward(inputs, caches, metadata)


class UsesQueriesAsWorkspace(Capturable):
    """Queries are overwritten once they have been used."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        inputs.q.zero_()
        return outputs


class ClipsMetadataInGraph(Capturable):
    """What other layers of the model will read is clipped to K."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        metadata.seqlens_expanded.clamp_(max=self.config.index_topk)
        return outputs


class FirstStepStoresZeros(Capturable):
    """The first of several passes that write the same slots writes zeros, which the last writes over."""

    calls = 0

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        first = self.calls % self.config.speculative_num_steps == 0
        self.calls += 1
        super().store_cache(caches, dataclasses.replace(inputs, index_k=inputs.index_k * 0) if first else inputs)


class PaddingWritesToSlotOne(Capturable):
    """Rows of padding write to slot 1 instead of slot 0."""

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        slots = inputs.out_cache_loc.clamp(min=1)
        super().store_cache(caches, dataclasses.replace(inputs, out_cache_loc=slots))


class ScalesByWholeBatch(Capturable):
    """A factor that should be 1 is computed from the queries of all rows, those of padding included."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        largest = q.abs().amax()
        return super().sparse_mla(q * (largest / largest), kv_cache, indices)


class LeavesUnusedRows(Capturable):
    """The lse of a row without a key is 0."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        return out, lse.masked_fill(lse == -torch.inf, 0)


class SharesOutputs(KeepsFirst):
    """Clean: all calls of one size leave their results in the same buffers."""

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        positions = super().topk_indices(logits, seqlens_expanded)
        return self.keep("topk", positions).copy_(positions)

    def topk_transform_paged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor
    ) -> torch.Tensor:
        indices = super().topk_transform_paged(logits, seqlens_expanded, page_table_1)
        return self.keep("topk", indices).copy_(indices)

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        return self.keep("out", out).copy_(out), self.keep("lse", lse).copy_(lse)


# Not to be judged


class WithoutStages:
    """Has no method of a layer."""

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        pass


class ForSevenHeads(Capturable):
    """Is made for a size that is never drawn."""

    sizes: ClassVar[dict[str, tuple[object, ...]]] = {"num_heads": (7,)}


class ForRedOnes(Capturable):
    """Is made for something that layers do not have."""

    sizes: ClassVar[dict[str, tuple[object, ...]]] = {"colour": ("red",)}
