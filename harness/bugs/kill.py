"""The record of the result of a hunt."""

from __future__ import annotations

from dataclasses import dataclass

from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.scenarios.files import from_json
from nsa_oracle.harness.scenarios.scenario import Scenario


@dataclass(frozen=True)
class Kill:
    """The result of hunting one bug.

    check: the check that reported the failure; None if the bug survived.
    meant: whether ``check`` is one of the bug's own checks (``Bug.caught_by``).
    cases: number of judged cases, the failing one included; 0 if the process died.
    seconds: wall time. sentence: the finding, or how the process ended; empty if the bug survived.
    case: JSON of the shrunk scenario; empty if there is none.
    lost: whether the process lost its GPU.
    """

    bug: str
    check: Check | None
    meant: bool
    cases: int
    seconds: float
    sentence: str = ""
    case: str = ""
    lost: bool = False

    @property
    def scenario(self) -> Scenario:
        """The shrunk scenario. ``case`` must not be empty."""
        return from_json(self.case)
