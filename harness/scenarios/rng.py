"""Counter-based random numbers that are the same bytes on every machine and library version.

Only numpy's raw Philox stream is used: its output is fixed by the algorithm, unlike a library's distributions.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def coprime_step(count: int) -> int:
    """A step that, taken modulo ``count``, visits all ``count`` places and soon comes near each of them."""
    return next(n for n in range(count * 5 // 8 | 1, 2 * count + 2) if math.gcd(n, count) == 1)


class Stream:
    """An independent stream of 64-bit numbers for each (seed, label)."""

    def __init__(self, seed: int, label: str) -> None:
        key = np.array([seed, zlib.crc32(label.encode())], dtype=np.uint64)
        self._philox = np.random.Philox(key=key)
        self._seekable = np.random.Philox(key=key)

    def integers(self, count: int, bound: int) -> list[int]:
        """``count`` numbers in [0, bound). The modulo's bias is irrelevant for test data."""
        return [int(raw % bound) for raw in self._raw(count)]

    def permutation(self, count: int) -> list[int]:
        """0..count-1 in random order."""
        return [int(i) for i in self.order(count)]

    def order(self, count: int) -> NDArray[np.int64]:
        """The same numbers as ``permutation``, in an array."""
        return np.argsort(self._raw(count), kind="stable")

    def words_at(self, places: Iterable[tuple[int, int]], count: int) -> NDArray[np.uint64]:
        """``count`` raw numbers for each place (two 64-bit numbers): [places, count] uint64.

        A row depends only on its place, not on other rows or on earlier draws, and a shorter row is a prefix of a
        longer one. Rows of at most 2**64 numbers overlap neither each other nor the numbers of the methods above: the
        place is the middle of Philox's 256-bit counter, whose top word is 1 here and 0 there.
        """
        rows = [self._words_at(*place, count) for place in places]
        return np.stack(rows) if rows else np.empty((0, count), dtype=np.uint64)

    def bytes_at(self, places: Iterable[tuple[int, int]], count: int) -> NDArray[np.uint8]:
        """Like ``words_at``, but ``count`` bytes for each place: [places, count] uint8, the same on any byte order."""
        words = self.words_at(places, -(-count // 8)).astype("<u8", copy=False)
        return words.view(np.uint8)[:, :count]

    def halves_at(self, places: Iterable[tuple[int, int]], count: int) -> NDArray[np.uint16]:
        """Like ``words_at``, but ``count`` 16-bit numbers for each place: [places, count] uint16."""
        words = self.words_at(places, -(-count // 4)).astype("<u8", copy=False)
        return words.view("<u2")[:, :count]

    def _words_at(self, first: int, second: int, count: int) -> NDArray[np.uint64]:
        state = self._seekable.state  # a copy; seeking through it takes 2 us, a new Philox 15 us
        state["state"]["counter"] = np.array([0, first, second, 1], dtype=np.uint64)
        state["buffer_pos"] = len(state["buffer"])  # discards numbers buffered at the old place
        self._seekable.state = state
        return np.asarray(self._seekable.random_raw(count), dtype=np.uint64)

    def _raw(self, count: int) -> np.ndarray:
        return np.asarray(self._philox.random_raw(count), dtype=np.uint64)
