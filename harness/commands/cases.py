"""Commands on saved cases and on layers: replay, show, tiers, survey, sanitize."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from nsa_oracle.harness.checks.tally import LayerTally
from nsa_oracle.harness.commands.app import (
    LAYER_HELP,
    SPEC,
    BackendOption,
    Device,
    DeviceOption,
    Files,
    LayerOption,
    app,
    torch_device,
    unusable,
)
from nsa_oracle.harness.commands.sanitizer import CASES, Tool, obstacle
from nsa_oracle.harness.commands.sanitizer import sanitize as run_sanitizer
from nsa_oracle.harness.commands.terminal import ended_by_a_signal, progress_of
from nsa_oracle.harness.commands.tiers import run_tiers, tiers_table
from nsa_oracle.harness.errors import BackendError, ScenarioError, one_line
from nsa_oracle.harness.judge import OracleFailure, judge_subject
from nsa_oracle.harness.report.failure import explain, replay_command
from nsa_oracle.harness.report.records import methods_not_judged
from nsa_oracle.harness.report.summary import how_exact, methods_judged
from nsa_oracle.harness.report.text import not_judged, render
from nsa_oracle.harness.scenarios.files import load
from nsa_oracle.harness.scenarios.story import story
from nsa_oracle.harness.search.survey import Survey, survey_table
from nsa_oracle.harness.signals import INTERRUPTED
from nsa_oracle.harness.subjects.subject import Subject

MAX_NOTE = 1000  # characters of a file's note that are printed


@app.command()
def replay(
    files: Files,
    device: DeviceOption = Device.AUTO,
    backend: BackendOption = None,
    layer: LayerOption = None,
    graphs: Annotated[bool, typer.Option(help="Replay captured graphs, or run each replay as an eager call.")] = True,
    timeout: Annotated[
        float | None, typer.Option(min=0, help="A case that runs longer in judged code has failed.", metavar="SECONDS")
    ] = None,
) -> None:
    """Judge saved cases and explain those that fail.

    Prints one line for each case that passes and a full report for each that fails.
    """
    where = torch_device(device)
    try:
        cases = [(file, load(file)) for file in files]
        subject = Subject.load(backend, layer, where, timeout or None)
        for file, scenario in cases:
            subject.check(scenario, file)
        if layer is not None and backend is None and all(scenario.setup.layer is None for _, scenario in cases):
            raise BackendError(f"layer '{layer}': no case here has a layer, so it would not be judged")
    except (ScenarioError, BackendError) as error:
        raise unusable(str(error)) from None
    failed = False
    layers = LayerTally()
    for file, scenario in cases:
        try:
            verdict = judge_subject(subject, scenario, where, graphs=graphs)
            layers.add(verdict.layers)
        except OracleFailure as failure:
            command = replay_command(file, backend, where.type, layer, graphs, timeout)
            typer.echo(explain(failure, file, command))
            failed = True
        except (BackendError, ScenarioError) as error:
            raise unusable(str(error)) from None
        else:
            counts = f"{verdict.replays} replays, {verdict.eager_calls} eager calls on {where.type}"
            typer.echo(f"{file}: {how_exact(verdict).removeprefix('all ')} ({counts})")
    if layers.calls and not failed:
        _print_methods(layers)
    raise typer.Exit(1 if failed or layers.never_called else 0)


def _print_methods(layers: LayerTally) -> None:
    typer.echo(methods_judged(layers))
    if layers.never_called:
        typer.echo(methods_not_judged(layers.never_called))


@app.command()
def tiers(
    file: Annotated[Path, typer.Argument(help="A saved case (JSON).", show_default=False)],
    backend: BackendOption = None,
    layer: LayerOption = None,
) -> None:
    """Judge one case on every tier and name the first that fails.

    Tiers go from the reference on the CPU to the captured graph on the GPU. The first tier that fails shows where the
    cause is: in the case itself, the logic, the compilation or the capture.
    """
    try:
        load(file)
        outcomes = list(run_tiers(file, backend, layer))
    except (ScenarioError, BackendError) as error:
        raise unusable(str(error)) from None
    typer.echo(render(tiers_table(outcomes)))
    failed = next((outcome for outcome in outcomes if outcome.passed is False), None)
    if failed is not None:
        typer.echo(f"first to fail: {failed.tier.value}, so look at the {failed.tier.blames}\n  {failed.message}")
        raise typer.Exit(1)


@app.command()
def survey(
    layer: Annotated[str, typer.Option(metavar=SPEC, help=f"Layer to survey: {LAYER_HELP}")],
    cases: Annotated[int, typer.Option(min=1, help="Number of cases to draw.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawn cases.")] = 0,
    device: DeviceOption = Device.AUTO,
    budget: Annotated[float | None, typer.Option(min=0, help="Time limit of the survey.", metavar="SECONDS")] = None,
) -> None:
    """Count how often each property of a layer is checked and broken.

    Unlike replay, a survey does not stop at the first failure. If interrupted or out of time, it prints the results so
    far; it exits with 130 if interrupted before any property was broken.
    """
    where = torch_device(device)
    deadline = None if budget is None else time.monotonic() + budget
    interrupted = False
    try:
        subject = Subject.load(None, layer, where)
        found = Survey(subject, where)
        try:
            with ended_by_a_signal(), progress_of("surveying", cases) as show_progress:
                found.run(cases, seed, deadline, show_progress)
        except KeyboardInterrupt:
            interrupted = True
    except (BackendError, ScenarioError, ValueError) as error:
        raise unusable(str(error)) from None
    typer.echo(render(survey_table(found.records)))
    if found.layers.calls:
        _print_methods(found.layers)
    if found.left_out:
        typer.echo(not_judged(found.left_out))
    if found.cases < cases:
        typer.echo(f"{'interrupted' if interrupted else 'out of time'}: {found.cases} of {cases} cases")
    if interrupted and found.holds:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(0 if found.holds and not found.layers.never_called else 1)


@app.command()
def sanitize(
    files: Annotated[list[Path] | None, typer.Argument(help="Saved cases (JSON); by default a few small ones.")] = None,
    tool: Annotated[list[Tool] | None, typer.Option(help="Run only this tool; may be given several times.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Time limit of each tool, in seconds.")] = 600,
) -> None:
    """Judge saved cases under NVIDIA's compute-sanitizer.

    Needs a GPU and the CUDA toolkit. Prints one line for each tool.
    """
    if (reason := obstacle()) is not None:
        raise unusable(f"sanitize: {reason}")
    cases = files or list(CASES)
    try:
        for file in cases:
            load(file)
    except ScenarioError as error:
        raise unusable(str(error)) from None
    outcomes = []
    for outcome in run_sanitizer(cases, tool or list(Tool), timeout):
        typer.echo(outcome.line())
        outcomes.append(outcome)
    if any(outcome.clean is False for outcome in outcomes):
        raise typer.Exit(1)
    raise typer.Exit(2 if any(outcome.clean is None for outcome in outcomes) else 0)


@app.command()
def show(files: Files) -> None:
    """Describe saved cases in words."""
    try:
        stories = [(scenario.note, story(scenario)) for scenario in map(load, files)]
    except ScenarioError as error:
        raise unusable(str(error)) from None
    for note, text in stories:
        typer.echo(f"{one_line(note, MAX_NOTE)}\n{text}" if note else text)
