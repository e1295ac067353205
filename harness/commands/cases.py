"""Commands on saved cases and on layers beside those that judge cases: survey, sanitize, show."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from nsa_oracle.harness.commands.app import (
    LAYER_HELP,
    SPEC,
    Device,
    DeviceOption,
    Files,
    app,
    unusable,
)
from nsa_oracle.harness.commands.sanitizer import CASES, Tool, obstacle
from nsa_oracle.harness.commands.sanitizer import sanitize as run_sanitizer
from nsa_oracle.harness.commands.surveying import surveyed
from nsa_oracle.harness.commands.terminal import progress_of
from nsa_oracle.harness.errors import BackendError, ScenarioError, counted, one_line
from nsa_oracle.harness.report.summary import methods_report
from nsa_oracle.harness.report.text import not_judged, render
from nsa_oracle.harness.scenarios.files import load
from nsa_oracle.harness.scenarios.story import story
from nsa_oracle.harness.search.survey import survey_table
from nsa_oracle.harness.signals import INTERRUPTED
from nsa_oracle.harness.subjects.default import check_optimizations

MAX_NOTE = 1000  # characters of a file's note that are printed


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
    deadline = None if budget is None else time.monotonic() + budget
    try:
        with progress_of("surveying", cases) as show_progress:
            found, left_out, interrupted = surveyed(layer, device, cases, seed, deadline, show_progress)
    except (BackendError, ScenarioError, ValueError) as error:
        raise unusable(str(error)) from None
    typer.echo(render(survey_table(found.records)))
    if found.layers.calls:
        typer.echo(methods_report(found.layers))
    if left_out:
        typer.echo(not_judged(left_out))
    if found.cases < cases:
        typer.echo(f"{'interrupted' if interrupted else 'out of time'}: {found.cases} of {counted(cases, 'case')}")
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
        shown = [(scenario, story(scenario)) for scenario in map(load, files)]
    except ScenarioError as error:
        raise unusable(str(error)) from None
    for scenario, text in shown:
        typer.echo(f"{one_line(scenario.note, MAX_NOTE)}\n{text}" if scenario.note else text)
        try:
            check_optimizations(scenario.optimizations, scenario.setup.backend_config())
        except ScenarioError as error:
            typer.echo(f"not a case for optimized/, only for a backend of your own: {one_line(str(error), 250)}")
