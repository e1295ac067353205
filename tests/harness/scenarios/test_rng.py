"""Random numbers follow from seed, label and place alone, the same on every machine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_oracle.harness.scenarios.rng import Stream


def test_bulk_numbers_follow_from_seed_label_and_place() -> None:
    stream = Stream(3, "x")
    rows = stream.words_at([(1, 2), (2**40, 7)], 5)
    assert rows[:, 0].tolist() == [5315799218864804568, 15626340787260901118]
    assert np.array_equal(stream.words_at([(2**40, 7)], 9)[0, :5], rows[1])
    assert stream.integers(3, 1000) == Stream(3, "x").integers(3, 1000)  # seeking disturbs nothing
    as_bytes_ = stream.bytes_at([(1, 2)], 9)
    assert [int(b) for b in as_bytes_[0, :8]] == list(int(rows[0, 0]).to_bytes(8, "little"))
    assert int(stream.halves_at([(1, 2)], 3)[0, 1]) == int(rows[0, 0]) >> 16 & 0xFFFF
    assert stream.bytes_at([], 9).shape == (0, 9)


def test_random_numbers_are_fixed_by_the_algorithm() -> None:
    assert Stream(7, "pages").integers(4, 1000) == [733, 676, 240, 734]
    assert Stream(7, "pages").permutation(6) == [2, 0, 4, 1, 5, 3]
    assert Stream(2**64 - 1, "pages").integers(4, 1000) == [732, 741, 954, 977]


@pytest.mark.parametrize("seed", [2**53, 2**63, 2**64 - 2])
def test_neighbouring_seeds_differ(seed: int) -> None:
    assert Stream(seed, "pages").integers(4, 1 << 62) != Stream(seed + 1, "pages").integers(4, 1 << 62)


@given(st.integers(0, 2**64 - 1), st.integers(0, 50))
def test_permutation_has_each_number_once(seed: int, count: int) -> None:
    assert sorted(Stream(seed, "x").permutation(count)) == list(range(count))
    assert all(0 <= n < 9 for n in Stream(seed, "x").integers(count, 9))


def test_streams_differ_by_seed_and_label() -> None:
    drawn = [Stream(seed, label).integers(4, 1 << 62) for seed in (1, 2) for label in ("a", "b")]
    assert len(np.unique(drawn)) == 16
