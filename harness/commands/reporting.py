"""Commands on reports of runs: report, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nsa_oracle.harness.commands.app import app, unusable
from nsa_oracle.harness.errors import ScenarioError, counted, one_line
from nsa_oracle.harness.report.document import (
    RunVerdict,
    report_as_json,
    report_from_json,
    report_schema,
    written_text,
)
from nsa_oracle.harness.report.merging import merged
from nsa_oracle.harness.scenarios.files import MAX_PATH, replace_file


@app.command("report")
def show_report(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a run's report.")] = False,
) -> None:
    """Print the schema of reports."""
    if schema:
        typer.echo(report_schema(), nl=False)


@app.command("merge")
def merge_reports(
    files: Annotated[list[Path], typer.Argument(help="Reports of runs (JSON).", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The merged report.", metavar="FILE")],
) -> None:
    """Merge the reports of the shards of a run into one, as if one run had judged all of them.

    Exits with 1 if something failed or was not judged: a shard that is missing, or what none of them judged.
    """
    try:
        whole = merged([report_from_json(written_text(file), one_line(str(file), MAX_PATH)) for file in files])
    except ScenarioError as error:
        raise unusable(str(error)) from None
    write_file("--output", output, report_as_json(whole))
    totals = whole.totals
    covered = f"{counted(totals.cases, 'case')} passed, {counted(totals.replays, 'replay')}"
    for subject in whole.subjects:
        for found in subject.found:
            alike = f" ({1 + len(found.equal)} cases)" if found.equal else ""
            typer.echo(f"FAILED{alike}: {found.sentence}\n  {found.replay}")
    for gap in whole.gaps:
        typer.echo(gap)
    typer.echo(f"oracle: {counted(len(files), 'report')} merged: {covered}, {whole.verdict.value}")
    raise typer.Exit(0 if whole.verdict is RunVerdict.PASSED else 1)


def write_file(option: str, file: Path, text: str) -> None:
    """Write the file that an option names, as a whole. Raises typer.Exit(2) if that is not possible."""
    try:
        if file.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        replace_file(file, text)
    except OSError as error:
        said = f"{option} {one_line(str(file), MAX_PATH)}: cannot be written: {error.strerror or error}"
        raise unusable(f"{said}; name a file in a folder that can") from None
