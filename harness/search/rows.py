"""Rows of a survey: what each counts, a case of each that was broken, and how that case is made smaller and saved."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.scenarios.files import digest, save
from nsa_oracle.harness.scenarios.scenario import Eager, Replay, Scenario
from nsa_oracle.harness.scenarios.simplify import MOST_TRIALS_OF_A_HANG, simplify
from nsa_oracle.harness.subjects.subject import Subject

SHRINKING_BUDGET = 60.0
_Key = TypeVar("_Key")


@dataclasses.dataclass
class Row:
    """Calls in which a property was checked, and broken; the smallest case known that breaks it, and its finding.

    steps: of the draft, in which it was broken. has_hung: whether that case does not end. passes_alone: whether that
    case passes where no other has run before. saved: its file; replay: the command that replays it, if it fails then.
    """

    checked: int = 0
    broken: int = 0
    steps: set[int] = dataclasses.field(default_factory=set)
    finding: str = ""
    has_hung: bool = False
    passes_alone: bool = False
    case: Scenario | None = None
    saved: Path | None = None
    replay: str = ""

    def note(self, findings: list[Finding], case: Scenario) -> None:
        """Count one call with what was found in it; ``case`` ends with that call."""
        self.steps |= {finding.step for finding in findings if finding.step is not None}
        hung = bool(findings) and findings[0].kind is Kind.TIMEOUT
        self.add(findings[0].sentence() if findings else "", case, hung)

    def add(self, fault: str, case: Scenario, has_hung: bool = False) -> None:
        """Count one check. fault: the violation in one line; empty if there is none."""
        self.checked += 1
        self.broken += bool(fault)
        if fault and self.case is None:
            self.finding, self.case, self.has_hung = fault, case, has_hung

    def shrink(
        self,
        breaks: Callable[[Scenario], str | None],
        subject: Subject,
        deadline: float,
        most_trials: int,
        smaller: Callable[[], None],
    ) -> None:
        """Replace the case by the smallest one found that breaks the same property.

        breaks: the finding of a case in one line; None if it does not break the property, or not with its last call.
        deadline: value of ``time.monotonic()`` after which no trial begins. Of a case that does not end there are few
        trials, none of which may take longer than until then. smaller: is called when a smaller case is found.
        """
        assert self.case is not None
        longest = (subject.case_timeout or math.inf) if self.has_hung else 0.0

        def still_breaks(case: Scenario) -> bool:
            if time.monotonic() + longest > deadline or not _calls_of(case) or subject.misfit(case) is not None:
                return False
            finding = breaks(case)
            if finding is not None:
                self.case, self.finding = case, finding
                smaller()
            return finding is not None

        simplify(self.case, still_breaks, min(most_trials, MOST_TRIALS_OF_A_HANG) if self.has_hung else most_trials)


def up_to(scenario: Scenario, number: int) -> Scenario:
    """The scenario up to event ``number``, and at least up to its first call: a case without one is not replayed."""
    last = max(number, min(_calls_of(scenario), default=number))
    return scenario.model_copy(update={"events": scenario.events[: last + 1]})


def _calls_of(scenario: Scenario) -> list[int]:
    """The numbers of the events that call the backend."""
    return [number for number, event in enumerate(scenario.events) if isinstance(event, Replay | Eager)]


def in_turn(
    broken: Mapping[_Key, Row], kept: set[_Key], deadline: float | None, begin: Callable[[_Key, Row], None]
) -> Iterator[tuple[_Key, Row, float]]:
    """Each broken row that is not ``kept`` yet, and when its trials have to end. Then it is kept.

    The rows share out the time until ``deadline``, a value of ``time.monotonic()``, and SHRINKING_BUDGET at most.
    begin: is called with each row before its trials.
    """
    latest = time.monotonic() + SHRINKING_BUDGET
    ends = latest if deadline is None else min(deadline, latest)
    keys = [key for key in broken if key not in kept]
    for number, key in enumerate(keys):
        begin(key, broken[key])
        now = time.monotonic()
        yield key, broken[key], now + (ends - now) / (len(keys) - number)
        kept.add(key)


def save_rows(rows: Iterable[Row], folder: Path, command: Callable[[Path], str]) -> None:
    """Save the case of each broken row in ``folder``. command: the command line that replays a file."""
    for row in rows:
        assert row.case is not None
        row.saved = folder / f"{digest(row.case)}.json"
        save(row.case.model_copy(update={"note": row.finding}), row.saved)
        row.replay = "" if row.passes_alone else command(row.saved)
