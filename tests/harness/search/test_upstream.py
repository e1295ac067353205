"""The record of a verdict: what changed since, and that it survives its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.scenarios.files import load
from nsa_oracle.harness.search.backend_survey import BackendFound, Property
from nsa_oracle.harness.search.rows import Row
from nsa_oracle.harness.search.upstream import changes, load_record, record_of, save_record
from tests.support.metadata_cases import DECODE, one_replay

A, B, C = (Property("graph", "DECODE", name) for name in "abc")
CASE = one_replay(DECODE)


def found(**broken: bool) -> BackendFound:
    rows = {
        Property("graph", "DECODE", name): Row(3, int(is_broken), {1} if is_broken else set(), "wrong" * is_broken)
        for name, is_broken in broken.items()
    }
    for row in rows.values():
        row.case = CASE if row.broken else None
    return BackendFound(rows)


def test_changes_are_told_apart() -> None:
    old = record_of(found(a=True, b=False), "sglang", "1", "1", 4, 0)
    assert changes(old, record_of(found(a=True, b=False), "sglang", "1", "1", 4, 0)) == changes(old, old)
    now = changes(old, record_of(found(a=False, b=True), "sglang", "1", "1", 4, 0))
    assert (now.new_breaks, now.mended, now.no_longer_checked, now.newly_checked) == ([B], [A], [], [])
    now = changes(old, record_of(found(b=False, c=True), "sglang", "1", "1", 4, 0))
    assert (now.new_breaks, now.mended, now.no_longer_checked, now.newly_checked) == ([C], [], [A], [C])
    now = changes(None, old)
    assert (now.new_breaks, now.mended, now.no_longer_checked, now.newly_checked) == ([A], [], [], [])


def test_a_record_survives_its_file_with_its_cases(tmp_path: Path) -> None:
    survey = found(a=True, b=False)
    record = record_of(survey, "sglang", "0.5.8", "0.5.8", 4, 0)
    file = save_record(record, survey, tmp_path / "new")
    assert load_record(file) == record
    (case,) = (row.case for row in record.rows if row.case)
    assert case == "sglang-0.5.8-graph-DECODE-a.json"
    assert load(file.parent / case) == CASE.model_copy(update={"note": "wrong"})
    assert load_record(tmp_path / "none.json") is None
    (file.parent / case).write_text("by hand")
    save_record(record, survey, file.parent)
    assert (file.parent / case).read_text() == "by hand"


@pytest.mark.parametrize("text", ["", "[]", '{"version": "1"}', '{"version": 1, "rows": [{}]}'])
def test_a_malformed_record_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text(text)
    with pytest.raises(ScenarioError, match=r"^.*record.json: not a verdict: [^\n]*; --record writes a new one$"):
        load_record(file)
