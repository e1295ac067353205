"""Commands on saved cases beside those that judge cases: sanitize, show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nsa_oracle.harness.commands.app import Files, app, unusable
from nsa_oracle.harness.commands.sanitizer import CASES, Tool, obstacle
from nsa_oracle.harness.commands.sanitizer import sanitize as run_sanitizer
from nsa_oracle.harness.errors import ScenarioError, one_line
from nsa_oracle.harness.scenarios.files import load
from nsa_oracle.harness.scenarios.story import story
from nsa_oracle.harness.subjects.default import check_optimizations

MAX_NOTE = 1000  # characters of a file's note that are printed


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
