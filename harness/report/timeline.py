"""A case as a timeline: its requests as bars over its events, from when they join to when they finish."""

from __future__ import annotations

from dataclasses import dataclass, field

from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Event, Replay, Scenario, SetLengths
from nsa_oracle.harness.scenarios.story import ToldEvent, told_events
from nsa_oracle.harness.scenarios.world import Request
from nsa_oracle.reference.types import ForwardMode

SHORT_MODES = {
    ForwardMode.DECODE: "D",
    ForwardMode.IDLE: "I",
    ForwardMode.TARGET_VERIFY: "V",
    ForwardMode.DRAFT_EXTEND: "X",
    ForwardMode.DRAFT_EXTEND_V2: "X2",
    ForwardMode.EXTEND: "E",
}
MOST_BUCKETS = 2  # in a label


@dataclass(frozen=True)
class TimelineEvent:
    """One event. kind: as in the file. label: the mode, as in ``SHORT_MODES``, and the bucket of a graph."""

    number: int
    kind: str
    label: str
    sentence: str
    is_failing: bool


@dataclass
class Bar:
    """One request. row: of the pool. first, last: numbers of its first and last event; ``ends``: whether it finishes
    there. accepts: what was accepted, by number of the event. calls: numbers of the events whose batch it is in.
    """

    name: str
    row: int
    first: int
    last: int
    ends: bool = False
    accepts: dict[int, int] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Timeline:
    """The events from number ``first`` on, and the requests that run in them. hidden: how many events and requests
    are not shown.
    """

    first: int
    moments: tuple[TimelineEvent, ...]
    bars: tuple[Bar, ...]
    hidden_events: int
    hidden_requests: int


def timeline(scenario: Scenario, failing_event: int | None, most_events: int, most_requests: int) -> Timeline:
    """At most ``most_events`` events, which end a little behind the one that fails, and their first requests."""
    moments: list[TimelineEvent] = []
    bars: list[Bar] = []
    running: dict[int, tuple[Request, Bar]] = {}  # by identity; holding the request keeps that its own
    for number, told in enumerate(told_events(scenario)):
        moments.append(_event_of(number, told, number == failing_event))
        now = {id(request): request for request in told.running}
        for key in [key for key in running if key not in now]:
            running.pop(key)[1].ends = True
        for key, request in now.items():
            if key not in running:
                running[key] = request, Bar(f"request {len(bars)}", request.pool_row, number, number)
                bars.append(running[key][1])
            _note(running[key][1], request, number, told)
        for _, bar in running.values():
            bar.last = number
    last = len(moments) if failing_event is None else min(len(moments), failing_event + 1 + most_events // 4)
    first = max(0, last - most_events)
    shown = moments[first:last]
    there = [bar for bar in bars if bar.first < last and bar.last >= first]
    return Timeline(
        first,
        tuple(shown),
        tuple(there[:most_requests]),
        len(moments) - len(shown),
        len(bars) - len(there[:most_requests]),
    )


def _note(bar: Bar, request: Request, number: int, told: ToldEvent) -> None:
    """What the event does to the request."""
    if isinstance(told.event, Accept | SetLengths):
        bar.accepts[number] = request.accept_length
    if told.batch is not None and request.pool_row in told.batch.pool_rows:
        bar.calls.append(number)


def _event_of(number: int, told: ToldEvent, is_failing: bool) -> TimelineEvent:
    return TimelineEvent(number, told.event.event, _label(told.event, told.bucket), told.sentence, is_failing)


def _label(event: Event, bucket: int | None) -> str:
    match event:
        case Capture():
            more = "+" if event.buckets[MOST_BUCKETS:] else ""
            return f"{SHORT_MODES[event.mode]} {','.join(map(str, event.buckets[:MOST_BUCKETS]))}{more}"
        case Replay():
            return f"{SHORT_MODES[event.mode]} {'-' if bucket is None else bucket}"
        case Eager():
            return SHORT_MODES[event.mode]
        case _:
            return ""
