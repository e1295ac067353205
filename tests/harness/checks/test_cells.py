"""What a picture of a wrong field shows: the cells around the first wrong one, and whose they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nsa_oracle.harness.checks.cells import MOST_PICTURED, picture_of, shown_number
from nsa_oracle.harness.checks.relations import differs
from nsa_oracle.harness.engine.observations import Feed
from nsa_oracle.harness.findings import Owner, Picture
from nsa_oracle.reference.types import AttentionOutputs
from tests.support.seen_layers import put, verified


def drawn(shape: tuple[int, ...], *wrong: tuple[int, ...]) -> Picture:
    want = torch.arange(int(np.prod(shape)), dtype=torch.int32).reshape(shape)
    got = want.clone()
    for place in wrong:
        got[place] += 1000
    return picture_of(got, want, got != want, "column", "row {}".format)


def test_small_field_is_shown_whole() -> None:
    seen = drawn((2, 3), (1, 2))
    assert (seen.shape, seen.row, seen.column, seen.axis) == ((2, 3), 0, 0, "column")
    assert [row.states for row in seen.rows] == ["...", "..x"]
    assert [row.label for row in seen.rows] == ["row 0", "row 1"]
    assert (seen.rows[1].got, seen.rows[1].expected) == (("3", "4", "1005"), ("3", "4", "5"))


def test_field_of_one_axis_is_a_column() -> None:
    seen = drawn((3,), (1,))
    assert (seen.shape, seen.axis) == ((3, 1), "")
    assert [row.states for row in seen.rows] == [".", "x", "."]


@pytest.mark.parametrize("place", [(0, 0), (0, 999), (999, 0), (500, 500), (999, 999)])
def test_large_field_is_cut_around_the_first_wrong_cell(place: tuple[int, int]) -> None:
    seen = drawn((1000, 1000), place)
    assert len(seen.rows) == MOST_PICTURED
    assert {len(row.states) for row in seen.rows} == {MOST_PICTURED}
    row = seen.rows[place[0] - seen.row]
    assert row.label == f"row {place[0]}"
    assert [number for number, state in enumerate(row.states, seen.column) if state == "x"] == [place[1]]
    assert row.got[place[1] - seen.column] == str(place[0] * 1000 + place[1] + 1000)


def test_of_three_axes_the_first_two_are_drawn_as_one() -> None:
    seen = drawn((3, 2, 4), (1, 1, 3), (2, 0, 0))
    assert seen.shape == (6, 4)
    assert [row.states for row in seen.rows] == ["....", "....", "....", "...x", "x...", "...."]


def test_cells_without_a_specified_content_are_dead() -> None:
    cells = np.zeros((1, 3), dtype=np.int32)
    wrong, live = np.array([[True, False, False]]), np.array([[True, True, False]])
    (row,) = picture_of(cells, cells, wrong, "column", str, live=live).rows
    assert row.states == "x.-"


def test_numbers_of_any_kind_are_shown() -> None:
    numbers = torch.tensor([[1.0, float("nan"), -float("inf")]], dtype=torch.bfloat16)
    wrong = torch.tensor([[True, False, False]])
    (row,) = picture_of(numbers, numbers, wrong, "head", str, shown=shown_number).rows
    assert row.got == ("1", "nan", "-inf")


@pytest.mark.parametrize(
    ("name", "place", "axis", "label", "feed"),
    [
        ("logits", (2, 3), "token", "row 2 (request 1, draft token 0)", Feed.CHAIN),
        ("lse", (2, 1), "head", "row 2 (request 1, draft token 0)", Feed.CHAIN),
        ("out", (2, 1, 5), "element", "row 2 (request 1, draft token 0), head 1", Feed.CHAIN),
        ("indices", (3, 2), "entry", "row 3 (request 1, draft token 1)", Feed.CHAIN),
        ("topk_indices", (3, 1), "entry", "row 3 (request 1, draft token 1)", Feed.ISOLATED),
    ],
)
def test_each_stage_has_a_picture(name: str, place: tuple[int, ...], axis: str, label: str, feed: Feed) -> None:
    finding = verified(feed=feed).found(put(name, place, 9))
    assert finding.field == name
    seen = finding.picture
    assert seen is not None
    assert seen.axis == axis
    (row,) = (row for row in seen.rows if row.label == label)
    column = place[-1] - seen.column
    assert [number for number, state in enumerate(row.states) if state == "x"] == [column]
    assert row.got[column] == "9"
    assert row.owner is Owner.REQUEST


def test_changed_bits_have_a_picture() -> None:
    def results(last: float) -> AttentionOutputs:
        out = torch.zeros(2, 1, 4, dtype=torch.bfloat16)
        out[1, 0, 3] = last
        ints = torch.zeros(2, 3, dtype=torch.int32)
        return AttentionOutputs(logits=torch.zeros(2, 3), indices=ints, out=out, lse=torch.zeros(2, 1))

    finding = differs(results(1), results(2), [0, 1])
    assert finding is not None
    assert finding.picture is not None
    assert [(row.label, row.states) for row in finding.picture.rows] == [
        ("row 0, head 0", "...."),
        ("row 1, head 0", "...x"),
    ]
