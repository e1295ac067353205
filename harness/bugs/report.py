"""Renders the kills of a hunt: as a table, as a line, as JSON and as HTML."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence

from rich.table import Table

from nsa_oracle.harness.bugs.bug import Bug
from nsa_oracle.harness.bugs.kill import Kill
from nsa_oracle.harness.bugs.zoo import ZOO
from nsa_oracle.harness.report.page import PageContent, page
from nsa_oracle.harness.scenarios.scenario import Event, Scenario

MOST_EVENTS = 24  # of a case in one line


def listing(bugs: Sequence[Bug]) -> Table:
    """A table of ``bugs``: name, what is wrong, reference, and what each needs to be hunted."""
    table = Table("bug", "what is wrong", "seen in", "needs")
    for bug in bugs:
        needs = ["a GPU"] * bug.gpu + ["no GPU"] * bug.cpu + ["a layer"] * bug.layer
        table.add_row(bug.name, bug.sentence, bug.reference, ", ".join(needs))
    return table


def kills_table(kills: Sequence[Kill]) -> Table:
    """The matrix for a log, one line per bug: the check that killed it, with ``?`` if that is not one of its checks."""
    table = Table("bug", "check", "cases", "seconds", "smallest case", box=None)
    for kill in kills:
        check = "" if kill.check is None else kill.check.value if kill.meant else f"{kill.check.value} ?"
        table.add_row(kill.bug, check, str(kill.cases), f"{kill.seconds:.0f}", _smallest_case(kill))
    return table


def _smallest_case(kill: Kill) -> str:
    return one_line_story(kill.scenario) if kill.case else kill.sentence or "SURVIVED"


def sum_line(kills: Sequence[Kill], left_out: int = 0) -> str:
    """The totals of the matrix in one line. left_out: number of bugs that were not hunted because they need a GPU."""
    killed = [kill for kill in kills if kill.meant]
    cases = [kill.cases for kill in killed]
    spread = f", after {statistics.median(cases):g} cases in the median and {max(cases)} at most" if cases else ""
    gpu = f"; {left_out} need a GPU" if left_out else ""
    return f"bugs: {len(killed)} of {len(kills)} killed by the check that is meant to{spread}{gpu}"


def as_json(kills: Sequence[Kill]) -> str:
    """A JSON list with one record per kill, which includes the description of the bug."""
    records = []
    for kill in kills:
        bug = ZOO[kill.bug]
        record = dataclasses.asdict(kill) | {
            "check": kill.check.value if kill.check is not None else None,
            "case": json.loads(kill.case) if kill.case else None,
            "group": bug.group.value,
            "what": bug.sentence,
            "reference": bug.reference,
            "trigger": bug.trigger,
            "meant_checks": sorted(check.value for check in bug.caught_by),
        }
        records.append(record)
    return json.dumps(records, indent=1) + "\n"


def as_html(kills: Sequence[Kill]) -> str:
    """The matrix and its totals as a page."""
    return page(PageContent().and_file(as_json(kills), ""), "Kill matrix")


def one_line_story(scenario: Scenario) -> str:
    """The sizes and events of a case in one line."""
    setup = scenario.setup
    sizes = f"P {setup.page_size}, W {setup.max_context_len}, K {setup.index_topk}"
    sizes += f", N {setup.num_steps}, nd {setup.num_draft_tokens}"
    layer = "" if setup.layer is None else f", {setup.layer.regime.value} {setup.layer.kv_cache_dtype.value}"
    switches = "".join(f" +{name}" for name in scenario.optimizations)
    events = [_event(event) for event in scenario.events[:MOST_EVENTS]]
    if (more := len(scenario.events) - len(events)) > 0:
        events.append(f"{more} more")
    return f"{sizes}{layer}{switches}: {'; '.join(events)}"


def _event(event: Event) -> str:
    values = event.model_dump(mode="json", exclude_defaults=True, exclude={"event"})
    words = " ".join(",".join(map(str, value)) if isinstance(value, list) else str(value) for value in values.values())
    return f"{event.event} {words}".strip()
