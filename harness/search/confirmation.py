"""Judges a failing case again in fresh processes: alone, and else behind the shortest chain of earlier cases found.

A backend may keep state between cases, in a class or a module. A case can then fail only behind others, and a command
that replays it alone would pass.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nsa_oracle.harness.errors import BackendError, ScenarioError
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.forks import forked
from nsa_oracle.harness.judge import OracleFailure, judge_subject
from nsa_oracle.harness.processes import Child, ChildDied
from nsa_oracle.harness.scenarios.files import from_json
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.search.spec import SubjectSpec, built

SECONDS = 120.0  # for each failure by itself, and for all chains of a process together


@dataclass(frozen=True)
class Confirmed:
    """A failure that a fresh process shows. before: the cases to judge before its own, in the same process."""

    failure: OracleFailure
    before: tuple[Scenario, ...] = ()


class Confirmation:
    """Judges cases of ``spec`` on ``device`` in fresh processes. close() ends the process that these are forks of."""

    def __init__(self, spec: SubjectSpec, device: torch.device, output: Path | None = None) -> None:
        self._spec = spec
        self._device = device
        self._child = Child(device.type, output=output)
        self._seconds_left = SECONDS  # to look for chains

    def close(self) -> None:
        self._child.close()

    def confirmed(self, candidates: Sequence[OracleFailure], before: Sequence[str]) -> Confirmed | None:
        """The first of ``candidates`` that fails in a fresh process by itself; else the last, behind earlier cases.

        before: the cases that the process had judged before, as JSON, in order. None if no process shows any failure in
        time. A failure that no fresh process can be asked about, as one that takes until its time limit, counts as
        confirmed.
        """
        ends = time.monotonic() + SECONDS
        for failure in candidates:
            if failure.finding.kind is Kind.TIMEOUT or self._fails(failure, (), ends) is not False:
                return Confirmed(failure)
        started = time.monotonic()
        chain = self._chain(candidates[-1], [from_json(text) for text in before], started + self._seconds_left)
        self._seconds_left -= time.monotonic() - started
        return Confirmed(candidates[-1], tuple(chain)) if chain else None

    def _chain(self, failure: OracleFailure, earlier: list[Scenario], ends: float) -> list[Scenario]:
        """Few of the ``earlier`` cases, behind which that of ``failure`` fails. Empty if none are found in time."""
        count = 1
        while earlier and time.monotonic() < ends:
            chain = earlier[-count:]
            if self._fails(failure, chain, ends):
                return self._shortened(failure, chain, ends)
            if count >= len(earlier):
                break
            count *= 2
        return []

    def _shortened(self, failure: OracleFailure, chain: list[Scenario], ends: float) -> list[Scenario]:
        """``chain`` without the cases that the failure does not need: halves of it first, single cases last."""
        size = len(chain) // 2
        while size and time.monotonic() < ends:
            start = 0
            while start < len(chain) and time.monotonic() < ends:
                shorter = chain[:start] + chain[start + size :]
                if len(chain) > 1 and self._fails(failure, shorter, ends):
                    chain = shorter
                else:
                    start += size
            size //= 2
        return chain

    def _fails(self, failure: OracleFailure, before: Sequence[Scenario], ends: float) -> bool | None:
        """Whether the case of ``failure`` fails alike behind others in a fresh process; None: no verdict.

        A process that the case itself ends shows that it fails.
        """
        cases = (*before, failure.scenario)
        try:
            finding = self._child.call(
                _last_finding, self._spec, self._device.type, cases, timeout=max(1.0, ends - time.monotonic())
            )
        except (ChildDied, BackendError, ScenarioError):
            return None
        finally:
            if self._device.type == "cuda":  # which no fork can share
                self._child.close()
        return finding is not None and finding.is_like(failure.finding)


def _last_finding(spec: SubjectSpec, device: str, cases: Sequence[Scenario]) -> Finding | None:
    """What the last of ``cases`` shows once the others have been judged, or None. Runs in a child process."""
    where = torch.device(device)

    def judge_all() -> Finding | None:
        finding: Finding | None = None
        for scenario in cases:
            finding = None
            try:
                judge_subject(built(spec, device), scenario, where)
            except OracleFailure as failure:
                finding = failure.finding
        return finding

    if device == "cuda":
        return judge_all()
    built(spec, device)  # forks then need not load it
    return forked(lambda tell: judge_all())
