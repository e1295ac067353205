"""Adds to the finding of a wrong number why the number is impossible.

Kernels read lengths and bounds as unsigned numbers, and slots and pages as addresses, so a length of -3 is not a small
error but an access outside memory. No reference is needed to see that. The module only adds a clause to a finding and
finds nothing itself: every live cell of every row, padding included, is compared anyway, and no other is specified.
"""

from __future__ import annotations

import dataclasses

from nsa_oracle.harness.fields import FIELDS, Axis
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.scenarios.setup import Setup

LENGTHS = ("cache_seqlens_int32", "seqlens_expanded", "nsa_cache_seqlens_int32")
RUNNING_SUMS = ("cu_seqlens_q", "cu_seqlens_k", "nsa_cu_seqlens_q", "nsa_cu_seqlens_k", "flashmla_num_splits")
SLOTS = ("page_table_1", "page_table_1_flattened")
_FIRST = tuple(f"{axis.value} 0" for axis in (Axis.REQUEST_BOUND, Axis.ROW_BOUND))
_METADATA = {field.name for field in FIELDS}


def diagnosed(finding: Finding | None, setup: Setup) -> Finding | None:
    """``finding``, with a clause if its value is a wrong number of the metadata that is impossible."""
    if finding is None or finding.kind is not Kind.VALUE or finding.field not in _METADATA:
        return finding
    clause, unmapped = (
        _impossible(finding, int(finding.got), setup),
        _of_no_token(finding, int(finding.expected), setup),
    )
    got = finding.got if clause is None else f"{finding.got} ({clause})"
    return dataclasses.replace(finding, got=got, expected=finding.expected + unmapped)


def _of_no_token(finding: Finding, value: int, setup: Setup) -> str:
    """A clause about an expected slot or page that does not exist.

    A padding request reads pool row 0, whose cells hold a filler of the harness while no request has that row.
    """
    tables = {"real_page_table": setup.num_pages, **dict.fromkeys(SLOTS, setup.num_slots)}
    return " (what the pool holds where no request is)" if value >= tables.get(finding.field, value + 1) else ""


def _impossible(finding: Finding, value: int, setup: Setup) -> str | None:
    name, slots = finding.field, setup.num_slots
    if name in LENGTHS:
        if value < 0:
            return "a length below 0"
        return "a length beyond the table" if value > setup.max_context_len else None
    if name in RUNNING_SUMS:
        if value and finding.place in _FIRST:
            return "a running sum that does not start at 0"
        before = _preceding(finding)
        return "below the one before it, in a running sum" if before is not None and value < before else None
    if name in SLOTS:
        return None if 0 <= value < slots else "no slot that exists"
    if name == "real_page_table":
        return None if 0 <= value < setup.num_pages else "no page that exists"
    return "below 0" if value < 0 else None


def _preceding(finding: Finding) -> int | None:
    """The value in the cell before the wrong one, or None if it is not known."""
    places = [cell.place for cell in finding.neighbours]
    number = places.index(finding.place) if finding.place in places else 0
    return int(finding.neighbours[number - 1].got) if number else None
