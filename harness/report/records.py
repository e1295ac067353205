"""What the items of a run report, as JSON, and what they add up to: the run's coverage, failures and gaps."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from nsa_oracle.harness.checks.verdict import OracleFailure, Verdict
from nsa_oracle.harness.findings import Finding
from nsa_oracle.harness.report.declared import own_fields_not_judged, unneeded_declarations
from nsa_oracle.harness.scenarios.files import to_json


@dataclass(frozen=True)
class FailureRecord:
    """One failing case. report: the whole text for a person. size: letters of its record. saved: its file, if any.

    case: the JSON of the case, and event: the index of the event that shows the failure, if they are known. finding:
    what was found, if a comparison found it.
    """

    kind: str
    field: str
    sentence: str
    command: str
    report: str
    optimizations: tuple[str, ...] = ()
    size: int = 0
    saved: str = ""
    case: str = ""
    event: int | None = None
    finding: Finding | None = None

    @staticmethod
    def of(failure: OracleFailure, command: str, report: str, saved: Path | None = None) -> FailureRecord:
        """The record of a failure that ``command`` replays and ``report`` explains."""
        finding, scenario = failure.finding, failure.scenario
        case = to_json(scenario)
        return FailureRecord(
            finding.kind.value,
            finding.field,
            finding.sentence(),
            command,
            report,
            scenario.optimizations,
            len(case),
            str(saved or ""),
            case,
            failure.event,
            finding,
        )


def grouped(failures: Sequence[FailureRecord]) -> list[list[FailureRecord]]:
    """The failures by what is wrong, kind and field: one bug often fails many cases. The smallest case comes first."""
    groups: dict[tuple[str, str], list[FailureRecord]] = {}
    for failure in failures:
        groups.setdefault((failure.kind, failure.field), []).append(failure)
    return [sorted(group, key=lambda failure: failure.size) for group in groups.values()]


@dataclass(frozen=True)
class ItemRecord:
    """What one test item covered, of ``backend`` and ``layer``: ``module:attribute``, or None for ``optimized/``.

    drawn_by: the test that drew its cases; empty for a saved case. seed: from which they were drawn. with_layer:
    whether they have a layer. missing: classes that they were to visit and did not. left_out: what
    could be drawn but is excluded by declared limits. unfit: the name of a saved case that is outside of them. without:
    why there is no saved case. options: the names of the options that it took. expected: how many cases failed as the
    test expects; they are no ``failures``.
    """

    verdict: Verdict = field(default_factory=Verdict)
    failures: tuple[FailureRecord, ...] = ()
    backend: str | None = None
    layer: str | None = None
    drawn_by: str = ""
    seed: int | None = None
    with_layer: bool = False
    missing: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    unfit: str = ""
    without: str = ""
    options: tuple[str, ...] = ()
    expected: int = 0

    def to_json(self) -> str:
        """One line."""
        return json.dumps(_items().dump_python(self, mode="json"))

    @staticmethod
    def from_json(text: str) -> ItemRecord:
        """The item that ``to_json`` wrote."""
        return _items().validate_python(json.loads(text))


@functools.cache
def _items() -> TypeAdapter[ItemRecord]:
    return TypeAdapter(ItemRecord)


@dataclass
class RunRecord:
    """What the items of a run that judge the same backend and layer add up to.

    drawn: cases drawn and judged, by test. seeds: from which they were drawn. missing: classes that some item was to
    visit and did not, by whether its cases have a layer. left_out, unfit, without, options, expected: as in
    ``ItemRecord``.
    """

    verdict: Verdict = field(default_factory=Verdict)
    failures: list[FailureRecord] = field(default_factory=list)
    drawn: Counter[str] = field(default_factory=Counter)
    seeds: set[int] = field(default_factory=set)
    missing: dict[bool, list[str]] = field(default_factory=lambda: {False: [], True: []})
    left_out: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
    without: str = ""
    options: set[str] = field(default_factory=set)
    expected: int = 0
    items: int = 0

    def add(self, item: ItemRecord) -> None:
        """Count one item."""
        self.items += 1
        self.verdict.add(item.verdict)
        self.failures += item.failures
        if item.drawn_by:
            self.drawn[item.drawn_by] += item.verdict.cases
        if item.seed is not None:
            self.seeds.add(item.seed)
        self.missing[item.with_layer] += item.missing
        self.without = self.without or item.without
        self.options.update(item.options)
        self.expected += item.expected
        if item.unfit and item.unfit not in self.unfit:
            self.unfit.append(item.unfit)
        self.left_out += [line for line in item.left_out if line not in self.left_out]

    def join(self, other: RunRecord) -> None:
        """Count another part of the run."""
        self.items += other.items
        self.verdict.add(other.verdict)
        self.failures += other.failures
        self.drawn.update(other.drawn)
        self.seeds |= other.seeds
        for with_layer, names in other.missing.items():
            self.missing[with_layer] += names
        self.without = self.without or other.without
        self.options |= other.options
        self.unfit += [name for name in other.unfit if name not in self.unfit]
        self.left_out += [line for line in other.left_out if line not in self.left_out]

    def gaps(self, layer: str | None = None, is_part: bool = False) -> list[str]:
        """Why a run without failures proves less than it seems to, one line each: such a run must not be green.

        layer: the layer that alone was to be judged, if so. is_part: of a run in several shards; then without what only
        the whole can tell.
        """
        if not self.items or self.failures or self.expected:
            return []
        gaps = [
            f"NOT JUDGED: {test} drew no case; give it more time" for test, count in self.drawn.items() if not count
        ]
        for with_layer, names in self.missing.items():
            if unseen := [name for name in dict.fromkeys(names) if name not in self.verdict.boundary_classes]:
                gaps.append(not_visited(unseen, with_layer))
        return gaps if is_part else gaps + gaps_of_the_whole(self.verdict, layer, self.drawn.total() > 0)


def gaps_of_the_whole(verdict: Verdict, layer: str | None, has_drawn: bool) -> list[str]:
    """What a whole run did not judge. layer: that alone was to be judged, if so. has_drawn: whether it drew cases."""
    gaps = []
    if not verdict.cases:
        gaps.append("NOT JUDGED: no case at all was judged")
    elif not verdict.tally.cells:
        gaps.append(NOTHING_COMPARED)
    elif layer is not None and not verdict.layers.calls:
        gaps.append(f"NOT JUDGED: layer '{layer}': no case of this run has a layer")
    if methods := verdict.layers.never_called:
        gaps.append(methods_not_judged(methods))
    if has_drawn:
        gaps += own_fields_not_judged(verdict.declared)
    return gaps + unneeded_declarations(verdict.declared)


NOTHING_COMPARED = "NOT JUDGED: no cell of any field was compared; declare fewer fields as unjudged or absent"


def methods_not_judged(methods: Sequence[str]) -> str:
    """One line on methods that a layer brings itself and nothing called: the run proves nothing about them."""
    return f"NOT JUDGED: {', '.join(methods)}: no call in this run; judge more cases, or remove the method"


MOST_NAMED = 6  # classes in one line


def not_visited(missing: Sequence[str], with_layer: bool) -> str:
    """One line on classes that a run was to visit and did not."""
    named = ", ".join(missing[:MOST_NAMED]) + (f" and {len(missing) - MOST_NAMED} more" if missing[MOST_NAMED:] else "")
    kind = "with a layer" if with_layer else "of metadata alone"
    return f"NOT VISITED: {len(missing)} classes of cases {kind} ({named}); give the run more time"
