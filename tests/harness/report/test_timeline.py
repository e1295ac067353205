"""A case as a timeline: when requests run, and which events are shown of a long case."""

from __future__ import annotations

from nsa_oracle.harness.report.timeline import SHORT_MODES, timeline
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Finish, Join, Replay
from nsa_oracle.reference.types import ForwardMode
from tests.support.metadata_cases import DECODE, case
from tests.support.reports import HISTORY


def test_every_mode_has_a_short_name() -> None:
    assert set(SHORT_MODES) == set(ForwardMode)


def test_requests_are_bars_from_join_to_finish() -> None:
    line = timeline(HISTORY, 6, 100, 100)
    assert [(moment.kind, moment.label) for moment in line.moments] == [
        ("capture", "D 2"),
        ("join", ""),
        ("join", ""),
        ("replay", "D 2"),
        ("accept", ""),
        ("finish", ""),
        ("replay", "D 2"),
    ]
    assert [moment.is_failing for moment in line.moments] == [False] * 6 + [True]
    first, second = line.bars
    assert (first.first, first.last, first.ends, first.calls, first.accepts) == (1, 4, True, [3], {4: 1})
    assert (second.first, second.last, second.ends, second.calls, second.accepts) == (2, 6, False, [3, 6], {4: 2})
    assert (first.row, second.row) == (0, 1)


def test_row_that_is_used_again_is_another_request() -> None:
    line = timeline(case(Join(seq_len=3), Finish(request=0), Join(seq_len=3), Eager(mode=DECODE)), None, 100, 100)
    assert [(bar.row, bar.first, bar.last, bar.ends) for bar in line.bars] == [(0, 0, 0, True), (0, 2, 3, False)]
    assert [moment.label for moment in line.moments] == ["", "", "", "D"]


def test_replay_without_a_graph_that_fits_is_told() -> None:
    line = timeline(
        case(Capture(mode=DECODE, buckets=(1, 2, 4)), Join(seq_len=3, count=3), Replay(mode=DECODE)), 2, 9, 9
    )
    assert [moment.label for moment in line.moments] == ["D 1,2+", "", "D 4"]
    line = timeline(case(Capture(mode=DECODE, buckets=(1,)), Join(seq_len=3, count=3), Replay(mode=DECODE)), 2, 9, 9)
    assert line.moments[-1].label == "D -"


def test_long_case_is_shown_around_the_event_that_fails() -> None:
    events = (Join(seq_len=1), Join(seq_len=1), *[Accept(accept_lengths=(0,))] * 50)
    line = timeline(case(*events), 30, 20, 1)
    numbers = [moment.number for moment in line.moments]
    assert numbers == list(range(16, 36))
    assert line.first == 16
    assert (line.hidden_events, line.hidden_requests) == (32, 1)
    assert [bar.name for bar in line.bars] == ["request 0"]
