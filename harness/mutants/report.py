"""Renders the scores of mutants: as tables, as lines, and as JSON with one record per line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.errors import counted
from nsa_oracle.harness.mutants.mutants import Mutant
from nsa_oracle.harness.mutants.score import Fate, Score

_WIDEST = 80  # characters of source text in a line


def listing(mutants: Sequence[Mutant]) -> str:
    """One line per mutant: id and change."""
    return "\n".join(f"{mutant.id}  {_change(mutant)}" for mutant in mutants)


def matrix(scores: Sequence[Score]) -> Table:
    """A table of files by the fates of their mutants; kills are counted by the check that reported them."""
    counts = {file: Counter(_column(s) for s in scores if s.mutant.file == file) for file in _files(scores)}
    columns = [*(check.value for check in Check), *(fate.value for fate in Fate if fate is not Fate.KILLED)]
    met = [column for column in columns if any(count[column] for count in counts.values())]
    table = Table("file", "mutants", *met)
    for file, count in counts.items():
        table.add_row(file, str(count.total()), *(str(count[column] or "") for column in met))
    totals = sum(counts.values(), Counter[str]())
    table.add_section()
    table.add_row("", str(totals.total()), *(str(totals[column]) for column in met))
    return table


def survivors(scores: Sequence[Score]) -> str:
    """One line per surviving mutant: id, change and number of cases that were judged."""

    def tried(scored: Score) -> str:
        return f"survived {counted(scored.judged, 'case')}" if scored.judged else "no case reaches it"

    return "\n".join(f"{scored.mutant.id}  {_change(scored.mutant)}  ({tried(scored)})" for scored in scores)


def sum_line(scores: Sequence[Score]) -> str:
    """The totals in one line."""
    fates = Counter(scored.fate for scored in scores)
    killed = sum(fates[fate] for fate in (Fate.KILLED, Fate.FAULT, Fate.TIME_OUT, Fate.IMPORT))
    details = [f"{fates[fate]} {fate.value}" for fate in (Fate.IMPORT, Fate.UNREACHED, Fate.NOT_RUN) if fates[fate]]
    totals = f"mutants: {killed} of {len(scores)} killed, {fates[Fate.SURVIVED]} survived"
    return f"{totals} ({', '.join(details)})" if details else totals


def as_json(scored: Score) -> str:
    """The JSON record of one mutant, in one line."""
    mutant = scored.mutant
    return json.dumps(
        {
            "id": mutant.id,
            "file": mutant.file,
            "line": mutant.edit.node.lineno,
            "operator": mutant.edit.operator,
            "before": mutant.before,
            "after": mutant.after,
            "fate": scored.fate.value,
            "check": scored.check.value if scored.check is not None else None,
            "case": scored.case or None,
            "sentence": scored.sentence,
            "cases": scored.judged,
            "seconds": round(scored.seconds, 2),
        }
    )


def _files(scores: Sequence[Score]) -> list[str]:
    return sorted({scored.mutant.file for scored in scores})


def _column(scored: Score) -> str:
    return scored.check.value if scored.check is not None else scored.fate.value


def _change(mutant: Mutant) -> str:
    return f"{_shortened(mutant.before)}  ->  {_shortened(mutant.after)}"


def _shortened(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."
