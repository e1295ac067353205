"""Edge-case keys for the store called by itself: values that a model's keys rarely contain. Reports: *made-up keys*.

Each row has one kind: in some of its tiles a NaN, an infinity, zeros of both signs, denormals, the largest finite
number, numbers half-way between two e4m3 codes, or one magnitude alone. Its other tiles are ordinary. An index key is
one tile, and so always of the row's kind. The RoPE part has arbitrary bits, which the store must not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness.content.conversions import Ints, as_bf16
from nsa_oracle.harness.content.key_kinds import KeyKind
from nsa_oracle.harness.scenarios.rng import Stream, coprime_step
from nsa_oracle.harness.scenarios.setup import Setup
from nsa_oracle.reference.types import NUM_QUANT_TILES, AttentionConfig, AttentionInputs

Bf16Bits = NDArray[np.uint16]  # bf16 numbers as bits, so that no processor flushes a denormal or quietens a NaN


@dataclass(frozen=True)
class EdgeKeys:
    """Rows to store, each of one kind, in distinct slots; perhaps a row of padding behind them. Tensors are on the CPU.

    inputs: keys, index keys and slots; the inputs that the store does not read are 0.
    """

    kinds: tuple[KeyKind, ...]
    inputs: AttentionInputs

    def with_padding(self) -> EdgeKeys:
        """The same rows, then one that stands for no token: a key like the first one's, for slot -1."""
        padded = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in vars(self.inputs).items()}
        padded["out_cache_loc"][-1] = -1
        return EdgeKeys(self.kinds, AttentionInputs(**padded))

    def kind_in(self, slot: int) -> KeyKind | None:
        """The kind of the row that is stored in ``slot``, or None."""
        slots = self.inputs.out_cache_loc.tolist()
        return self.kinds[slots.index(slot)] if slot in slots else None


def edge_keys(setup: Setup, config: AttentionConfig, seed: int, run: int, call: int) -> EdgeKeys:
    """The rows for call number ``call`` of run number ``run`` of a scenario.

    There is one row of each kind, or as many as the setup has slots; none is on the dummy page.
    """
    slots = np.arange(setup.page_size, setup.num_slots)
    count = min(len(KeyKind), len(slots))
    kinds = tuple(list(KeyKind)[(call + row) % len(KeyKind)] for row in range(count))
    places = [(call, row) for row in range(count)]
    rank, rope, index_dim = config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim
    # For the row, for each tile, for each of their elements, and for the RoPE part, which comes last.
    numbers = 2 + 2 * (NUM_QUANT_TILES + 1) + 3 * (rank + index_dim) + rope
    random = Stream(seed, f"made-up keys {run}").halves_at(places, numbers)
    keys = np.empty((count, config.qk_head_dim), dtype=np.uint16)
    index_keys = np.empty((count, index_dim), dtype=np.uint16)
    for row, kind in enumerate(kinds):
        words = iter(random[row, 1:].astype(np.int64))
        chosen = next(words) % ((1 << NUM_QUANT_TILES) - 1) + 1  # a bit for each tile; at least one is set
        for tile in range(NUM_QUANT_TILES):
            begin = tile * config.quant_tile
            draw = _KeyDraw.of(words, config.quant_tile)
            ordinary = not chosen >> tile & 1
            keys[row, begin : begin + config.quant_tile] = draw.ordinary if ordinary else _TILES[kind](draw)
        index_keys[row] = _TILES[kind](_KeyDraw.of(words, index_dim))
        keys[row, rank:] = random[row, -rope:]
    first = int(random[0, 0]) if count else 0
    where = slots[(first + np.arange(count)) * coprime_step(len(slots)) % len(slots)]
    return EdgeKeys(
        kinds,
        AttentionInputs(
            q=torch.zeros(count, config.num_heads, config.qk_head_dim, dtype=torch.bfloat16),
            k=as_bf16(keys),
            index_q=torch.zeros(count, config.index_n_heads, index_dim).to(torch.float8_e4m3fn),
            index_weights=torch.zeros(count, config.index_n_heads),
            index_k=as_bf16(index_keys),
            out_cache_loc=torch.from_numpy(where),
        ),
    )


# The values of a tile

_SIGN = 1 << 15
_INF, _LARGEST = 0x7F80, 0x7F7F
_NANS = np.array([0x7FC0, 0xFFC0, 0x7F81, 0xFFFF], dtype=np.uint16)
_CODES: NDArray[np.float32] = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


@dataclass(frozen=True)
class _KeyDraw:
    """Random 16-bit numbers for a tile of n elements: choice and place (an element) once, the others [n]."""

    choice: int
    place: int
    order: Ints
    values: Ints
    signs: Bf16Bits

    @staticmethod
    def of(words: Iterator[np.int64], size: int) -> _KeyDraw:
        choice, place = int(next(words)), int(next(words)) % size
        order, values, signs = (np.fromiter(words, np.int64, size) for _ in range(3))
        return _KeyDraw(choice, place, order, values, ((signs & 1) * _SIGN).astype(np.uint16))

    @property
    def ordinary(self) -> Bf16Bits:
        """Magnitudes from 2^-7 to below 4."""
        exponents = 120 + self.order % 9
        return (exponents << 7 | self.values % 128).astype(np.uint16) | self.signs

    def with_one(self, bits: Bf16Bits, number: int) -> Bf16Bits:
        """``bits`` with ``number`` at ``place``, written in place."""
        bits[self.place] = number
        return bits


def _nan(draw: _KeyDraw) -> Bf16Bits:
    return draw.with_one(draw.ordinary, int(_NANS[draw.choice % len(_NANS)]))


def _infinite(draw: _KeyDraw) -> Bf16Bits:
    return draw.with_one(draw.ordinary, _INF | int(draw.signs[draw.place]))


def _zeros(draw: _KeyDraw) -> Bf16Bits:
    return draw.signs


def _denormal(draw: _KeyDraw) -> Bf16Bits:
    return (draw.values % 127 + 1).astype(np.uint16) | draw.signs


def _largest(draw: _KeyDraw) -> Bf16Bits:
    return draw.with_one(draw.ordinary, _LARGEST | int(draw.signs[draw.place]))


def _halfway(draw: _KeyDraw) -> Bf16Bits:
    """The largest is 448 times the scale, a power of two; all others are half-way between neighbouring codes."""
    codes = draw.values % (len(_CODES) - 1)
    numbers = (_CODES[codes] + _CODES[codes + 1]) / 2  # at most 5 significant bits; bf16 has 8
    numbers[draw.place] = _CODES[-1]
    scaled: NDArray[np.float32] = np.ldexp(numbers, draw.choice % 64 - 32)
    return (scaled.view(np.uint32) >> 16).astype(np.uint16) | draw.signs


def _equal(draw: _KeyDraw) -> Bf16Bits:
    magnitude = (127 - 64 << 7) + draw.choice % (128 << 7)  # 2^-64 to below 2^64
    return draw.signs | np.uint16(magnitude)


_TILES: dict[KeyKind, Callable[[_KeyDraw], Bf16Bits]] = {
    KeyKind.NAN: _nan,
    KeyKind.INFINITE: _infinite,
    KeyKind.ZEROS: _zeros,
    KeyKind.DENORMAL: _denormal,
    KeyKind.LARGEST: _largest,
    KeyKind.HALFWAY: _halfway,
    KeyKind.EQUAL: _equal,
}
