"""Index keys and index queries of the exact regimes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nsa_oracle.harness.content.conversions import Ints, Small, places_of, signs_of
from nsa_oracle.harness.scenarios.rng import Stream
from nsa_oracle.harness.scenarios.setup import MAX_CODE_BITS, Regime
from nsa_oracle.reference.types import AttentionConfig

EXTREME = 7  # in eighths, before the tile's multiplier m: the scale is 7/8 m / 448 = m 2^-9

_INDEX_MULTIPLIERS: Small = np.array([1, 2, 4, 4], dtype=np.int16)

MIN_INDEX_DIM = 16


class CodeWords:
    """A code word of +-1 for each slot: the bits of a scrambled slot number, repeated to fill ``width`` elements.

    Slots below 2^bits have distinct words, because the scramble is a bijection of the bits: multiplication by an odd
    number, addition and xor with a right shift are each invertible.
    """

    def __init__(self, stream: Stream, width: int) -> None:
        self.width = width
        self.bits = min(width, MAX_CODE_BITS)
        self._factors = [2 * n + 1 for n in stream.integers(2, 1 << 20)]
        self._offset = stream.integers(1, 1 << 20)[0]

    def words(self, slots: Ints) -> Small:
        """[...] slots -> [..., width] of +-1."""
        mask, shift = (1 << self.bits) - 1, (self.bits + 1) // 2
        x = ((slots & mask) * self._factors[0] + self._offset) & mask  # below 2^24 * 2^21: no overflow
        x = ((x ^ (x >> shift)) * self._factors[1]) & mask
        x ^= x >> shift
        signs = signs_of(x[..., None] >> np.arange(self.bits))
        return np.take(signs, np.arange(self.width) % self.bits, axis=-1)

    def check(self, slots: Ints) -> None:
        if slots.size and slots.max() >= 1 << self.bits:
            raise ValueError(f"slot {slots.max()} has no code of its own: codes have {self.bits} bits")


class IndexKeys:
    """Index keys and queries of the exact regimes.

    The elements of a key are multiples of 1/8, and its amax is 7/8 m with m of 1, 2 or 4. So its scale is 2^-9 m, and
    its e4m3 values are key / scale. The last element is 7/8.

    DOMINATING: the slot's code times 7/8, then an element of +-7/8 m that varies the scale and that no query reads.
    LATTICE and EQUAL: +-{0..7}/8 m. Half of the keys are one of six patterns of the seed, so that ties are frequent; in
    LATTICE one of the six is zero. Queries read the last element alone in EQUAL, and all the others in LATTICE.
    """

    _PATTERNS = 6

    def __init__(self, attention: AttentionConfig, regime: Regime, seed: int) -> None:
        self.regime = regime
        self.heads, self.dim = attention.index_n_heads, attention.index_head_dim
        self.code = CodeWords(Stream(seed, "content index code"), self.dim - 2)
        self.stream = Stream(seed, "content index keys")
        places = [(pattern, 0) for pattern in range(self._PATTERNS)]
        self.patterns = self._lattice(Stream(seed, "content index patterns").bytes_at(places, self.dim + 1))
        if regime is Regime.LATTICE:
            self.patterns[0] = 0

    @property
    def query_bytes(self) -> int:
        """Random bytes that ``queries`` needs for a row."""
        return self.heads * (self.dim + 1)

    def eighths(self, slots: Ints, version: int) -> Small:
        """Keys [n, ID], in eighths."""
        random = self.stream.bytes_at(places_of(slots, version), self.dim + 2)
        if self.regime is Regime.DOMINATING:
            return self._coded(slots, random)
        shared, which = random[:, 0] % 2 == 0, (random[:, 0] >> 1) % self._PATTERNS
        return np.where(shared[:, None], self.patterns[which], self._lattice(random[:, 1:]))

    def _coded(self, slots: Ints, random: NDArray[np.uint8]) -> Small:
        self.code.check(slots)
        eighths = np.empty((len(slots), self.dim), dtype=np.int16)
        eighths[:, :-2] = EXTREME * self.code.words(slots)
        eighths[:, -2] = EXTREME * _INDEX_MULTIPLIERS[random[:, 0] % 4] * signs_of(random[:, 1])
        eighths[:, -1] = EXTREME
        return eighths

    def _lattice(self, random: NDArray[np.uint8]) -> Small:
        """[n, dim + 1] random bytes -> [n, ID] eighths with amax 7 m, which an element before the last has."""
        multipliers = _INDEX_MULTIPLIERS[random[:, 0] % 4]
        levels = (random[:, 1:] % 15).astype(np.int16) - EXTREME
        extreme = (random[:, :1] >> 2).astype(np.int64) * (self.dim - 1) // 64
        np.put_along_axis(levels, extreme, EXTREME * signs_of(random[:, 1:2]), axis=1)
        eighths = levels * multipliers[:, None]
        eighths[:, -1] = EXTREME
        return eighths

    def queries(self, random: NDArray[np.uint8], targets: Ints) -> tuple[Small, NDArray[np.float32]]:
        """[n, query_bytes] random bytes and the slots [n] to score highest -> index_q [n, IH, ID], weights [n, IH].

        Only DOMINATING uses the slots.
        """
        random = random.reshape(len(random), self.heads, self.dim + 1)
        weights = (random[..., 0] % 17).astype(np.int16) - 8
        index_q = np.zeros((len(random), self.heads, self.dim), dtype=np.int16)
        match self.regime:
            case Regime.DOMINATING:  # a negative weight has a negated query, so that it subtracts nothing at the target
                signs = signs_of(random[..., 1])
                signs[:, 0] = 1
                weights = signs * (1 + random[..., 0] % 8).astype(np.int16)
                factors = signs * (1 + random[..., 2] % 2).astype(np.int16)
                index_q[..., :-2] = factors[..., None] * self.code.words(targets)[:, None]
            case Regime.EQUAL:
                index_q[..., -1] = random[..., 1] % 7
                index_q[..., -1] -= 2
            case _:
                table = np.array([0, 0, 0, 0, 1, -1, 2, -2], dtype=np.int16)
                index_q[..., :-1] = table[random[..., 2:] % 8]
        return index_q, weights.astype(np.float32) * np.float32(1 / 8)
