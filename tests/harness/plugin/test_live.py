"""What is said while cases are judged, and while a failing one is made smaller."""

from __future__ import annotations

import dataclasses

from nsa_oracle.harness.plugin.live import Lines
from nsa_oracle.harness.search.progress import Count

JUDGED = Count(cases=4, replays=9, expected=48)
FOUND = dataclasses.replace(JUDGED, saved="failures/a.min.json", process=7, shrinking=31, ends=130.0)
FOUND_LINE = "oracle: 4 of 48 cases, 9 replays, 1 finding after {} s, about {} left"


def test_shrinking_is_told_at_once_and_again_while_it_lasts() -> None:
    lines = Lines(begun=0.0)
    assert lines.of([JUDGED], 3.0, 60.0) == ["oracle: 4 of 48 cases, 9 replays, no finding after 3 s, about 33 s left"]
    assert lines.of([JUDGED], 6.0, 60.0) == []
    assert lines.of([FOUND], 10.0, 60.0) == [
        FOUND_LINE.format(10, "110 s"),
        "oracle: shrinking failures/a.min.json: 31 events so far, up to 2 min left",
    ]
    smaller = dataclasses.replace(FOUND, shrinking=1)
    assert lines.of([smaller], 13.0, 60.0) == []
    assert lines.of([smaller], 70.0, 60.0) == [
        FOUND_LINE.format(70, "13 min"),
        "oracle: shrinking failures/a.min.json: 1 event so far, up to 60 s left",
    ]


def test_each_case_that_is_made_smaller_is_told() -> None:
    other = dataclasses.replace(FOUND, saved="", process=8, shrinking=2)
    lines = Lines(begun=0.0)
    assert len(lines.of([FOUND], 3.0, 60.0)) == 2
    assert lines.of([FOUND, other], 30.0, 60.0)[1:] == [
        "oracle: shrinking failures/a.min.json: 31 events so far, up to 100 s left",
        "oracle: shrinking a case: 2 events so far, up to 100 s left",
    ]


def test_nothing_more_is_told_of_shrinking_that_has_ended() -> None:
    lines = Lines(begun=0.0)
    assert len(lines.of([FOUND], 3.0, 10.0)) == 2
    assert lines.of([dataclasses.replace(FOUND, shrinking=0)], 20.0, 10.0) == []
    assert lines.of([FOUND], 131.0, 10.0) == [], "its process is no more"


def test_nothing_is_told_twice() -> None:
    lines = Lines(begun=0.0)
    assert len(lines.of([], 3.0, 10.0)) == 1
    assert lines.of([], 20.0, 10.0) == []
    assert len(lines.of([JUDGED], 23.0, 10.0)) == 1
