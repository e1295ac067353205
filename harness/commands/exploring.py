"""The command ``explore``: judges many drawn cases on the workers of a cluster, or of this machine."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from nsa_oracle.harness.cluster.corpus import SharedCorpus
from nsa_oracle.harness.cluster.exploring import ClusterFinding, Exploring
from nsa_oracle.harness.cluster.pool import LOCAL, PoolLost, connected
from nsa_oracle.harness.cluster.state import FILE, RunState, read_state
from nsa_oracle.harness.cluster.work import ClusterTask
from nsa_oracle.harness.commands.app import (
    BackendOption,
    Device,
    DeviceOption,
    LayerOption,
    TimeoutOption,
    app,
    unusable,
)
from nsa_oracle.harness.commands.terminal import ended_by_a_signal, progress_of
from nsa_oracle.harness.errors import BackendError, ScenarioError, counted
from nsa_oracle.harness.report.failure import explain, explain_death, replay_command
from nsa_oracle.harness.report.records import gaps_of_the_whole
from nsa_oracle.harness.report.summary import how_exact
from nsa_oracle.harness.scenarios.files import check_folder
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.search.progress import duration
from nsa_oracle.harness.search.spec import SubjectSpec
from nsa_oracle.harness.signals import INTERRUPTED, Termination
from nsa_oracle.starting import CASE_SECONDS

SECONDS_BETWEEN_LINES = 30.0  # of progress, where there is no terminal


@app.command("explore")
def explore_cases(
    cases: Annotated[int, typer.Option(min=0, help="Cases of metadata alone.")] = 1000,
    layer_cases: Annotated[
        int | None, typer.Option(min=0, help="Cases with an attention layer.  [default: a fifth]", show_default=False)
    ] = None,
    scheduler: Annotated[
        str, typer.Option(metavar="ADDRESS|local", help="A Dask scheduler, or workers of this machine.")
    ] = LOCAL,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers of this machine.  [default: its cores]")] = None,
    backend: BackendOption = None,
    layer: LayerOption = None,
    device: DeviceOption = Device.AUTO,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawn cases.")] = 0,
    timeout: TimeoutOption = CASE_SECONDS,
    budget: Annotated[float | None, typer.Option(min=0, help="Time limit of the run.", metavar="SECONDS")] = None,
    save: Annotated[Path, typer.Option(help="Folder for failing cases, and for the state of the run.")] = Path(
        "failures"
    ),
    corpus: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Folder, or any address that fsspec knows, of cases that failed once.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run whose state is in --save.")] = False,
) -> None:
    """Judge many drawn cases on the workers of a cluster.

    Each failing case is saved as soon as it is found, made smaller by a worker, and told once. A case whose process
    dies is judged again, by three processes at most. Stopping the run loses nothing: --resume goes on with it. The
    cases of a --corpus are judged first, and failing ones are added to it.
    """
    task: ClusterTask | None = None
    run: Exploring | None = None
    termination: Termination | None = None
    begun, lost, interrupted, stopped = time.monotonic(), "", False, INTERRUPTED
    deadline = math.inf if budget is None else begun + budget
    counts = cases, cases // 5 if layer_cases is None else layer_cases
    if not sum(counts):
        raise unusable("explore: no cases; give --cases or --layer-cases")
    try:
        spec = SubjectSpec(backend, layer, timeout or None)
        wanted = None if device is Device.AUTO else device is Device.CUDA
        state = _state(save, resume)
        known, share = _shared(corpus)
        if state is not None:  # before workers are started
            state.check(backend, layer, state.device if wanted is None else device.value, seed, save / FILE)
        with (
            ended_by_a_signal() as termination,
            connected(scheduler, workers or os.cpu_count() or 1, wanted) as (pool, on_gpu),
        ):
            task = ClusterTask(spec, "cuda" if on_gpu else "cpu", seed)
            if state is not None:
                state.check(backend, layer, task.device, seed, save / FILE)
            run = Exploring(task, pool, *counts, save, state, known, share)
            with progress_of("exploring", run.expected) as show:
                run.run(deadline, _reporter(run, show))
    except KeyboardInterrupt:
        interrupted = True
        stopped = INTERRUPTED if termination is None else termination.exit_code
    except PoolLost as error:
        lost = str(error)
    except (BackendError, ScenarioError) as error:
        if run is None or not run.found:
            raise unusable(str(error)) from None
        lost = str(error)
    if run is None or task is None:
        raise typer.Exit(stopped)
    _report(run, task)
    seconds = time.monotonic() - begun
    typer.echo(f"{_line(run)} in {duration(seconds)}, {run.verdict.replays / max(seconds, 1e-9):.0f} replays a second")
    unfinished = run.judged < run.expected
    if unfinished:
        why = "interrupted" if interrupted else lost or "out of time"
        typer.echo(f"{why}: explore --resume --save {save} goes on")
    if run.unsaved:
        typer.echo(f"error: not saved: {run.unsaved}", err=True)
    # Of a run that goes on with another one, or is not at its end, this process knows a part alone.
    is_whole = not (resume or unfinished)
    gaps = gaps_of_the_whole(run.verdict, layer, has_drawn=True) if is_whole and not run.found else []
    for gap in gaps:
        typer.echo(gap)
    if run.found or run.unsaved or gaps:
        raise typer.Exit(1)
    raise typer.Exit(stopped if interrupted else 2 if lost else 0 if run.judged else 1)


def _state(save: Path, resume: bool) -> RunState | None:
    """The state to go on from. Raises ScenarioError if there is none, or one that the run would overwrite."""
    file = save / FILE
    if resume:
        return read_state(file)
    if file.exists():
        raise ScenarioError(f"{file}: of an earlier run: go on with it by --resume, or choose another --save")
    check_folder(save, "--save")
    return None


def _shared(address: str | None) -> tuple[list[Scenario], Callable[[Scenario], None]]:
    """The cases of a corpus, and what adds one. Raises BackendError if it cannot be used."""
    if address is None:
        return [], lambda scenario: None
    corpus = SharedCorpus(address)
    known, unusable = corpus.cases()
    for line in unusable:
        typer.echo(line, err=True)

    def share(scenario: Scenario) -> None:
        try:
            corpus.add(scenario)
        except BackendError as error:  # the case is saved here as well
            typer.echo(f"warning: {error}", err=True)

    return known, share


def _reporter(run: Exploring, show: Callable[[int, str], None]) -> Callable[[], None]:
    """Shows progress: a bar on a terminal, else a line from time to time."""
    begun = time.monotonic()
    next_line = begun + SECONDS_BETWEEN_LINES

    def report() -> None:
        nonlocal next_line
        show(run.judged, _shrinking(run))
        if time.monotonic() > next_line:
            next_line += SECONDS_BETWEEN_LINES
            workers, seconds = counted(run.pool.size(), "worker"), duration(time.monotonic() - begun)
            typer.echo(
                f"explore: {', '.join(filter(None, (_line(run), _shrinking(run), workers)))} after {seconds}", err=True
            )

    return report


def _line(run: Exploring) -> str:
    findings = counted(len(run.found), "finding") if run.found else "no finding"
    return f"{run.judged:,} of {counted(run.expected, 'case')}, {counted(run.replays, 'replay')}, {findings}"


def _shrinking(run: Exploring) -> str:
    """How much workers are making smaller, in words; "" if nothing is. How small it is they tell at their end."""
    return f"shrinking {counted(run.shrinking, 'case')}" if run.shrinking else ""


def _report(run: Exploring, task: ClusterTask) -> None:
    for found in run.found:
        typer.echo(_told(found, task))
        typer.echo(f"{counted(found.count, 'case')} failed like this\n")
    if run.verdict.cases and not run.found and run.judged == run.expected:
        typer.echo(how_exact(run.verdict))


def _told(found: ClusterFinding, task: ClusterTask) -> str:
    spec = task.spec
    limit = None if spec.case_timeout == CASE_SECONDS else spec.case_timeout
    command = replay_command((found.saved,), spec.backend, task.device, spec.layer, timeout=limit)
    if found.failure is not None:
        remark = "DEPENDS ON ITS PROCESS: it passes in a fresh one.\n" if found.depends else ""
        return remark + explain(found.failure, found.saved, command)
    if found.scenario is not None:
        return explain_death(found.died, found.scenario, found.saved, command)
    return f"ORACLE FAILURE  {found.sentence}\n\nsaved:  {found.saved}\nreplay: {command}"
