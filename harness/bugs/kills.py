"""How a bug fared."""

from __future__ import annotations

from dataclasses import dataclass

from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.scenarios.files import from_json
from nsa_oracle.harness.scenarios.scenario import Scenario


@dataclass(frozen=True)
class Kill:
    """How a bug fared. check: None if it survived ``cases`` cases. case: JSON of the shrunk scenario.

    lost: whether it cost the process its GPU.
    """

    bug: str
    check: Check | None
    meant: bool  # whether that check is one that is meant to find it
    cases: int
    seconds: float
    sentence: str = ""
    case: str = ""
    lost: bool = False

    @property
    def scenario(self) -> Scenario:
        return from_json(self.case)
