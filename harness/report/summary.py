"""The closing report of a run: tables of what was covered, and the failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from nsa_oracle.harness.checks.tally import LayerTally, StageTally
from nsa_oracle.harness.compiled.launcher import LEFT_TO_THE_INTERPRETER
from nsa_oracle.harness.errors import counted
from nsa_oracle.harness.graphs.audit import AuditTally
from nsa_oracle.harness.judge import Verdict
from nsa_oracle.harness.protocol import STAGES, Strictness
from nsa_oracle.harness.report.declared import declared_lines
from nsa_oracle.harness.report.records import FailureRecord, grouped, methods_not_judged
from nsa_oracle.harness.report.text import not_judged, render, wrapped
from nsa_oracle.harness.scenarios.classes import LAYER_CLASSES, all_classes, switch_classes
from nsa_oracle.harness.scenarios.switches import Switches

MOST_UNVISITED = 20  # boundary classes: a run that leaves out more is a short one, and the count says so


def summary(
    verdict: Verdict,
    failures: Sequence[FailureRecord],
    seconds: float,
    switches: Switches,
    left_out: Sequence[str] = (),
    verbose: bool = False,
) -> str:
    """The closing report of a run.

    switches: of the backend. left_out: what the limits of backend and layer exclude. verbose: list all classes.
    """
    classes = known_classes(verdict, switches)
    of_switches = switch_classes(switches)
    covered = [name for name in classes if verdict.boundary_classes[name]]
    totals = Table("cases", "replays", "eager calls", "fields compared", "cells compared", "classes", "seconds")
    totals.add_row(
        *(f"{n:,}" for n in (verdict.cases, verdict.replays, verdict.eager_calls)),
        *(f"{n:,}" for n in (verdict.tally.fields, verdict.tally.cells)),
        f"{len(covered)} of {len(classes)}",
        f"{seconds:.0f}",
    )
    parts = [render(totals)]

    if any(verdict.boundary_classes[name] for name in of_switches) or (of_switches and failures):
        table = Table("optimisation", "cases passed", "failures", "verdict")
        for name in of_switches:
            passed = verdict.boundary_classes[name]
            failed = sum(name in _switch_classes(failure.optimizations) for failure in failures)
            outcome = "FAILS" if failed else "bit-exact" if passed else "not visited"
            table.add_row(name.removeprefix("switch "), f"{passed:,}", str(failed), outcome)
        parts.append(render(table))

    if verdict.layers.stages:
        parts += [render(_stages(verdict.layers, failures)), _relations(verdict.layers)]

    if (audit := verdict.audit).graphs or audit.compared or audit.not_audited:
        parts.append(_audited(audit))

    parts += interpreted_lines(verdict) + thread_error_lines(verdict) + declared_lines(verdict.declared)
    unvisited = [name for name in classes if name not in covered]
    if verbose:
        visits = [f"{name} {verdict.boundary_classes[name]}" for name in classes if name not in of_switches]
        parts.append(wrapped("boundary classes visited (cases): ", visits))
    elif 0 < len(unvisited) <= MOST_UNVISITED:
        parts.append(wrapped("boundary classes not visited: ", unvisited))
    if left_out:
        parts.append(not_judged(left_out))
    parts += _listed_failures(failures)
    judged = how_exact(verdict) if verdict.cases else "NOTHING JUDGED"
    outcome = f"{counted(len(failures), 'case')} FAILED" if failures else judged
    all_passed = f"{counted(verdict.cases, 'case')} passed, {counted(verdict.replays, 'replay')}"
    parts.append(f"oracle: {all_passed}, {outcome}")
    return "\n".join(parts)


def known_classes(verdict: Verdict, switches: Switches) -> list[str]:
    """The boundary classes that a run could visit; those of a layer, if it had one. switches: of the backend."""
    with_layer = bool(verdict.layers.stages)
    return [name for name in all_classes(switches) if with_layer or name not in LAYER_CLASSES]


def bugs_line(killed: int, planted: int) -> str:
    """How many bugs of the zoo were killed, each judged on its saved case."""
    return f"bugs: {killed} of {counted(planted, 'planted bug')} killed by a check that is meant to find them"


def interpreted_lines(verdict: Verdict) -> list[str]:
    """A line for each kernel that could not be compiled for the CPU."""
    return [f"{LEFT_TO_THE_INTERPRETER}{name} ({why})" for name, why in sorted(verdict.interpreted.items())]


def thread_error_lines(verdict: Verdict) -> list[str]:
    """A line for each exception that has ended a thread of judged code, in cases that passed."""
    return [
        f"WARNING: a thread of the judged code raised {error}" + (f" ({count:,} times)" if count > 1 else "")
        for error, count in sorted(verdict.thread_errors.items())
    ]


def _stages(layers: LayerTally, failures: Sequence[FailureRecord]) -> Table:
    """How many values of each stage of the attention layer were compared, and how."""
    failed = Counter(failure.field for failure in failures)
    table = Table("stage of the layer", "bit-exact", "within bound", "worst", "failures", "weaker as declared")
    for name in (name for name in STAGES if name in layers.stages or failed[name]):
        stage = layers.stages.get(name, StageTally())
        worst = f"{stage.worst:.2g}" if stage.bounded or stage.declared == Strictness.BOUND.value else "-"
        weaker = f"{stage.weaker:,} {stage.declared}".rstrip()
        table.add_row(name, *(f"{n:,}" for n in (stage.exact, stage.bounded)), worst, str(failed[name]), weaker)
    return table


def _relations(layers: LayerTally) -> str:
    tried = [f"{name} {count:,}" for name, count in sorted(layers.relations.items())]
    text = wrapped(f"layer: {counted(layers.replays, 'replay')}; no bit changed when: ", tried or ["nothing was tried"])
    if layers.calls:
        text += "\n" + methods_judged(layers)
    for what, counts in (
        ("store also of made-up keys", layers.keys),
        ("indexer also of made-up index keys", layers.scores),
        ("top-k also of rows of made-up logits", layers.selections),
    ):
        if counts:
            text += "\n" + wrapped(f"layer: {what}: ", [f"{name} {count:,}" for name, count in counts.items()])
    return text


def how_exact(verdict: Verdict) -> str:
    """How what passed was compared: bit for bit, but for what only has a bound, or is declared weaker, waived or left
    out.
    """
    if not verdict.tally.cells:
        return "NO FIELD COMPARED"
    stages = verdict.layers.stages.values()
    bounded, weaker = sum(stage.bounded for stage in stages), sum(stage.weaker for stage in stages)
    theirs = "its" if bounded == 1 else "their"
    exceptions = [f"{counted(bounded, 'number')} within {theirs} error bound"] if bounded else []
    exceptions += [f"{weaker:,} compared as declared"] if weaker else []
    waived = sum(waiver.cells for waiver in verdict.declared.waivers.values())
    exceptions += [f"{waived:,} cells waived as declared"] if waived else []
    left_out = len({place.partition(" ")[0] for place in verdict.declared.left_out})
    exceptions += [f"{counted(left_out, 'field')} not judged as declared"] if left_out else []
    return f"bit-exact but for {' and '.join(exceptions)}" if exceptions else "all bit-exact"


def methods_judged(layers: LayerTally) -> str:
    """How often each method that the layer brings itself was called and compared, and those that nothing called."""
    calls = [
        f"{method} {sum(by_run.values()):,} ({', '.join(f'{run} {count:,}' for run, count in sorted(by_run.items()))})"
        for method, by_run in layers.calls.items()
        if any(by_run.values())
    ]
    return wrapped("methods of the layer, calls judged: ", calls or ["none"])


def methods_report(layers: LayerTally) -> str:
    """``methods_judged``, and a line on methods that nothing called."""
    missed = [methods_not_judged(layers.never_called)] if layers.never_called else []
    return "\n".join([methods_judged(layers), *missed])


def _audited(audit: AuditTally) -> str:
    """What was inspected in the captured graphs themselves, and what could not be."""
    inspected = [f"captured once more from other values {audit.compared:,}"]
    if audit.graphs:
        inspected = [f"read node by node {audit.graphs:,}", f"kernels {audit.kernels:,}", *inspected]
        inspected += [f"addresses followed {audit.addresses:,}"]
        inspected += [f"{name} nodes {count:,}" for name, count in sorted(audit.other_nodes.items())]
    text = wrapped("graphs: ", inspected)
    missed = [f"{reason} {count:,}" for reason, count in sorted(audit.not_audited.items())]
    return "\n".join([text, wrapped("not audited: ", missed)]) if missed else text


def _switch_classes(optimizations: Sequence[str]) -> list[str]:
    """The table rows that a failure with these optimisations counts in."""
    return [f"switch {name}" for name in optimizations] or ["no switch"]


def stories(failures: Sequence[FailureRecord], verbose: bool = False) -> str:
    """One report for each different failure, of its smallest case, and how many others fail alike."""
    parts = []
    for group in grouped(failures):
        parts.append(group[0].report)
        if others := [failure.command for failure in group[1:]]:
            alike = f"{counted(len(others), 'more case')} {'fails' if len(others) == 1 else 'fail'} alike"
            parts.append(f"{alike}:\n  " + "\n  ".join(others) if verbose else f"{alike} (-v lists them)")
    return "\n\n".join(parts)


def _listed_failures(failures: Sequence[FailureRecord]) -> list[str]:
    """Each different failure once, with the command that replays its smallest case."""
    return [
        f"FAILED{f' ({len(group)} cases)' if len(group) > 1 else ''}: {group[0].sentence}"
        + (f"\n  {group[0].command}" if group[0].command else "")
        for group in grouped(failures)
    ]
