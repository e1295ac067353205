"""Edge-case logits for top-k called by itself: values that scores rarely contain. Reports: *made-up logits*.

There is one row each with NaN, infinities, zeros of both signs, denormals, neighbouring floats, more ties than places,
one number alone, few tokens, numbers in order, the best of them at an end, and numbers of all magnitudes. Garbage that
top-k must not read follows each row. The contract defines the right answer: ties go to the lower position, zeros of
both signs tie, NaN counts as -inf, and no other two numbers tie.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness.content.conversions import Ints
from nsa_oracle.harness.scenarios.rng import Stream, coprime_step
from nsa_oracle.harness.scenarios.setup import Setup

FloatBits = NDArray[np.uint32]  # float32 numbers as bits, so that no processor flushes a denormal or quietens a NaN


class LogitKind(enum.Enum):
    """What a row of logits contains."""

    NAN = "NaN"
    INFINITE = "infinities"
    ZEROS = "zeros of both signs"
    DENORMAL = "denormals"
    NEIGHBOURS = "neighbouring floats"
    TIES = "more ties than places"
    EQUAL = "one number"
    FEW = "at most K tokens"
    SORTED = "numbers in order"
    EXPONENTS = "numbers of all magnitudes"


@dataclass(frozen=True)
class EdgeLogits:
    """Rows for top-k and its transforms, each of one kind. All tensors are on the CPU.

    logits: [n, W] float32. seqlens_expanded: [n] int32. page_table_1: [n, W] int32, with distinct slots in a row and
    the engine's sentinel in dead cells. topk_indices_offset: [n] int32.
    """

    kinds: tuple[LogitKind, ...]
    logits: torch.Tensor
    seqlens_expanded: torch.Tensor
    page_table_1: torch.Tensor
    topk_indices_offset: torch.Tensor


def edge_logits(setup: Setup, seed: int, run: int, call: int, sentinel: int) -> EdgeLogits:
    """The rows for call number ``call`` of run number ``run`` of a scenario.

    They are as wide as the page tables of a graph. If no row can have more than index_topk tokens, there are two rows,
    both FEW.
    """
    width, topk = setup.max_context_len, setup.index_topk
    kinds = tuple(LogitKind) if width > topk else (LogitKind.FEW, LogitKind.FEW)
    places = [(call, row) for row in range(len(kinds))]
    words = (Stream(seed, f"selection {run}").words_at(places, 4 + 2 * width) >> 1).astype(np.int64)  # 63 random bits
    lengths = [_length(kind, width, topk, int(row[0])) for kind, row in zip(kinds, words, strict=True)]
    bits = np.resize(_BEYOND, (len(kinds), width))
    for row, (kind, length) in enumerate(zip(kinds, lengths, strict=True)):
        _, choice, *_ = words[row, :4]
        order, values = words[row, 4 : 4 + length], words[row, 4 + width : 4 + width + length]
        bits[row, :length] = _ROWS[kind](_LogitDraw(topk, int(choice), order, values)) if length else ()
    slots = _slots(len(kinds), width, setup.num_slots, int(words[0, 2] % (1 << 16)))
    slots[np.arange(width) >= np.array(lengths)[:, None]] = sentinel
    return EdgeLogits(
        kinds,
        torch.from_numpy(bits.view(np.int32)).view(torch.float32),
        torch.tensor(lengths, dtype=torch.int32),
        torch.from_numpy(slots.astype(np.int32)),
        torch.from_numpy((words[:, 3] % (1 << 20)).astype(np.int32)),
    )


def _length(kind: LogitKind, width: int, topk: int, word: int) -> int:
    """Length of a row, chosen by ``word``: at most ``topk`` for FEW, else more."""
    if kind is LogitKind.FEW:
        choices = [n for n in (0, 1, topk - 1, topk) if n <= width]
    else:
        near = (topk + 1, topk + 2, 2 * topk + 1, (topk + width + 1) // 2, width - 1, width)
        choices = [n for n in near if topk < n <= width]
        if kind is LogitKind.SORTED:
            choices = choices[-2:]
    return choices[word % len(choices)]


def _slots(rows: int, width: int, slots: int, start: int) -> Ints:
    """[rows, width] slots below ``slots``, distinct within a row. ``slots`` must be at least ``width``."""
    places = start + np.arange(rows)[:, None] * (width // 2 + 1) + np.arange(width)
    return places * coprime_step(slots) % slots


# The values of a row

_SIGN = np.uint32(1 << 31)
_INF, _NEGATIVE_INF, _LARGEST = (np.uint32(bits) for bits in (0x7F800000, 0xFF800000, 0x7F7FFFFF))
_NANS: FloatBits = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], dtype=np.uint32)
_ONE_NUMBER: FloatBits = np.array([0x3FC00000, 0xC0000000, 0, _SIGN, 1, _INF, _NEGATIVE_INF, _NANS[0]], dtype=np.uint32)
_BEYOND: FloatBits = np.array([_NANS[0], _INF, _LARGEST, _NANS[3]], dtype=np.uint32)


@dataclass(frozen=True)
class _LogitDraw:
    """Random 63-bit numbers for a row of n tokens: choice once, order and values [n]. topk: places to fill."""

    topk: int
    choice: int
    order: Ints
    values: Ints

    @property
    def length(self) -> int:
        return len(self.values)

    @property
    def ranks(self) -> Ints:
        """A permutation of the tokens."""
        return np.argsort(np.argsort(self.order, kind="stable"), kind="stable")

    @property
    def ordinary(self) -> FloatBits:
        """Numbers in [-4, 4)."""
        return ((self.values % (1 << 23)).astype(np.float32) * np.float32(2**-20) - np.float32(4)).view(np.uint32)

    def tied(self, larger: FloatBits, tied: FloatBits, smaller: FloatBits, above: int | None = None) -> FloatBits:
        """A row in random order: ``above`` (default topk // 2) ``larger`` numbers, ``tied`` and ``smaller`` ones.

        There are more tied numbers than places left for them.
        """
        above = self.topk // 2 if above is None else above
        ranks, most = self.ranks, max(self.topk + 1, self.length - self.length // 4)
        return np.where(ranks < above, larger, np.where(ranks < most, tied, smaller))


def _nan(draw: _LogitDraw) -> FloatBits:
    nothing = np.where(draw.values % 3 == 0, _NEGATIVE_INF, _NANS[(draw.values >> 8) % 4])
    nothing[draw.ranks == draw.length - 1] = _NANS[draw.choice % 4]  # at least one NaN
    return draw.tied(draw.ordinary, nothing, nothing)


def _infinite(draw: _LogitDraw) -> FloatBits:
    if draw.choice % 2:
        return draw.tied(np.full_like(draw.ordinary, _INF), np.full_like(draw.ordinary, _INF), draw.ordinary)
    lowest = np.full_like(draw.ordinary, _NEGATIVE_INF)
    return draw.tied(np.where(draw.values % 5 == 0, _LARGEST, draw.ordinary), lowest, lowest)


def _zeros(draw: _LogitDraw) -> FloatBits:
    positive = draw.ordinary & ~_SIGN | np.uint32(1)
    row = draw.tied(positive, np.where(draw.values % 2, _SIGN, np.uint32(0)), positive | _SIGN)
    zeros = np.flatnonzero(row << np.uint32(1) == 0)
    row[zeros[0]], row[zeros[-1]] = _SIGN, 0  # ranked by sign, the last zero would get a place, which it must not
    return row


def _denormal(draw: _LogitDraw) -> FloatBits:
    row = (draw.values % 0x7FFFFF + 1).astype(np.uint32) | np.where(draw.order % 2, _SIGN, np.uint32(0))
    row[-1] = 0x7FFFFF  # the largest: a top-k that flushes denormals to zero leaves it out
    return row


def _neighbours(draw: _LogitDraw) -> FloatBits:
    ranks = draw.ranks
    ranks[ranks == draw.length - 1] = ranks[-1]
    ranks[-1] = draw.length - 1  # the largest is last: a top-k for which neighbours tie leaves it out
    first = 0x3F000000 + draw.choice // 2 % 0x1000000
    if draw.choice % 2:
        return (first + ranks).astype(np.uint32)
    return (first + draw.length - ranks).astype(np.uint32) | _SIGN


def _ties(draw: _LogitDraw) -> FloatBits:
    few = (draw.values % 0x10000).astype(np.uint32)
    two = np.full_like(few, 0x40000000) | np.where(draw.choice % 2, _SIGN, np.uint32(0))
    above = (draw.topk // 2, draw.topk - 1, 0)[draw.choice // 2 % 3]  # ties get about half, one or all of the places
    return draw.tied(np.uint32(0x40800000) + few, two, np.uint32(0xC0800000) + few, above)


def _equal(draw: _LogitDraw) -> FloatBits:
    return np.full(draw.length, _ONE_NUMBER[draw.choice % len(_ONE_NUMBER)])


def _sorted(draw: _LogitDraw) -> FloatBits:
    """The best tokens lie at one end of the row: a top-k that loses tokens there cannot be right by chance."""
    positions = np.arange(draw.length)
    ascending = (0x3F000000 + positions).astype(np.uint32)
    best_last = np.where(positions < draw.length - draw.topk, np.uint32(0x3F000000), ascending)
    return (best_last, ascending, ascending[::-1])[draw.choice % 3]


def _exponents(draw: _LogitDraw) -> FloatBits:
    """Numbers of any exponent, or only of those that half precision turns to infinity or to zero; no two are equal."""
    first, count = ((0, 255), (143, 112), (0, 102))[draw.choice // 2 % 3]
    exponents = (first + draw.order % count).astype(np.uint32)
    row = exponents << np.uint32(23) | np.uint32(draw.length) + draw.ranks.astype(np.uint32)  # mantissas that differ
    if draw.choice % 2:
        row |= np.where(draw.values % 2, _SIGN, np.uint32(0))
    # The best number is last: a top-k for which all of them tie leaves it out.
    row[-1] = np.uint32(first + count - 1) << np.uint32(23) | np.uint32(0x7FFFFF)
    return row


def _few(draw: _LogitDraw) -> FloatBits:
    anything = np.concatenate([_NANS, _ONE_NUMBER, draw.ordinary[:4]])
    return anything[draw.values % len(anything)]


_ROWS: dict[LogitKind, Callable[[_LogitDraw], FloatBits]] = {
    LogitKind.NAN: _nan,
    LogitKind.INFINITE: _infinite,
    LogitKind.ZEROS: _zeros,
    LogitKind.DENORMAL: _denormal,
    LogitKind.NEIGHBOURS: _neighbours,
    LogitKind.TIES: _ties,
    LogitKind.EQUAL: _equal,
    LogitKind.FEW: _few,
    LogitKind.SORTED: _sorted,
    LogitKind.EXPONENTS: _exponents,
}
