"""Top-k and its transforms against literal cases and against Python's sorted."""

from __future__ import annotations

import math
import random

import pytest
import torch

from nsa_oracle.reference.topk import (
    topk_indices,
    topk_transform_paged,
    topk_transform_ragged,
    transform_paged,
    transform_ragged,
)

NAN, INF = float("nan"), float("inf")
TINY = 2.0**-149  # the smallest float32


def int32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def select(row: list[float], k: int, length: int | None = None) -> list[int]:
    got = topk_indices(torch.tensor([row]), int32([len(row) if length is None else length]), k)
    assert got.dtype == torch.int32
    assert tuple(got.shape) == (1, k)
    return got[0].tolist()


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([5, 1, 4, 2, 3], [0, 2, 4]),
        ([1, 2, 3, 4, 5], [2, 3, 4]),
        ([1, 9, 7, 7, 7], [1, 2, 3]),  # ties at the border: the lower positions
        ([7, 1, 7, 7, 7, 7], [0, 2, 3]),  # more ties than k
        ([7, 7, 7, 9], [0, 1, 3]),
        ([4, 4, 4, 4], [0, 1, 2]),
        ([-INF, -INF, -INF, -INF, 0], [0, 1, 4]),
        ([INF, 1, INF, 2, INF, INF], [0, 2, 4]),
        ([NAN, 1, NAN, 2, 3], [1, 3, 4]),  # NaN is the smallest
        ([NAN, -INF, NAN, 2, -INF], [0, 1, 3]),  # and ties with -inf
        ([-INF, NAN, 2, 1, -5], [2, 3, 4]),
        ([NAN, NAN, NAN, NAN], [0, 1, 2]),
        ([-0.0, 0.0, 0.0, -0.0, 0.0], [0, 1, 2]),  # zeros are one value
        ([0.0, -0.0, -0.0, 0.0, -1], [0, 1, 2]),
        ([0, TINY, -TINY, 2 * TINY, 0, 3 * TINY], [1, 3, 5]),  # denormals are not zero
        ([-TINY, -0.0, -2 * TINY, 0, -3 * TINY], [0, 1, 3]),
        ([1 + 2.0**-23, 1, 1 + 2.0**-22, 1, 1 - 2.0**-24, 1], [0, 1, 2]),
        ([-1, -2, -3, -4, -0.5], [0, 1, 4]),
        ([3.4e38, -3.4e38, INF, -INF, 3.3e38], [0, 2, 4]),
    ],
)
def test_three_of_many(logits: list[float], expected: list[int]) -> None:
    assert select([float(x) for x in logits], 3) == expected


@pytest.mark.parametrize(
    ("logits", "length", "expected"),
    [
        ([], 0, [-1, -1, -1]),
        ([9.0, 9.0], 0, [-1, -1, -1]),
        ([9.0, 8.0, 7.0], 1, [0, -1, -1]),
        ([NAN, -INF, 5.0], 2, [0, 1, -1]),  # few enough: all of them
        ([-INF, NAN, -INF], 3, [0, 1, 2]),
        ([1.0, 2.0, 3.0, 4.0, INF, NAN], 4, [1, 2, 3]),  # what lies beyond the row is not looked at
    ],
)
def test_short_rows(logits: list[float], length: int, expected: list[int]) -> None:
    assert select(logits, 3, length) == expected


@pytest.mark.parametrize("k", [1, 2, 7, 64, 2048])
def test_equals_sorted(k: int) -> None:
    """Rows of few distinct values, special ones among them, up to lengths beyond every block of a sort."""
    rng = random.Random(k)
    levels = [-INF, INF, NAN, 0.0, -0.0, TINY, -TINY, 1.0, -1.0, 2.0, 1e-20, 3.0]
    width = 4500
    lengths = [0, 1, k - 1, k, k + 1, 2 * k, width, *(rng.randint(0, width) for _ in range(3))]
    rows = [rng.choices(rng.sample(levels, rng.randint(1, len(levels))), k=width) for _ in lengths]
    rows[6] = [rng.gauss(0, 1) for _ in range(width)]
    logits = torch.tensor(rows)
    before = logits.clone()
    got = topk_indices(logits, int32(lengths), k)
    assert torch.equal(logits.view(torch.int32), before.view(torch.int32))
    for row, length in enumerate(lengths):
        values = [-INF if math.isnan(x) else x for x in logits[row].tolist()[:length]]
        best = sorted(range(length), key=lambda position: (-values[position], position))[:k]
        assert got[row].tolist() == sorted(best) + [-1] * (k - len(best)), f"row {row}, length {length}"


def test_transform_paged() -> None:
    """-1 stays, also in the middle; the table's dead cells, of either sign, show nowhere."""
    table = int32([[40, 41, 30, -7], [99, 98, 97, 96]])
    got = transform_paged(int32([[0, 2, -1], [-1, 3, 1]]), table)
    assert got.dtype == torch.int32
    assert got.tolist() == [[40, 30, -1], [-1, 96, 98]]


def test_transform_paged_without_columns() -> None:
    assert transform_paged(int32([[-1, -1]]), int32([[]])).tolist() == [[-1, -1]]
    assert transform_paged(torch.empty(0, 2, dtype=torch.int32), int32([[]])[:0]).tolist() == []


def test_transform_ragged() -> None:
    got = transform_ragged(int32([[0, 2, -1], [-1, 3, 1]]), int32([100, 7]))
    assert got.dtype == torch.int32
    assert got.tolist() == [[100, 102, -1], [-1, 10, 8]]


def test_fused_names() -> None:
    """Row 0 keeps positions 1 and 2, row 1 its only token."""
    logits, lengths = torch.tensor([[1.0, 3.0, 2.0], [5.0, 6.0, 7.0]]), int32([3, 1])
    assert topk_indices(logits, lengths, 2).tolist() == [[1, 2], [0, -1]]
    table = int32([[10, 11, 20], [30, 77, 77]])
    assert topk_transform_paged(logits, lengths, table, 2).tolist() == [[11, 20], [30, -1]]
    assert topk_transform_ragged(logits, lengths, int32([0, 3]), 2).tolist() == [[1, 2], [3, -1]]
