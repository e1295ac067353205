"""Made-up logits: each kind is what it says, whatever the sizes, and the same for the same case on every machine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nsa_oracle.harness.content.edge_logits import EdgeLogits, LogitKind, edge_logits
from nsa_oracle.reference.topk import topk_indices
from tests.support.layer_cases import case

SENTINEL = 7
SIZES = [(20, 8), (20, 4), (33, 17), (261, 64), (1100, 1030), (9, 8), (20, 1), (2, 1)]  # width, K: longer rows than K
NARROW = [(8, 8), (20, 200), (2, 2), (4, 100)]  # no longer ones
each_size = pytest.mark.parametrize(("width", "topk"), SIZES)


def made_up(width: int, topk: int, seed: int = 3, run: int = 0, call: int = 1, **setup: Any) -> EdgeLogits:
    sizes = {"max_context_len": width, "index_topk": topk, "num_draft_tokens": 1, **setup}
    return edge_logits(case(**sizes).setup, seed, run, call, SENTINEL)


def rows_of(width: int, topk: int, kind: LogitKind) -> list[tuple[torch.Tensor, int]]:
    """The logits within a row, and how many there are, in several calls."""
    found = []
    for call in range(12):
        given = made_up(width, topk, call=call)
        row = given.kinds.index(kind)
        length = int(given.seqlens_expanded[row])
        found.append((given.logits[row, :length], length))
    return found


def bits(numbers: torch.Tensor) -> list[int]:
    return numbers.view(torch.int32).tolist()


def threshold(row: torch.Tensor, topk: int) -> float:
    return float(
        row.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).sort(descending=True).values[topk - 1]
    )


@each_size
def test_lengths_are_on_both_sides_of_k(width: int, topk: int) -> None:
    lengths: set[int] = set()
    for call in range(40):
        given = made_up(width, topk, call=call)
        assert given.kinds == tuple(LogitKind)
        assert given.logits.shape == given.page_table_1.shape == (len(given.kinds), width)
        for kind, length in zip(given.kinds, given.seqlens_expanded.tolist(), strict=True):
            assert (length <= topk) == (kind is LogitKind.FEW)
            assert 0 <= length <= width
            lengths.add(length)
    assert {0, 1, topk, topk + 1, width} <= lengths


@pytest.mark.parametrize(("width", "topk"), NARROW)
def test_no_row_is_longer_than_its_table(width: int, topk: int) -> None:
    given = made_up(width, topk)
    assert set(given.kinds) == {LogitKind.FEW}
    assert given.seqlens_expanded.max() <= width


@each_size
def test_slots_of_a_row_are_different_and_dead_cells_are_the_engines(width: int, topk: int) -> None:
    given = made_up(width, topk, page_size=16)
    slots = case(max_context_len=width, page_size=16, num_draft_tokens=1).setup.num_pages * 16
    for table, length in zip(given.page_table_1, given.seqlens_expanded.tolist(), strict=True):
        live = table[:length].tolist()
        assert len(set(live)) == length
        assert all(0 <= slot < slots for slot in live)
        assert (table[length:] == SENTINEL).all()
    assert len({tuple(table.tolist()) for table in given.page_table_1}) == len(given.kinds)


@each_size
def test_rubbish_lies_behind_every_row(width: int, topk: int) -> None:
    given = made_up(width, topk)
    for row, length in zip(given.logits, given.seqlens_expanded.tolist(), strict=True):
        beyond = row[length:]
        assert (beyond.isnan() | (beyond >= torch.finfo(torch.float32).max)).all()


@each_size
def test_nan_is_among_what_gets_a_place_and_what_gets_none(width: int, topk: int) -> None:
    for row, length in rows_of(width, topk, LogitKind.NAN):
        assert row.isnan().any()
        assert threshold(row, topk) == -math.inf
        assert int((row > -math.inf).sum()) == topk // 2
        assert length > topk


@each_size
def test_infinities_tie_at_the_threshold(width: int, topk: int) -> None:
    found = {threshold(row, topk) for row, _ in rows_of(width, topk, LogitKind.INFINITE)}
    assert found == {math.inf, -math.inf}
    for row, _ in rows_of(width, topk, LogitKind.INFINITE):
        assert int((row == threshold(row, topk)).sum()) > topk - topk // 2
        assert not row.isnan().any()


@each_size
def test_zeros_of_both_signs_tie_at_the_threshold(width: int, topk: int) -> None:
    for row, _ in rows_of(width, topk, LogitKind.ZEROS):
        zeros = row[row == 0]
        assert threshold(row, topk) == 0
        assert len(zeros) > topk - int((row > 0).sum())
        assert bits(zeros)[0] < 0 == bits(zeros)[-1], "who prefers 0.0 takes the last for the first"


@each_size
def test_denormals_are_denormal_and_different(width: int, topk: int) -> None:
    for row, length in rows_of(width, topk, LogitKind.DENORMAL):
        magnitudes = [number & 0x7FFFFFFF for number in bits(row)]
        assert all(0 < magnitude < 0x00800000 for magnitude in magnitudes)
        assert len(set(bits(row))) > 0.99 * length
        assert bits(row)[-1] == max(bits(row)), "who takes them all for 0 leaves out the largest"


@each_size
def test_neighbours_are_adjacent(width: int, topk: int) -> None:
    signs = set()
    for row, length in rows_of(width, topk, LogitKind.NEIGHBOURS):
        ordered = row.sort().values
        assert sorted(bits(row)) == list(range(min(bits(row)), min(bits(row)) + length))
        assert torch.equal(ordered[1:], torch.nextafter(ordered[:-1], torch.tensor(math.inf)))
        assert row[-1] == row.max()
        signs.add(bool((row > 0).all()))
    assert signs == {False, True}


@each_size
def test_ties_are_more_than_places(width: int, topk: int) -> None:
    """For one place, for half of them, and for all."""
    found = set()
    for row, _ in rows_of(width, topk, LogitKind.TIES):
        tied = threshold(row, topk)
        assert tied in (2.0, -2.0)
        above = int((row > tied).sum())
        assert int((row == tied).sum()) > topk - above
        found.add(above)
    assert found == {0, topk // 2, topk - 1}


@each_size
def test_one_number_is_one_number(width: int, topk: int) -> None:
    found = set()
    for row, _ in rows_of(width, topk, LogitKind.EQUAL):
        assert len(set(bits(row))) == 1
        found.add(bits(row)[0])
    assert len(found) > 2


@each_size
def test_the_best_of_numbers_in_order_are_at_an_end(width: int, topk: int) -> None:
    found = set()
    for row, length in rows_of(width, topk, LogitKind.SORTED):
        ascending = bool((row[1:] >= row[:-1]).all())
        tied = int((row == row.min()).sum())
        assert sorted(bits(row)) == bits(row)[:: 1 if ascending else -1]
        assert tied in (1, length - topk)
        assert len(set(bits(row))) == length - tied + 1
        assert length >= width - 1
        found.add((ascending, tied > 1))
    assert found >= {(True, False), (False, False)}
    assert ((True, True) in found) == (width - topk > 1)


def test_few_may_be_anything() -> None:
    found = torch.cat([row for row, _ in rows_of(261, 64, LogitKind.FEW)])
    assert found.isnan().any()
    assert {math.inf, -math.inf, 0.0} <= set(found[~found.isnan()].tolist())


def test_the_same_case_has_the_same_logits_and_no_other_has() -> None:
    def reported(**changes: int) -> tuple[list[int], list[list[int]]]:
        given = made_up(20, 8, **changes)
        return bits(given.logits.flatten()), given.page_table_1.tolist()

    assert reported() == reported()
    others = [reported(seed=4), reported(run=1), reported(call=2)]
    assert len({str(other) for other in (reported(), *others)}) == 4


def test_bytes_are_the_same_on_every_machine() -> None:
    given = made_up(9, 4)
    assert given.seqlens_expanded.tolist() == [7, 9, 8, 5, 7, 9, 5, 3, 9, 6]
    denormals = [number & 0xFFFFFFFF for number in bits(given.logits[3])]
    assert denormals[:5] == [0x72E5C5, 0x800A2091, 0x807849A8, 0x9278D, 0x7FFFFF]
    assert denormals[5:] == [0x7FC00000, 0x7F800000, 0x7F7FFFFF, 0xFFFFFFFF]


@each_size
def test_answer_does_not_depend_on_what_lies_beyond(width: int, topk: int) -> None:
    given = made_up(width, topk)
    other = given.logits.clone()
    for row, length in zip(other, given.seqlens_expanded.tolist(), strict=True):
        row[length:] = 0
    want = topk_indices(given.logits, given.seqlens_expanded, topk)
    assert torch.equal(topk_indices(other, given.seqlens_expanded, topk), want)


@each_size
def test_numbers_of_all_magnitudes_do_not_tie(width: int, topk: int) -> None:
    """Half precision, to which some rows are infinite and some zero, would tie numbers that differ."""
    infinite = zero = 0
    for row, length in rows_of(width, topk, LogitKind.EXPONENTS):
        assert bool(row.isfinite().all())
        assert len(set(bits(row))) == length
        infinite += bool(row.abs().half().isinf().all())
        zero += bool((row.abs().half() == 0).all())
    assert infinite
    assert zero
