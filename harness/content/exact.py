"""Content of the exact regimes, for which every intermediate result of the layer is representable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness.content.conversions import Ints, Small, as_e4m3, bf16_of_integers, places_of, signs_of
from nsa_oracle.harness.content.index_keys import EXTREME, MIN_INDEX_DIM, CodeWords, IndexKeys
from nsa_oracle.harness.scenarios.rng import Stream
from nsa_oracle.harness.scenarios.setup import Regime
from nsa_oracle.reference.types import NUM_QUANT_TILES, AttentionConfig

MAX_SLOTS = 1 << 24
VERSIONS = 1 << 12  # content of version v and v + VERSIONS is the same

_DIGIT_BITS = 3
_SLOT_DIGITS = 8
_VERSION_DIGITS = 4
_NUM_DIGITS = _SLOT_DIGITS + _VERSION_DIGITS
_DIGIT_LEVELS: Small = np.array([-4, -3, -2, -1, 1, 2, 3, 4], dtype=np.int16)

_TILE_MULTIPLIERS: Small = np.array([0, 1, 2, 4, 1, 2, 4, 4], dtype=np.int16)  # of a latent tile, each equally likely

_SCORE_QUERY = 8  # its product with a score element (0, 1/8 or 2/8) is an integer
_DOMINATING_QUERY = 128  # two codes differ in at least one element, so the best score leads by at least 2 * 128
_MIN_TILE = 1 + _NUM_DIGITS + 3
_MIN_ROPE = 4


class Origin(NamedTuple):
    """The slot that a value was written to, and the number of the pass that wrote it (modulo VERSIONS)."""

    slot: int
    version: int


@dataclass(frozen=True)
class _ValueLayout:
    """Positions in the latent part by role. All four tiles have the same structure; the seed shuffles each."""

    tile_of: Ints  # [rank]: the tile of each element
    extremes: Ints  # [tiles]
    scores: Ints  # [tiles * scores of a tile]
    payload: Ints  # [payload elements]
    digits: Ints  # [payload elements]: the digit that each one holds

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


class ExactContent:
    """Content of the exact regimes, computed in small integers; keys are counted in eighths."""

    def __init__(self, attention: AttentionConfig, regime: Regime, seed: int) -> None:
        _check_sizes(attention)
        self.attention = attention
        self.regime = regime
        self.layout = _ValueLayout.of(attention, seed)
        self.rope_code = CodeWords(Stream(seed, "content rope code"), attention.qk_rope_head_dim - 1)
        self.index_keys = IndexKeys(attention, regime, seed)
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
        return bf16_of_integers(eighths, 1 / 8), bf16_of_integers(self.index_keys.eighths(slots, version), 1 / 8)

    def _values(self, slots: Ints, version: int) -> Small:
        """Latent parts [n, rank] in eighths."""
        layout, tiles = self.layout, NUM_QUANT_TILES
        random = self.key_stream.bytes_at(places_of(slots, version), 2 * tiles + 1 + len(layout.scores))
        multipliers = _TILE_MULTIPLIERS[random[:, :tiles] % 8]
        nothing = np.flatnonzero(~multipliers.any(axis=1))
        multipliers[nothing, random[nothing, 2 * tiles] % tiles] = 1
        by_element = multipliers[:, layout.tile_of]

        eighths = np.zeros((len(slots), self.attention.kv_lora_rank), dtype=np.int16)
        eighths[:, layout.extremes] = signs_of(random[:, tiles : 2 * tiles]) * EXTREME * multipliers
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
        """Slot and version encoded in the first tile that is not zero, or None if it encodes none."""
        layout = self.layout
        multipliers = np.abs(eighths[layout.extremes]) // EXTREME
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
        return bf16_of_integers(q, 1), as_e4m3(index_q.astype(np.float32)), torch.from_numpy(weights)

    def _lattice_queries(self, places: Sequence[tuple[int, int]]) -> Small:
        """[n, H, qk_head_dim]: each head reads two score elements, two code elements and the constant element."""
        attention, scores = self.attention, self.layout.scores
        random = self._query_bytes(places).astype(np.int64)  # [n, H, 8]
        q = np.zeros((*random.shape[:2], attention.qk_head_dim), dtype=np.int16)
        bits = random[..., 4]
        pairs = (
            (scores[_two_of(random[..., 0], random[..., 1], len(scores))], _SCORE_QUERY),
            (attention.kv_lora_rank + _two_of(random[..., 2], random[..., 3], attention.qk_rope_head_dim - 1), 1),
        )
        for number, (elements, magnitude) in enumerate(pairs):
            signs = np.stack([signs_of(bits >> (2 * number)), signs_of(bits >> (2 * number + 1))], axis=-1)
            np.put_along_axis(q, elements, magnitude * signs, axis=-1)
        q[..., -1] = random[..., 5] % 7 - 3
        return q

    def _equal_queries(self, places: Sequence[tuple[int, int]]) -> Small:
        random = self._query_bytes(places).astype(np.int16)
        q = np.zeros((*random.shape[:2], self.attention.qk_head_dim), dtype=np.int16)
        q[..., -1] = random[..., 0] % 17 - 8
        return q

    def _dominating_queries(self, places: Sequence[tuple[int, int]], candidates: Sequence[Sequence[int]]) -> Small:
        """[n, H, qk_head_dim]: each head matches the code of its target."""
        targets = self.targets(places, candidates)
        self.rope_code.check(targets)
        q = np.zeros((*targets.shape, self.attention.qk_head_dim), dtype=np.int16)
        q[..., self.attention.kv_lora_rank : -1] = _DOMINATING_QUERY * self.rope_code.words(targets)
        return q

    def targets(self, places: Sequence[tuple[int, int]], candidates: Sequence[Sequence[int]]) -> Ints:
        """[n, H] slots: the row's candidates in order from a random one on, spread out if there are more than heads."""
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


def _digits(slots: Ints, version: int) -> Ints:
    """[n] -> [n, 12]: the digits of the slot, then those of the version, each least significant first."""
    numbers = slots + MAX_SLOTS * version
    return (numbers[:, None] >> (_DIGIT_BITS * np.arange(_NUM_DIGITS))) & ((1 << _DIGIT_BITS) - 1)


def _two_of(first: Ints, second: Ints, count: int) -> Ints:
    """Two random bytes -> [..., 2] distinct numbers below ``count``."""
    one = first % count
    return np.stack([one, (one + 1 + second % (count - 1)) % count], axis=-1)


def _check_sizes(attention: AttentionConfig) -> None:
    for name, size, least in (
        ("a quant tile", attention.quant_tile, _MIN_TILE),
        ("qk_rope_head_dim", attention.qk_rope_head_dim, _MIN_ROPE),
        ("index_head_dim", attention.index_head_dim, MIN_INDEX_DIM),
    ):
        if size < least:
            raise ValueError(f"exact content needs {name} of at least {least}, not {size}")
