"""Layers that are wrong in attention."""

from __future__ import annotations

import math

import torch

from nsa_oracle.reference import kv_cache
from nsa_oracle.reference.layer import SparseAttention
from nsa_oracle.reference.types import KVCacheDtype


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
