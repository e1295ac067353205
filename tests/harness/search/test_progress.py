"""The line that says how far a run is."""

from __future__ import annotations

import pytest

from nsa_oracle.harness.search.progress import Count, progress_line


@pytest.mark.parametrize(
    ("cases", "judging", "line"),
    [
        (0, None, "oracle: 0 of 48 cases, 0 replays, no finding after 60 s"),
        (12, None, "oracle: 12 of 48 cases, 24 replays, no finding after 60 s, about 3 min left"),
        (12, 20.0, "oracle: 12 of 48 cases, 24 replays, no finding after 60 s, about 60 s left"),
        (48, 20.0, "oracle: 48 of 48 cases, 96 replays, no finding after 60 s"),
    ],
)
def test_time_left_follows_from_the_time_in_which_cases_were_judged(
    cases: int, judging: float | None, line: str
) -> None:
    counts = [Count(expected=40), Count(cases=cases, replays=2 * cases, expected=8)]
    assert progress_line(counts, 60.0, judging) == line
