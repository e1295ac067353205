"""The survey command, for a layer or a backend (see ``surveying``), and what it saves and writes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nsa_oracle.harness.commands.app import (
    LAYER_HELP,
    SPEC,
    Device,
    DeviceOption,
    TimeoutOption,
    app,
    check_written,
    unusable,
)
from nsa_oracle.harness.commands.surveying import (
    SurveyedBackend,
    SurveyedLayer,
    backend_report,
    layer_report,
    surveyed_backend,
    surveyed_layer,
)
from nsa_oracle.harness.commands.terminal import progress_of
from nsa_oracle.harness.errors import BackendError, ScenarioError, counted
from nsa_oracle.harness.report.failure import replay_command
from nsa_oracle.harness.report.text import not_judged
from nsa_oracle.harness.scenarios.files import check_folder, load, replace_file, shipped_cases
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.search.backend_survey import BackendFound, rows_as_json
from nsa_oracle.harness.search.survey import SurveyFound
from nsa_oracle.harness.signals import Termination
from nsa_oracle.starting import CASE_SECONDS, MESSAGE


@app.command()
def survey(
    layer: Annotated[
        str | None, typer.Option(metavar=SPEC, help=f"Layer to survey: {LAYER_HELP}", show_default=False)
    ] = None,
    backend: Annotated[
        str | None, typer.Option(metavar=SPEC, help="Backend to survey instead of a layer.", show_default=False)
    ] = None,
    cases: Annotated[int, typer.Option(min=0, help="Number of cases to draw; 0: saved ones alone.")] = 100,
    case: Annotated[
        list[Path] | None,
        typer.Option(
            help="Survey a backend on this saved case first, instead of on those of the package; may be repeated.",
            show_default=False,
        ),
    ] = None,
    saved: Annotated[bool, typer.Option(help="Survey a backend on the saved cases of the package first.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawn cases.")] = 0,
    device: DeviceOption = Device.AUTO,
    budget: Annotated[float | None, typer.Option(min=0, help="Time limit of the survey.", metavar="SECONDS")] = None,
    timeout: TimeoutOption = CASE_SECONDS,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows to this file, too.", metavar="FILE")
    ] = None,
    save: Annotated[Path, typer.Option(help="Folder for a case of each broken row.")] = Path("failures"),
) -> None:
    """Count how often each property of a backend or a layer is checked and broken.

    Unlike replay, a survey does not stop at the first failure. If interrupted or out of time, it prints the results so
    far; if nothing was broken by then, it exits with 130 after Ctrl-C and with 143 after SIGTERM.
    """
    if (layer is None) == (backend is None):
        raise unusable("survey: name one of --layer and --backend")
    if case and backend is None:
        raise unusable("survey: --case is for a backend; replay a case of a layer")
    if not cases and not case and (backend is None or not saved):
        none = "--cases 0 surveys nothing but saved cases of a backend, and there are none"
        raise unusable(f"survey: {none}; give a number")
    try:
        check_folder(save, "--save")
    except ScenarioError as error:
        raise unusable(str(error)) from None
    check_written("--json", json_file)
    deadline = None if budget is None else time.monotonic() + budget
    limit = timeout or None
    done: SurveyedLayer | SurveyedBackend
    termination = Termination()
    try:
        with progress_of("surveying", cases) as show_progress:
            if layer is not None:
                done = surveyed_layer(layer, device, cases, seed, deadline, show_progress, limit)
            else:
                assert backend is not None
                known = [(file, _without_layer(file)) for file in case or ()] or (shipped_cases() if saved else [])
                done = surveyed_backend(
                    backend, device, cases, seed, deadline, show_progress, known, skip_unfit=not case, timeout=limit
                )
        found, left_out, interrupted = done.found, done.left_out, done.interrupted

        def command(file: Path) -> str:
            kept = limit if any(row.has_hung for row in done.found.rows.values()) else None
            return replay_command((file,), backend, done.device, layer, timeout=kept)

        if isinstance(found, SurveyFound):
            gaps = layer_report(found, save, command)
        else:
            gaps = backend_report(found, save, command)
        if json_file is not None:
            _write(json_file, found, left_out)
    except KeyboardInterrupt:
        typer.echo(MESSAGE, err=True, nl=False)
        raise typer.Exit(termination.exit_code) from None
    except (BackendError, ScenarioError, ValueError) as error:
        raise unusable(str(error)) from None
    for gap in gaps:
        typer.echo(gap)
    if left_out:
        typer.echo(not_judged(left_out))
    if found.cases < cases:
        typer.echo(f"{'interrupted' if interrupted else 'out of time'}: {found.cases} of {counted(cases, 'case')}")
    if interrupted and found.holds:
        raise typer.Exit(termination.exit_code)
    unjudged = isinstance(found, SurveyFound) and found.layers.never_called
    raise typer.Exit(0 if found.holds and not gaps and not unjudged else 1)


def _write(file: Path, found: SurveyFound | BackendFound, left_out: Sequence[str]) -> None:
    rows: list[dict[str, Any]]
    if isinstance(found, BackendFound):
        rows = rows_as_json(found.rows)
    else:
        rows = [
            {
                "property": name,
                "checked": row.checked,
                "broken": row.broken,
                "finding": row.finding,
                "case": None if row.saved is None else str(row.saved),
                "replay": row.replay,
            }
            for name, row in sorted(found.rows.items())
        ]
    written = {"cases": found.cases, "rows": rows, "not judged": list(left_out), "reached": found.reach.as_json()}
    text = json.dumps(written, indent=1)
    try:
        replace_file(file, text + "\n")
    except OSError as error:
        raise ScenarioError(f"{file}: cannot be written: {error.strerror or error}; choose another --json") from None


def _without_layer(file: Path) -> Scenario:
    """The case of a file. Raises ScenarioError if it cannot be read, or has a layer."""
    case = load(file)
    if case.setup.layer is not None:
        raise ScenarioError(f"{file}: it has a layer, and a survey of a backend is without one; replay it")
    return case
