"""The end of a run: what all processes reported, as tables, failures and an exit code."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsa_oracle.harness.compiled.building import cache_complaint
from nsa_oracle.harness.errors import ScenarioError, counted
from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.plugin.session import Session, Specs, name_of
from nsa_oracle.harness.plugin.unused import unused_options
from nsa_oracle.harness.plugin.writing import environment_of, utc, write_reports
from nsa_oracle.harness.report import summary
from nsa_oracle.harness.report.document import PlantedBugs, RunReport, SubjectReport, Totals, verdict_of
from nsa_oracle.harness.report.markdown import NOT_WRITTEN, SUMMARY, told_in_a_workflow
from nsa_oracle.harness.report.records import FailureRecord, ItemRecord, RunRecord
from nsa_oracle.harness.scenarios.files import RUNNING, cases_of_dead_processes, load, process_of, to_json
from nsa_oracle.harness.scenarios.story import story
from nsa_oracle.harness.scenarios.switches import NO_SWITCHES, Switches
from nsa_oracle.harness.search.explore import Exploration
from nsa_oracle.harness.search.progress import Count, counts_in, progress_line
from nsa_oracle.harness.subjects.default import OPTIMIZED_SWITCHES
from nsa_oracle.pytest_plugin import BUG, INTERRUPTION, PROPERTY

Runs = dict[Specs, RunRecord]
"""What the run covered, by backend and layer."""


def reported(terminalreporter: pytest.TerminalReporter) -> tuple[Runs, Counter[str]]:
    """What the oracle's items reported, those of xdist workers included; and outcomes of the items of the zoo."""
    runs: Runs = {}
    bugs = Counter[str]()
    for outcome, reports in terminalreporter.stats.items():
        for item in reports:
            for name, value in getattr(item, "user_properties", ()):
                if name == BUG and outcome in ("passed", "failed"):
                    bugs[outcome] += 1
                if name == PROPERTY and getattr(item, "when", "") == "call":
                    record = ItemRecord.from_json(value)
                    runs.setdefault((record.backend, record.layer), RunRecord()).add(record)
    return runs, bugs


def exit_code(exitstatus: int, terminalreporter: pytest.TerminalReporter, session: Session) -> int:
    """The exit code of the run: 1 if nothing failed because something was not judged; that of a signal if one came."""
    if session.config.stash[INTERRUPTION].arrived:
        return session.termination.exit_code if session.termination is not None else exitstatus
    runs = reported(terminalreporter)[0]
    gaps = any(_gaps(run, specs, session) for specs, run in runs.items()) or _unused(session, exitstatus, runs)
    return int(pytest.ExitCode.TESTS_FAILED) if gaps and exitstatus == pytest.ExitCode.OK else exitstatus


def write_report(terminalreporter: pytest.TerminalReporter, session: Session, exitstatus: int) -> None:
    """Print the closing report, one part for each backend and layer that was judged. exitstatus: that of the tests."""
    if session.config.stash[INTERRUPTION].arrived:
        session.end_children()  # which were judging when the signal came
        terminalreporter.section("oracle: interrupted (the tables below count tests that had ended)")
        terminalreporter.write_line(progress_line(counts_in(session.counts), time.time() - session.started))
    runs, bugs = reported(terminalreporter)
    for specs, failure in _unreported(runs, session):
        runs.setdefault(specs, RunRecord()).failures.append(failure)
    for specs, run in runs.items():
        if run.items or run.failures:
            terminalreporter.section("oracle" if len(runs) == 1 else f"oracle: {name_of(specs)}")
            _write_run(terminalreporter, session, specs, run)
    if unused := _unused(session, exitstatus, runs):
        if len(runs) != 1:
            terminalreporter.section("oracle")
        for line in unused:
            terminalreporter.write_line(line, red=True)
    if session.device.type == "cpu" and runs and (complaint := cache_complaint()):  # what judges says it to its test
        terminalreporter.write_line(f"WARNING: {complaint}")
    if bugs:
        terminalreporter.write_line(summary.bugs_line(bugs["passed"], bugs.total()))
    if session.reports.files or os.environ.get(SUMMARY):
        report = run_report(terminalreporter, session, runs, bugs, exitstatus)
        terminalreporter.ensure_newline()
        for line in [*write_reports(session.reports, report), *told_in_a_workflow(report)]:
            terminalreporter.write_line(line, red=line.startswith(NOT_WRITTEN))


def run_report(
    terminalreporter: pytest.TerminalReporter, session: Session, runs: Runs, bugs: Counter[str], exitstatus: int
) -> RunReport:
    """All that the run found, for machines."""
    subjects = []
    for specs, run in runs.items():
        known = summary.known_classes(run.verdict, _switches(specs, verbose=True))
        subjects.append(SubjectReport.of(name_of(specs), *specs, run, known, _gaps(run, specs, session)))
    planted = PlantedBugs(planted=bugs.total(), killed=bugs["passed"])
    unjudged = tuple(_unused(session, exitstatus, runs))
    failed, durations = _failed_otherwise(terminalreporter), _durations(terminalreporter)
    is_interrupted = session.config.stash[INTERRUPTION].arrived
    return RunReport(
        verdict=verdict_of(subjects, planted, failed, unjudged, is_interrupted),
        exit_code=exit_code(exitstatus, terminalreporter, session),
        started=utc(session.started),
        seconds=time.time() - session.started,
        durations=durations,
        environment=environment_of(session.device, session.profile),
        totals=Totals.of(subjects),
        bugs=planted,
        failed_otherwise=failed,
        unjudged=unjudged,
        shards=() if session.shard is None else (str(session.shard),),
        subjects=tuple(subjects),
    )


def _failed_otherwise(terminalreporter: pytest.TerminalReporter) -> tuple[str, ...]:
    """Tests that failed without a finding of theirs, and modules that could not be collected."""
    found = []
    for item in (item for outcome in ("failed", "error") for item in terminalreporter.stats.get(outcome, ())):
        told = dict(getattr(item, "user_properties", ()))
        if BUG not in told and not (PROPERTY in told and ItemRecord.from_json(told[PROPERTY]).failures):
            found.append(item.nodeid)
    return tuple(dict.fromkeys(found))


def _durations(terminalreporter: pytest.TerminalReporter) -> dict[str, float]:
    """The time of the oracle's tests, by name."""
    seconds = Counter[str]()
    for item in (item for reports in terminalreporter.stats.values() for item in reports):
        names = dict(getattr(item, "user_properties", ()))
        if getattr(item, "when", "") == "call" and (PROPERTY in names or BUG in names):
            seconds[item.nodeid.partition("[")[0]] += item.duration
    return dict(seconds)


def _switches(specs: Specs, verbose: bool) -> Switches:
    backend, layer = specs
    return OPTIMIZED_SWITCHES if backend is None and (layer is None or verbose) else NO_SWITCHES


def _write_run(terminalreporter: pytest.TerminalReporter, session: Session, specs: Specs, run: RunRecord) -> None:
    verbose = session.config.get_verbosity() > 0
    left_out = list(run.left_out)
    if run.unfit:
        names = f": {', '.join(sorted(run.unfit))}" if verbose else " (-v names them)"
        left_out.append(f"{counted(len(run.unfit), 'saved case')}{names}")
    if run.expected:
        terminalreporter.write_line(f"{counted(run.expected, 'case')} failed, as the tests expect")
        if not run.verdict.cases and not run.failures:
            return
    switches = _switches(specs, verbose)
    if run.failures:
        terminalreporter.write_line(f"{summary.stories(run.failures, verbose)}\n")
    seconds = time.time() - session.started
    text = summary.summary(run.verdict, run.failures, seconds, switches, left_out, verbose)
    *tables, verdict = text.splitlines()
    if run.without:
        tables.append(run.without)
    terminalreporter.write_line("\n".join(tables))
    terminalreporter.write_line(verdict, red=bool(run.failures), green=not run.failures, bold=True)
    fresh = run.seeds - {0}
    if fresh:
        terminalreporter.write_line(
            f"drawn from seed {', '.join(map(str, sorted(fresh)))} (--oracle-seed draws it again)"
        )
    for gap in _gaps(run, specs, session):
        terminalreporter.write_line(gap, red=True)


def _unused(session: Session, exitstatus: int, runs: Runs) -> list[str]:
    if session.shard is not None and not runs:  # none of the oracle's items are in it; the merged report has them
        return []
    taken = [run.options for run in runs.values()]
    return unused_options(session.config, exitstatus, taken, bool(session.replayed))


def _gaps(run: RunRecord, specs: Specs, session: Session) -> list[str]:
    """What the run did not judge. With a backend of its own as well, it may judge that one's metadata alone."""
    backend, layer = specs
    return run.gaps(layer if backend is None else None, is_part=session.shard is not None)


def _unreported(runs: Runs, session: Session) -> Iterator[tuple[Specs, FailureRecord]]:
    """Failures that no item has reported, because the process that judged died or was interrupted."""
    reported = {failure.saved for run in runs.values() for failure in run.failures}
    counts = counts_in(session.counts)
    by_process = {count.process: count for count in counts}
    if not session.config.stash[INTERRUPTION].arrived:
        for file in cases_of_dead_processes(session.save_dir, session.started):
            if str(file) in reported:
                continue
            count = by_process.get(process_of(file), Count(backend=session.specs[0], layer=session.specs[1]))
            sentence = "the process died while it judged a case"
            specs = count.backend, count.layer
            yield specs, _by_file(session, specs, file, "died", sentence, f"ORACLE FAILURE  {sentence}")
        return
    for file in session.save_dir.glob(f"*{RUNNING}"):
        if process_of(file) in by_process:
            file.unlink(missing_ok=True)  # its case was interrupted, not failed
    for count in counts:
        if count.saved and count.saved not in reported:
            specs = count.backend, count.layer
            yield specs, _interrupted(session, specs, count)


def _interrupted(session: Session, specs: Specs, count: Count) -> FailureRecord:
    """The record of a case that had failed, and was being shrunk when the run was interrupted.

    It is alike to others of the same finding.
    """
    file = Path(count.saved)
    try:
        scenario = load(file)
    except ScenarioError as error:
        return _by_file(session, specs, file, "interrupted", str(error), str(error))
    told = story(scenario, count.event)
    text = f"ORACLE FAILURE  {scenario.note}\n\n{told}\n\nperhaps not the smallest case: interrupted"
    record = _by_file(session, specs, file, count.kind, scenario.note, text)
    case = to_json(scenario)
    return dataclasses.replace(record, field=count.field, size=len(case), case=case, event=count.event)


def _by_file(session: Session, specs: Specs, file: Path, kind: str, sentence: str, text: str) -> FailureRecord:
    is_timeout = kind == Kind.TIMEOUT.value
    command = session.replay_command(Exploration(saved=file), specs, Kind.TIMEOUT if is_timeout else None)
    report = f"{text}\n\nsaved:  {file}\nreplay: {command}"
    return FailureRecord(kind, file.name, sentence, command, report, saved=str(file))
