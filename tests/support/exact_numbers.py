"""Exact arithmetic for the tests of the layer: roundings and attention on rational numbers, without torch's help."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

Numbers = Sequence[int | Fraction]

TWO = Fraction(2)


def round_to(value: Fraction, precision: int, smallest: Fraction) -> Fraction:
    """The nearest multiple of 2^e to ``value``, ties to even: e leaves ``precision`` bits; never below ``smallest``."""
    if value == 0:
        return value
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if abs(value) < TWO**exponent:
        exponent -= 1  # now 2^exponent <= |value| < 2^(exponent + 1)
    quantum = max(TWO ** (exponent + 1 - precision), smallest)
    steps = abs(value) / quantum
    whole, rest = divmod(steps.numerator, steps.denominator)
    if 2 * rest > steps.denominator or (2 * rest == steps.denominator and whole % 2 == 1):
        whole += 1
    return whole * quantum if value >= 0 else -whole * quantum


def to_float32(value: Fraction) -> Fraction:
    """24 bits; subnormals are multiples of 2^-149."""
    return round_to(value, 24, TWO**-149)


def to_bfloat16(value: Fraction) -> Fraction:
    """8 bits; subnormals are multiples of 2^-133."""
    return round_to(value, 8, TWO**-133)


def dot(a: Numbers, b: Numbers) -> Fraction:
    return Fraction(sum(x * y for x, y in zip(a, b, strict=True)))


def exact_attention(q: Numbers, keys: Sequence[Numbers], rank: int) -> tuple[list[Fraction], Fraction, Fraction]:
    """softmax(q.k ln 2) v of one head, where every q.k is an integer, so that all weights are powers of two.

    Returns the output, rounded to float32 and then to bf16; the largest q.k; and the sum of 2^(q.k - largest), from
    which follows the lse.
    """
    if not keys:
        return [Fraction(0)] * rank, Fraction(0), Fraction(0)
    scores = [dot(q, key) for key in keys]
    assert all(score.denominator == 1 for score in scores), "not on the lattice"
    largest = max(scores)
    weights = [TWO ** int(score - largest) for score in scores]
    total = sum(weights, Fraction(0))
    out = [dot(weights, [key[column] for key in keys]) / total for column in range(rank)]
    return [to_bfloat16(to_float32(value)) for value in out], largest, total
