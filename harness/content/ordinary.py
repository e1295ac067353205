"""Content of the regime RANDOM: ordinary numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness.content.conversions import Ints, as_bf16, as_e4m3, bf16_bits, places_of
from nsa_oracle.harness.scenarios.rng import Stream
from nsa_oracle.reference.types import NUM_QUANT_TILES, AttentionConfig


class OrdinaryContent:
    """Sums of two uniform numbers, in (-2, 2), with a few large, tiny, denormal and zero parts.

    The tiny parts are whole tiles and whole index keys: a store that has a least scale would turn them into zeros.

    Computed with integers and with float32 operations that every machine rounds alike, without functions of a
    mathematical library.
    """

    def __init__(self, attention: AttentionConfig, seed: int) -> None:
        self.attention = attention
        self.key_stream = Stream(seed, "content random keys")
        self.index_key_stream = Stream(seed, "content random index keys")
        self.query_stream = Stream(seed, "content random queries")
        self.index_query_stream = Stream(seed, "content random index queries")

    def keys(self, slots: Ints, version: int) -> tuple[torch.Tensor, torch.Tensor]:
        places = places_of(slots, version)
        dim, rank = self.attention.qk_head_dim, self.attention.kv_lora_rank
        numbers, random = _noise(self.key_stream, places, dim)
        kinds = np.repeat(random[:, 8 : 8 + NUM_QUANT_TILES] % 16, self.attention.quant_tile, axis=1)
        numbers[:, :rank] *= np.where(kinds == 1, _TINY, np.float32(1))
        k = _with_denormals(bf16_bits(numbers), random)
        k[:, :rank][kinds == 0] = 0
        numbers, random = _noise(self.index_key_stream, places, self.attention.index_head_dim)
        numbers *= np.where(random[:, 8:9] % 64 == 1, _TINY, np.float32(1))
        index_k = _with_denormals(bf16_bits(numbers), random)
        index_k[random[:, 8] % 64 == 0] = 0
        return as_bf16(k), as_bf16(index_k)

    def queries(
        self, places: Sequence[tuple[int, int]], candidates: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attention, n = self.attention, len(places)
        heads, index_heads, index_dim = attention.num_heads, attention.index_n_heads, attention.index_head_dim
        numbers, random = _noise(self.query_stream, places, heads * attention.qk_head_dim)
        q = as_bf16(_with_denormals(bf16_bits(numbers), random)).view(n, heads, attention.qk_head_dim)
        numbers, _ = _noise(self.index_query_stream, places, index_heads * (index_dim + 1))
        index_q = numbers[:, index_heads:].reshape(n, index_heads, index_dim) * np.float32(8)  # at most 256
        weights = numbers[:, :index_heads] * np.float32(1 / 8)
        return q, as_e4m3(index_q), torch.from_numpy(weights)


_HEADER = 12
_TINY = np.float32(2**-60)  # a factor below any least scale; it makes no number denormal


def _noise(
    stream: Stream, places: Sequence[tuple[int, int]], count: int
) -> tuple[NDArray[np.float32], NDArray[np.uint16]]:
    """[n, count] float32 numbers, and [n, 12] random 16-bit numbers, of which the first three are already used.

    Each row is scaled by 1/2, 1 or 2. Then an eighth of its elements are made so small, relative to the others, that
    they are denormal in e4m3, and two elements eight times as large.
    """
    random = stream.halves_at(places, _HEADER + 2 * count)
    numbers = (random[:, _HEADER::2].astype(np.int32) + random[:, _HEADER + 1 :: 2] - 65535).astype(np.float32)
    numbers *= np.array([2**-16, 2**-15, 2**-14], dtype=np.float32)[random[:, :1] % 3]
    numbers *= np.where(random[:, _HEADER::2] % 8 == 0, np.float32(2**-14), np.float32(1))
    outliers = random[:, 1:3].astype(np.int64) * count >> 16
    np.put_along_axis(numbers, outliers, 8 * np.take_along_axis(numbers, outliers, axis=1), axis=1)
    return numbers, random[:, :_HEADER]


def _with_denormals(bits: NDArray[np.uint16], random: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Make two elements of each row of bf16 ``bits`` [n, count] denormal, in place, by numbers 3 to 6 of ``random``.

    Works on bits, because the processor may be set to flush denormals.
    """
    places = random[:, 3:5].astype(np.int64) * bits.shape[1] >> 16
    np.put_along_axis(bits, places, random[:, 5:7] & 0x807F, axis=1)
    return bits
