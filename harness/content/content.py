"""What is in the attention inputs: keys, queries and weights as a pure function of a seed, a regime and a place.

A key depends on the slot it is written to and on the *version*, the number of the forward pass that writes it: rows
that write one slot in one pass agree, and a key left over from an older pass is another one. A query depends on its id
(pool row and draft token) and the version. Neither depends on its place in the batch.

In the exact regimes (all but RANDOM) every intermediate of the layer is representable, so that the true answer has one
bit pattern whatever the order of summation, the tiles or the splits; ``harness.exactness`` proves and checks it. Their
key, in the order of its elements:

- Latent part, which is the value too: multiples of 1/8. Each of the four quant tiles has one extreme element, +-7/8 m
  with the tile's m drawn from 0 (the whole tile is zero, but never all four), 1, 2, 4; some *score elements* 0, 1/8 or
  2/8 (0 in a zero tile); and payload elements that spell (slot, version) in digits of three bits: {+-1..+-4}/8 m, each
  digit at least once in every tile, more often where the tile has room. Which element of a tile is what depends on the
  seed.
- RoPE part: the bits of the slot as +-1 (scrambled by the seed, so that neighbours differ in many), repeated to fill
  it, then a constant 1.
- Index key: see ``_IndexKeys``.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness.scenarios.rng import Stream
from nsa_oracle.reference.types import NUM_QUANT_TILES, AttentionConfig

Ints = NDArray[np.int64]
Small = NDArray[np.int16]

MAX_SLOTS = 1 << 24
VERSIONS = 1 << 12  # content of version v and v + VERSIONS is the same

_DIGIT_BITS = 3
_SLOT_DIGITS = 8
_VERSION_DIGITS = 4
_NUM_DIGITS = _SLOT_DIGITS + _VERSION_DIGITS
_DIGIT_LEVELS: Small = np.array([-4, -3, -2, -1, 1, 2, 3, 4], dtype=np.int16)
_EXTREME = 7  # eighths, before the tile's multiplier: scale = 7/8 m / 448 = m 2^-9
_MULTIPLIERS: Small = np.array([0, 1, 2, 4, 1, 2, 4, 4], dtype=np.int16)  # of a latent tile, equally likely
_INDEX_MULTIPLIERS: Small = np.array([1, 2, 4, 4], dtype=np.int16)
_MAX_CODE_BITS = 24
_SCORE_QUERY = 8  # times a score element of 0, 1/8, 2/8: an integer
_DOMINATING_QUERY = 128  # two codes differ in one element at least: 2 * 128 between the best score and the next
_MIN_TILE = 1 + _NUM_DIGITS + 3
_MIN_ROPE = 4
_MIN_INDEX_DIM = 16


class Regime(enum.Enum):
    """Kind of content, the simplest first."""

    DOMINATING = "dominating"  # one key has all the weight: an output is its value, which spells the slot it lay in
    EQUAL = "equal"  # all keys weigh the same and all index scores are equal
    LATTICE = "lattice"  # weights 2^0 .. 2^-8, many tied index scores
    RANDOM = "random"  # ordinary numbers; nothing is exact

    @property
    def is_exact(self) -> bool:
        """Whether the answer has one bit pattern, if sm_scale is ln 2."""
        return self is not Regime.RANDOM


class Origin(NamedTuple):
    """Where a value was written, and by which forward pass (modulo VERSIONS)."""

    slot: int
    version: int


class Content:
    """The content of one layer's inputs. All tensors are on the CPU."""

    def __init__(self, attention: AttentionConfig, regime: Regime, seed: int) -> None:
        """Raises ValueError for sizes too small to hold the structure of an exact regime."""
        self.attention = attention
        self.regime = regime
        self._source: _Exact | _Random = (
            _Exact(attention, regime, seed) if regime.is_exact else _Random(attention, seed)
        )

    def keys(self, slots: Sequence[int], version: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys that pass ``version`` writes to ``slots``: k bf16 [n, qk_head_dim], index_k bf16 [n, index_head_dim]."""
        numbers = np.asarray(slots, dtype=np.int64).reshape(-1)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < MAX_SLOTS:
            raise ValueError(f"slots must lie in 0..{MAX_SLOTS - 1}")
        return self._source.keys(numbers, version % VERSIONS)

    def queries(
        self, ids: Sequence[tuple[int, int]], version: int, candidates: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries of the rows named by ``ids`` (pool row, draft token) in pass ``version``.

        candidates[i]: slots that row i certainly attends to, none if it attends to nothing. All of its visible slots,
        or, if it sees more than index_topk, exactly one. DOMINATING directs its heads at them, and gives the first the
        uniquely highest index score; the other regimes ignore them.

        Returns q bf16 [n, H, qk_head_dim], index_q float8_e4m3fn [n, IH, ID], index_weights float32 [n, IH].
        """
        if len(ids) != len(candidates):
            raise ValueError(f"{len(ids)} ids, but candidates for {len(candidates)} rows")
        places = [((row << 32) | token, version % VERSIONS) for row, token in ids]
        return self._source.queries(places, candidates)

    def targets(self, row: tuple[int, int], version: int, candidates: Sequence[int]) -> list[int]:
        """DOMINATING: the slot that each head of a row attends to. See ``queries``."""
        if not isinstance(self._source, _Exact):
            raise ValueError("random content has no targets")
        return [int(s) for s in self._source.targets([((row[0] << 32) | row[1], version % VERSIONS)], [candidates])[0]]

    def decode(self, value: torch.Tensor) -> Origin | None:
        """Where ``value`` [kv_lora_rank], an output of the DOMINATING regime, was written, or None.

        Every element must be what was written there: a value put together from two keys, or changed at all, is None.
        """
        return self._source.decode(value) if isinstance(self._source, _Exact) else None

    def decode_slot(self, value: torch.Tensor) -> int | None:
        """The slot alone. See ``decode``."""
        origin = self.decode(value)
        return None if origin is None else origin.slot


def most_coded_slots(attention: AttentionConfig) -> int:
    """How many slots have a key of their own in the DOMINATING regime."""
    return 1 << min(attention.qk_rope_head_dim - 1, _MAX_CODE_BITS)


class _Code:
    """A code word of +-1 for each slot: the bits of a scrambled slot number, repeated to ``width`` elements.

    Distinct for slots below 2^bits, for the scramble is a bijection of the bits: multiplication by an odd number,
    addition and a right shift that is xored in can each be undone.
    """

    def __init__(self, stream: Stream, width: int) -> None:
        self.width = width
        self.bits = min(width, _MAX_CODE_BITS)
        self._factors = [2 * n + 1 for n in stream.integers(2, 1 << 20)]
        self._offset = stream.integers(1, 1 << 20)[0]

    def words(self, slots: Ints) -> Small:
        """[...] slots -> [..., width] of +-1."""
        mask, shift = (1 << self.bits) - 1, (self.bits + 1) // 2
        x = ((slots & mask) * self._factors[0] + self._offset) & mask  # below 2^24 * 2^21: no overflow
        x = ((x ^ (x >> shift)) * self._factors[1]) & mask
        x ^= x >> shift
        signs = _signs(x[..., None] >> np.arange(self.bits))
        return np.take(signs, np.arange(self.width) % self.bits, axis=-1)

    def check(self, slots: Ints) -> None:
        if slots.size and slots.max() >= 1 << self.bits:
            raise ValueError(f"slot {slots.max()} has no code of its own: {self.bits} bits are all there is room for")


@dataclass(frozen=True)
class _ValueLayout:
    """Which element of the latent part holds what. Four tiles of the same make-up, each shuffled by the seed."""

    tile_of: Ints  # [rank]
    extremes: Ints  # [tiles]
    scores: Ints  # [tiles * scores of a tile]
    payload: Ints  # [payload elements]
    digits: Ints  # [payload elements]: which digit each holds

    @staticmethod
    def of(attention: AttentionConfig, seed: int) -> _ValueLayout:
        tile = attention.quant_tile
        stream = Stream(seed, "content value layout")
        order = np.stack([tile * t + np.array(stream.permutation(tile)) for t in range(NUM_QUANT_TILES)])
        scores_end = 1 + max(3, tile // 5)
        payload = order[:, scores_end:]
        digits = np.broadcast_to(np.arange(payload.shape[1]) % _NUM_DIGITS, payload.shape)
        return _ValueLayout(
            tile_of=np.repeat(np.arange(NUM_QUANT_TILES), tile),
            extremes=order[:, 0],
            scores=order[:, 1:scores_end].reshape(-1),
            payload=payload.reshape(-1),
            digits=digits.reshape(-1),
        )


class _Exact:
    """Content of the exact regimes, built in small integers: eighths for keys."""

    def __init__(self, attention: AttentionConfig, regime: Regime, seed: int) -> None:
        _check_sizes(attention)
        self.attention = attention
        self.regime = regime
        self.layout = _ValueLayout.of(attention, seed)
        self.rope_code = _Code(Stream(seed, "content rope code"), attention.qk_rope_head_dim - 1)
        self.index_keys = _IndexKeys(attention, regime, seed)
        self.key_stream = Stream(seed, "content keys")
        self.query_stream = Stream(seed, "content queries")
        self.index_query_stream = Stream(seed, "content index queries")

    def keys(self, slots: Ints, version: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.regime is Regime.DOMINATING:
            self.rope_code.check(slots)
        eighths = np.empty((len(slots), self.attention.qk_head_dim), dtype=np.int16)
        rank = self.attention.kv_lora_rank
        eighths[:, :rank] = self._values(slots, version)
        eighths[:, rank:-1] = 8 * self.rope_code.words(slots)
        eighths[:, -1] = 8
        return _bf16_of_integers(eighths, 1 / 8), _bf16_of_integers(self.index_keys.eighths(slots, version), 1 / 8)

    def _values(self, slots: Ints, version: int) -> Small:
        """Latent parts [n, rank] in eighths."""
        layout, tiles = self.layout, NUM_QUANT_TILES
        random = self.key_stream.bytes_at(_places(slots, version), 2 * tiles + 1 + len(layout.scores))
        multipliers = _MULTIPLIERS[random[:, :tiles] % 8]
        nothing = np.flatnonzero(~multipliers.any(axis=1))
        multipliers[nothing, random[nothing, 2 * tiles] % tiles] = 1
        by_element = multipliers[:, layout.tile_of]

        eighths = np.zeros((len(slots), self.attention.kv_lora_rank), dtype=np.int16)
        eighths[:, layout.extremes] = _signs(random[:, tiles : 2 * tiles]) * _EXTREME * multipliers
        eighths[:, layout.scores] = random[:, 2 * tiles + 1 :] % 3 * (by_element[:, layout.scores] > 0)
        levels = _DIGIT_LEVELS[_digits(slots, version)][:, layout.digits]
        eighths[:, layout.payload] = levels * by_element[:, layout.payload]
        return eighths

    def decode(self, value: torch.Tensor) -> Origin | None:
        scaled = value.detach().to("cpu", torch.float64).numpy() * 8
        if scaled.shape != (self.attention.kv_lora_rank,) or not np.isin(scaled, np.arange(-28, 29)).all():
            return None
        eighths = scaled.astype(np.int16)
        origin = self._read_digits(eighths)
        if origin is None or not np.array_equal(self._values(np.array([origin.slot]), origin.version)[0], eighths):
            return None
        return origin

    def _read_digits(self, eighths: Small) -> Origin | None:
        """What the first tile that is not zero spells."""
        layout = self.layout
        multipliers = np.abs(eighths[layout.extremes]) // _EXTREME
        tile = int(np.argmax(multipliers > 0))
        first = int(np.argmax(layout.tile_of[layout.payload] == tile))
        places = layout.payload[first : first + _NUM_DIGITS]  # a tile's payload begins with each digit once
        if multipliers[tile] == 0 or (eighths[places] % multipliers[tile]).any():
            return None
        levels = eighths[places] // multipliers[tile]
        if not np.isin(levels, _DIGIT_LEVELS).all():
            return None
        digits = np.searchsorted(_DIGIT_LEVELS, levels)
        number = sum(int(digit) << (_DIGIT_BITS * i) for i, digit in enumerate(digits))
        return Origin(number % MAX_SLOTS, number // MAX_SLOTS)

    def queries(
        self, places: Sequence[tuple[int, int]], candidates: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        match self.regime:
            case Regime.DOMINATING:
                q = self._dominating_queries(places, candidates)
            case Regime.EQUAL:
                q = self._equal_queries(places)
            case _:
                q = self._lattice_queries(places)
        firsts = np.array([slots[0] if slots else 0 for slots in candidates], dtype=np.int64)
        random = self.index_query_stream.bytes_at(places, self.index_keys.query_bytes)
        index_q, weights = self.index_keys.queries(random, firsts)
        return _bf16_of_integers(q, 1), _e4m3(index_q.astype(np.float32)), torch.from_numpy(weights)

    def _lattice_queries(self, places: Sequence[tuple[int, int]]) -> Small:
        """[n, H, qk_head_dim]: two score elements and two code elements of each head, and the constant element."""
        attention, scores = self.attention, self.layout.scores
        random = self._query_bytes(places).astype(np.int64)  # [n, H, 8]
        q = np.zeros((*random.shape[:2], attention.qk_head_dim), dtype=np.int16)
        bits = random[..., 4]
        pairs = (
            (scores[_two_of(random[..., 0], random[..., 1], len(scores))], _SCORE_QUERY),
            (attention.kv_lora_rank + _two_of(random[..., 2], random[..., 3], attention.qk_rope_head_dim - 1), 1),
        )
        for number, (elements, magnitude) in enumerate(pairs):
            signs = np.stack([_signs(bits >> (2 * number)), _signs(bits >> (2 * number + 1))], axis=-1)
            np.put_along_axis(q, elements, magnitude * signs, axis=-1)
        q[..., -1] = random[..., 5] % 7 - 3
        return q

    def _equal_queries(self, places: Sequence[tuple[int, int]]) -> Small:
        random = self._query_bytes(places).astype(np.int16)
        q = np.zeros((*random.shape[:2], self.attention.qk_head_dim), dtype=np.int16)
        q[..., -1] = random[..., 0] % 17 - 8
        return q

    def _dominating_queries(self, places: Sequence[tuple[int, int]], candidates: Sequence[Sequence[int]]) -> Small:
        """[n, H, qk_head_dim]: each head asks for the code of its target."""
        targets = self.targets(places, candidates)
        self.rope_code.check(targets)
        q = np.zeros((*targets.shape, self.attention.qk_head_dim), dtype=np.int16)
        q[..., self.attention.kv_lora_rank : -1] = _DOMINATING_QUERY * self.rope_code.words(targets)
        return q

    def targets(self, places: Sequence[tuple[int, int]], candidates: Sequence[Sequence[int]]) -> Ints:
        """[n, H] slots: the row's candidates in turn from a random one on, spread out if they outnumber the heads."""
        heads = np.arange(self.attention.num_heads)
        starts = self.query_stream.words_at(places, 1)[:, 0]
        targets = np.zeros((len(places), len(heads)), dtype=np.int64)
        for row, slots in enumerate(candidates):
            if slots:
                spread = int(starts[row]) % len(slots) + heads * max(1, len(slots) // len(heads))
                targets[row] = np.asarray(slots, dtype=np.int64)[spread % len(slots)]
        return targets

    def _query_bytes(self, places: Sequence[tuple[int, int]]) -> NDArray[np.uint8]:
        """[n, H, 8] random bytes."""
        heads = self.attention.num_heads
        return self.query_stream.bytes_at(places, 8 * heads).reshape(len(places), heads, 8)


class _IndexKeys:
    """Index keys and queries of the exact regimes.

    A key is a multiple of 1/8 whose amax is 7/8 m with m of 1, 2, 4: its scale is 2^-9 m, its e4m3 values are key /
    scale. The last element is 7/8.

    DOMINATING: the slot's code times 7/8, then an element of +-7/8 m that makes the scale vary and that no query reads.
    LATTICE and EQUAL: +-{0..7}/8 m. Half of the keys are one of six patterns of the seed, so that ties are frequent; in
    LATTICE one of the six is zero. EQUAL's queries read the last element alone, LATTICE's all the others.
    """

    _PATTERNS = 6

    def __init__(self, attention: AttentionConfig, regime: Regime, seed: int) -> None:
        self.regime = regime
        self.heads, self.dim = attention.index_n_heads, attention.index_head_dim
        self.code = _Code(Stream(seed, "content index code"), self.dim - 2)
        self.stream = Stream(seed, "content index keys")
        places = [(pattern, 0) for pattern in range(self._PATTERNS)]
        self.patterns = self._lattice(Stream(seed, "content index patterns").bytes_at(places, self.dim + 1))
        if regime is Regime.LATTICE:
            self.patterns[0] = 0

    @property
    def query_bytes(self) -> int:
        """Random bytes that ``queries`` wants for a row."""
        return self.heads * (self.dim + 1)

    def eighths(self, slots: Ints, version: int) -> Small:
        """[n, ID] keys in eighths."""
        random = self.stream.bytes_at(_places(slots, version), self.dim + 2)
        if self.regime is Regime.DOMINATING:
            return self._coded(slots, random)
        shared, which = random[:, 0] % 2 == 0, (random[:, 0] >> 1) % self._PATTERNS
        return np.where(shared[:, None], self.patterns[which], self._lattice(random[:, 1:]))

    def _coded(self, slots: Ints, random: NDArray[np.uint8]) -> Small:
        self.code.check(slots)
        eighths = np.empty((len(slots), self.dim), dtype=np.int16)
        eighths[:, :-2] = _EXTREME * self.code.words(slots)
        eighths[:, -2] = _EXTREME * _INDEX_MULTIPLIERS[random[:, 0] % 4] * _signs(random[:, 1])
        eighths[:, -1] = _EXTREME
        return eighths

    def _lattice(self, random: NDArray[np.uint8]) -> Small:
        """[n, dim + 1] random bytes -> [n, ID] eighths with amax 7 m, reached somewhere before the last element."""
        multipliers = _INDEX_MULTIPLIERS[random[:, 0] % 4]
        levels = (random[:, 1:] % 15).astype(np.int16) - _EXTREME
        extreme = (random[:, :1] >> 2).astype(np.int64) * (self.dim - 1) // 64
        np.put_along_axis(levels, extreme, _EXTREME * _signs(random[:, 1:2]), axis=1)
        eighths = levels * multipliers[:, None]
        eighths[:, -1] = _EXTREME
        return eighths

    def queries(self, random: NDArray[np.uint8], targets: Ints) -> tuple[Small, NDArray[np.float32]]:
        """[n, query_bytes] random bytes and the slots [n] to prefer -> index_q [n, IH, ID], weights [n, IH]."""
        random = random.reshape(len(random), self.heads, self.dim + 1)
        weights = (random[..., 0] % 17).astype(np.int16) - 8
        index_q = np.zeros((len(random), self.heads, self.dim), dtype=np.int16)
        match self.regime:
            case Regime.DOMINATING:  # a head with a negative weight asks for the opposite, and takes nothing off there
                signs = _signs(random[..., 1])
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


class _Random:
    """Ordinary numbers: the sum of two uniform ones, in (-2, 2), with a few large, tiny, denormal and zero parts.

    Tiny ones are whole tiles, and whole index keys, that a least scale would make zeros of.

    Made of integers and of float32 operations that every machine rounds alike; no function of a mathematical library.
    """

    def __init__(self, attention: AttentionConfig, seed: int) -> None:
        self.attention = attention
        self.key_stream = Stream(seed, "content random keys")
        self.index_key_stream = Stream(seed, "content random index keys")
        self.query_stream = Stream(seed, "content random queries")
        self.index_query_stream = Stream(seed, "content random index queries")

    def keys(self, slots: Ints, version: int) -> tuple[torch.Tensor, torch.Tensor]:
        places = _places(slots, version)
        dim, rank = self.attention.qk_head_dim, self.attention.kv_lora_rank
        numbers, random = _noise(self.key_stream, places, dim)
        kinds = np.repeat(random[:, 8 : 8 + NUM_QUANT_TILES] % 16, self.attention.quant_tile, axis=1)
        numbers[:, :rank] *= np.where(kinds == 1, _TINY, np.float32(1))
        k = _with_denormals(_bf16_bits(numbers), random)
        k[:, :rank][kinds == 0] = 0
        numbers, random = _noise(self.index_key_stream, places, self.attention.index_head_dim)
        numbers *= np.where(random[:, 8:9] % 64 == 1, _TINY, np.float32(1))
        index_k = _with_denormals(_bf16_bits(numbers), random)
        index_k[random[:, 8] % 64 == 0] = 0
        return as_bf16(k), as_bf16(index_k)

    def queries(
        self, places: Sequence[tuple[int, int]], candidates: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attention, n = self.attention, len(places)
        heads, index_heads, index_dim = attention.num_heads, attention.index_n_heads, attention.index_head_dim
        numbers, random = _noise(self.query_stream, places, heads * attention.qk_head_dim)
        q = as_bf16(_with_denormals(_bf16_bits(numbers), random)).view(n, heads, attention.qk_head_dim)
        numbers, _ = _noise(self.index_query_stream, places, index_heads * (index_dim + 1))
        index_q = numbers[:, index_heads:].reshape(n, index_heads, index_dim) * np.float32(8)  # at most 256
        weights = numbers[:, :index_heads] * np.float32(1 / 8)
        return q, _e4m3(index_q), torch.from_numpy(weights)


_HEADER = 12
_TINY = np.float32(2**-60)  # below any least scale; nothing becomes denormal by it


def _noise(
    stream: Stream, places: Sequence[tuple[int, int]], count: int
) -> tuple[NDArray[np.float32], NDArray[np.uint16]]:
    """[n, count] float32 numbers, and [n, 12] random 16-bit ones, of which the first three are used up.

    Each row is scaled by 1/2, 1 or 2; then an eighth of its elements are made so small that they are denormal in e4m3
    beside the others, and two of them eight times as large.
    """
    random = stream.halves_at(places, _HEADER + 2 * count)
    numbers = (random[:, _HEADER::2].astype(np.int32) + random[:, _HEADER + 1 :: 2] - 65535).astype(np.float32)
    numbers *= np.array([2**-16, 2**-15, 2**-14], dtype=np.float32)[random[:, :1] % 3]
    numbers *= np.where(random[:, _HEADER::2] % 8 == 0, np.float32(2**-14), np.float32(1))
    outliers = random[:, 1:3].astype(np.int64) * count >> 16
    np.put_along_axis(numbers, outliers, 8 * np.take_along_axis(numbers, outliers, axis=1), axis=1)
    return numbers, random[:, :_HEADER]


def _with_denormals(bits: NDArray[np.uint16], random: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """bf16 ``bits`` [n, count] with two elements of each row made denormal, in place, by numbers 3 to 6 of ``random``.

    In bits, since the processor may have been told to flush denormals.
    """
    places = random[:, 3:5].astype(np.int64) * bits.shape[1] >> 16
    np.put_along_axis(bits, places, random[:, 5:7] & 0x807F, axis=1)
    return bits


def _places(slots: Ints, version: int) -> list[tuple[int, int]]:
    return [(int(slot), version) for slot in slots]


def _digits(slots: Ints, version: int) -> Ints:
    """[n] -> [n, 12]: the slot's and then the version's digits, the least significant first."""
    numbers = slots + MAX_SLOTS * version
    return (numbers[:, None] >> (_DIGIT_BITS * np.arange(_NUM_DIGITS))) & ((1 << _DIGIT_BITS) - 1)


def _signs(random: NDArray[np.generic]) -> Small:
    """+-1 by the lowest bit."""
    return ((random.astype(np.int64) & 1) * 2 - 1).astype(np.int16)


def _two_of(first: Ints, second: Ints, count: int) -> Ints:
    """Two random bytes -> [..., 2] different numbers below ``count``."""
    one = first % count
    return np.stack([one, (one + 1 + second % (count - 1)) % count], axis=-1)


def _bf16_of_integers(integers: Small, unit: float) -> torch.Tensor:
    """The integers times ``unit``, which must be representable: nothing is rounded."""
    bits = (integers.astype(np.float32) * np.float32(unit)).view(np.uint32) >> 16
    return as_bf16(bits.astype(np.uint16))


def _bf16_bits(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest even."""
    bits = numbers.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


def as_bf16(bits: NDArray[np.uint16]) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def _e4m3(numbers: NDArray[np.float32]) -> torch.Tensor:
    """Rounded to nearest even. The numbers must be at most 448."""
    return torch.from_numpy(numbers).to(torch.float8_e4m3fn)


def _check_sizes(attention: AttentionConfig) -> None:
    for name, size, least in (
        ("a quant tile", attention.quant_tile, _MIN_TILE),
        ("qk_rope_head_dim", attention.qk_rope_head_dim, _MIN_ROPE),
        ("index_head_dim", attention.index_head_dim, _MIN_INDEX_DIM),
    ):
        if size < least:
            raise ValueError(f"exact content needs {name} of at least {least}, not {size}")
