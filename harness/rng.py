"""Counter-based random numbers that are the same bytes on every machine and library version.

Only numpy's raw Philox stream is used: its output is fixed by the algorithm, unlike a library's distributions.
"""

from __future__ import annotations

import zlib

import numpy as np


class Stream:
    """An independent stream of 64-bit numbers for each (seed, label)."""

    def __init__(self, seed: int, label: str) -> None:
        self._philox = np.random.Philox(key=np.array([seed, zlib.crc32(label.encode())], dtype=np.uint64))

    def integers(self, count: int, bound: int) -> list[int]:
        """``count`` numbers in [0, bound). The modulo's bias is irrelevant for test data."""
        return [int(raw % bound) for raw in self._raw(count)]

    def permutation(self, count: int) -> list[int]:
        """0..count-1 in random order."""
        return [int(i) for i in np.argsort(self._raw(count), kind="stable")]

    def _raw(self, count: int) -> np.ndarray:
        return np.asarray(self._philox.random_raw(count), dtype=np.uint64)
