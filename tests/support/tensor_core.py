"""How a tensor core adds up a dot product."""

from __future__ import annotations

import numpy as np


def truncated_dot(q: np.ndarray, k: np.ndarray, group: int, bits: int) -> np.ndarray:
    """[H, n] dot products as a tensor core adds: ``group`` terms and the accumulator cut to the largest exponent.

    Terms, accumulator and each result keep ``bits`` fractional bits and are cut off, not rounded. q [H, D], k [n, D].
    """
    acc = np.zeros((len(q), len(k)))
    for begin in range(0, q.shape[1], group):
        terms = q[:, None, begin : begin + group] * k[None, :, begin : begin + group]
        terms = np.concatenate([terms, acc[..., None]], axis=-1)
        _, exponents = np.frexp(np.abs(terms).max(-1, keepdims=True))
        unit = 2.0 ** (exponents - 1 - bits)
        acc = (np.trunc(terms / unit) * unit).sum(-1)
        _, exponents = np.frexp(acc)
        unit = 2.0 ** (exponents - 1 - bits)
        acc = np.trunc(acc / unit) * unit
    return acc
