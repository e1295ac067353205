"""How a mutant fared."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.mutants.mutants import Mutant


class ScoringError(ValueError):
    """Mutants that cannot be judged. One line that names the cause and the mend."""


class Fate(enum.Enum):
    """What became of a mutant."""

    KILLED = "killed"  # the oracle reported a failure
    IMPORT = "crash at import"  # it could not even be imported
    FAULT = "fault"  # the process died of it
    TIME_OUT = "time-out"
    SURVIVED = "survived"
    UNREACHED = "not reached"  # no case runs the changed line
    NOT_RUN = "needs a GPU"

    @property
    def is_alive(self) -> bool:
        """Whether cases might have killed it and did not."""
        return self in (Fate.SURVIVED, Fate.UNREACHED)


@dataclass(frozen=True)
class Score:
    """How a mutant fared. case: what killed it, or was running when the process died. judged: cases that it took."""

    mutant: Mutant
    fate: Fate
    check: Check | None = None
    case: str = ""
    sentence: str = ""
    judged: int = 0
    seconds: float = 0.0
