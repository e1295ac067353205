"""The tables, the closing line and the records of a run."""

from __future__ import annotations

import json

from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.mutants.report import as_json, matrix, sum_line, survivors
from nsa_oracle.harness.mutants.score import Fate, Score
from nsa_oracle.harness.report.text import render
from tests.support.mutants import a_mutant


def scored(fate: Fate, check: Check | None = None, judged: int = 3) -> Score:
    return Score(a_mutant(), fate, check, "case", "sentence", judged, 0.5)


def test_the_tables_and_the_line() -> None:
    killed, alive, never = scored(Fate.KILLED, Check.METADATA), scored(Fate.SURVIVED), scored(Fate.UNREACHED, judged=0)
    scores = [killed, alive, never, scored(Fate.IMPORT), scored(Fate.TIME_OUT)]
    assert sum_line(scores) == "mutants: 3 of 5 killed, 1 survived (1 crash at import, 1 not reached)"
    assert sum_line([killed]) == "mutants: 1 of 1 killed, 0 survived"
    text = render(matrix(scores))
    assert all(word in text for word in ("m.py", "metadata", "crash at import", "time-out", "survived", "not reached"))
    assert "logits" not in text
    assert survivors([alive, never]).splitlines() == [
        "m.py:2:boundary-shifted:1  a < b  ->  a <= b  (survived 3 cases)",
        "m.py:2:boundary-shifted:1  a < b  ->  a <= b  (no case reaches it)",
    ]


def test_a_record() -> None:
    record = json.loads(as_json(scored(Fate.KILLED, Check.SHAPE)))
    assert record["id"] == "m.py:2:boundary-shifted:1"
    assert (record["fate"], record["check"], record["case"], record["cases"]) == ("killed", "shape", "case", 3)
    assert (record["before"], record["after"]) == ("a < b", "a <= b")
