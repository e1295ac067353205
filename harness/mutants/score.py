"""The record of the result of judging a mutant."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.mutants.mutants import Mutant


class ScoringError(ValueError):
    """Mutants cannot be judged. The message is one line that names the cause and the fix."""


class Fate(enum.Enum):
    """The outcome of judging a mutant."""

    KILLED = "killed"  # the oracle reported a failure
    IMPORT = "crash at import"  # importing ``optimized/`` raised an exception
    FAULT = "fault"  # the process died
    TIME_OUT = "time-out"  # the process exceeded its limit of processor time
    SURVIVED = "survived"
    UNREACHED = "not reached"  # no case runs the changed line
    NOT_RUN = "needs a GPU"

    @property
    def is_alive(self) -> bool:
        """Whether cases could have killed the mutant and did not."""
        return self in (Fate.SURVIVED, Fate.UNREACHED)


@dataclass(frozen=True)
class Score:
    """The result of judging one mutant.

    check, sentence: of the finding that killed it. case: name of the case that killed it, or that was running when the
    process died. judged: number of cases that were begun. seconds: processor time.
    """

    mutant: Mutant
    fate: Fate
    check: Check | None = None
    case: str = ""
    sentence: str = ""
    judged: int = 0
    seconds: float = 0.0
