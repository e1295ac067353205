"""How far a run is: each process counts in files of its own in one folder, and whoever shows it adds them up."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from nsa_oracle.harness.errors import counted
from nsa_oracle.harness.findings import Finding


class Failure(Protocol):
    """What a count tells of an ``OracleFailure``."""

    finding: Finding
    event: int | None


@dataclass(frozen=True)
class Count:
    """What one process has judged of one part of a run, of ``backend`` and ``layer`` (``module:attribute`` or None).

    saved: file of the case that failed; empty if none has. kind, field: of its finding; event: the index of the event
    that shows it. expected: cases that the whole run will judge. shrinking: while that case is made smaller, how many
    events it has by now; ends: the value of ``time.monotonic()`` after which no trial of that begins.
    """

    cases: int = 0
    replays: int = 0
    saved: str = ""
    expected: int = 0
    backend: str | None = None
    layer: str | None = None
    process: int = 0
    kind: str = ""
    field: str = ""
    event: int | None = None
    shrinking: int = 0
    ends: float = 0.0

    def is_shrinking(self, now: float) -> bool:
        """Whether a case is being made smaller: a process that has ended says so for ever."""
        return self.shrinking > 0 and now < self.ends


@dataclass(frozen=True)
class CaseCounter:
    """Counts one part of a run. folder: of the run, which must exist. name: of the part, different for each."""

    folder: Path
    name: str
    backend: str | None = None
    layer: str | None = None

    def note(
        self,
        cases: int = 0,
        replays: int = 0,
        saved: Path | None = None,
        expected: int = 0,
        failure: Failure | None = None,
        shrinking: int = 0,
        ends: float = 0.0,
    ) -> None:
        """Set the count. Where nothing can be written nothing is counted: a full disk must not end a run."""
        count = Count(cases, replays, str(saved or ""), expected, self.backend, self.layer, os.getpid())
        count = replace(count, shrinking=shrinking, ends=ends)
        if failure is not None:
            found = failure.finding
            count = replace(count, kind=found.kind.value, field=found.field, event=failure.event)
        path = self.folder / f"{self.name}.json"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps(asdict(count)), encoding="utf-8")
            temporary.replace(path)

    def claim(self, finding: str) -> bool:
        """Whether no other part of the run, of the same backend and layer, has claimed ``finding`` before."""
        named = hashlib.sha256(f"{self.backend} {self.layer} {finding}".encode()).hexdigest()[:16]
        try:
            (self.folder / f"{named}.found").touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            pass
        return True


def counts_in(folder: Path) -> list[Count]:
    """All counts of a run."""
    found = []
    for path in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError):
            found.append(Count(**json.loads(path.read_text(encoding="utf-8"))))
    return found


def progress_line(counts: Sequence[Count], seconds: float, judging: float | None = None) -> str:
    """How far a run is after ``seconds``. judging: for how many of them cases were judged; None: for all."""
    cases, replays, expected = (sum(getattr(c, name) for c in counts) for name in ("cases", "replays", "expected"))
    findings = sum(bool(count.saved) for count in counts)
    of_all = f"{cases:,} of {expected:,} cases" if expected else counted(cases, "case")
    found = counted(findings, "finding") if findings else "no finding"
    line = f"oracle: {of_all}, {counted(replays, 'replay')}, {found} after {duration(seconds)}"
    if 0 < cases < expected:
        line += f", about {duration((judging or seconds) * (expected - cases) / cases)} left"
    return line


def shrinking_lines(counts: Sequence[Count], now: float) -> list[str]:
    """What is made smaller ``now``, one line for each case."""
    return [
        f"oracle: {shrinking_words(count.saved or 'a case', count.shrinking, count.ends - now)}"
        for count in counts
        if count.is_shrinking(now)
    ]


def shrinking_words(what: str, events: int, seconds: float) -> str:
    """That ``what`` is made smaller, which has so many events by now, and how long that may take."""
    return f"shrinking {what}: {counted(events, 'event')} so far, up to {duration(max(0.0, seconds))} left"


def duration(seconds: float) -> str:
    """Seconds below two minutes, else minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
