"""What is impossible about a wrong number is said, and about a number that is merely wrong nothing is."""

from __future__ import annotations

import pytest

from nsa_oracle.harness.checks.impossible import diagnosed
from nsa_oracle.harness.findings import Finding, Kind, Neighbour
from tests.support.metadata_cases import case

SETUP = case().setup  # 3 rows of 4 pages of 4 tokens, 15 pages in all, tables 16 wide


def reported(field: str, value: int, place: str = "row 1", before: int | None = None) -> str:
    neighbours = [] if before is None else [Neighbour("row 0", str(before), "0")]
    neighbours.append(Neighbour(place, str(value), "0"))
    finding = Finding(Kind.VALUE, field, str(value), "0", place=place, neighbours=tuple(neighbours))
    seen = diagnosed(finding, SETUP)
    assert seen is not None
    return seen.got


@pytest.mark.parametrize(
    ("field", "value", "clause"),
    [
        ("seqlens_expanded", -3, "a length below 0"),
        ("seqlens_expanded", 17, "a length beyond the table"),
        ("seqlens_expanded", 16, None),
        ("nsa_cache_seqlens_int32", -1, "a length below 0"),
        ("page_table_1", -1, "no slot that exists"),
        ("page_table_1", 60, "no slot that exists"),
        ("page_table_1", 59, None),
        ("real_page_table", 15, "no page that exists"),
        ("real_page_table", 14, None),
        ("paged_mqa_schedule_metadata", -1, "below 0"),
        ("paged_mqa_schedule_metadata", 999, None),
        ("indexer_k_start", -2, "below 0"),
    ],
)
def test_values(field: str, value: int, clause: str | None) -> None:
    assert reported(field, value) == (f"{value}" if clause is None else f"{value} ({clause})")


def test_running_sums() -> None:
    assert reported("cu_seqlens_k", 4, "bound before request 0") == "4 (a running sum that does not start at 0)"
    assert reported("cu_seqlens_k", 0, "bound before request 0") == "0"
    assert reported("nsa_cu_seqlens_k", 3, before=5) == "3 (below the one before it, in a running sum)"
    assert reported("nsa_cu_seqlens_k", 5, before=5) == "5"
    assert reported("nsa_cu_seqlens_k", 5) == "5"


def test_nothing_else_is_touched() -> None:
    assert diagnosed(None, SETUP) is None
    for finding in (
        Finding(Kind.VALUE, "out", "nan", "0"),
        Finding(Kind.SHAPE, "page_table_1", "[1, 16]", "[2, 16]"),
        Finding(Kind.MISSING, "page_table_1", "None", "a tensor of shape [1, 16]"),
    ):
        assert diagnosed(finding, SETUP) == finding


@pytest.mark.parametrize(
    ("field", "value", "clause"),
    [
        ("page_table_1", 0x5A5A5A5A, " (what the pool holds where no request is)"),
        ("page_table_1", 59, ""),
        ("real_page_table", 0x5A5A5A5A // 4, " (what the pool holds where no request is)"),
        ("cache_seqlens_int32", 0x5A5A5A5A, ""),
    ],
)
def test_expected_filler_is_explained(field: str, value: int, clause: str) -> None:
    """A padding request reads a row of the pool that no request may have."""
    seen = diagnosed(Finding(Kind.VALUE, field, "0", str(value)), SETUP)
    assert seen is not None
    assert seen.expected == f"{value}{clause}"
