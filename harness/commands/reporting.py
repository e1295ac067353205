"""Commands on reports of runs: report, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nsa_oracle.harness.commands.app import app, unusable, write_file
from nsa_oracle.harness.errors import ScenarioError, counted, one_line
from nsa_oracle.harness.report.document import (
    RunVerdict,
    report_as_json,
    report_from_json,
    report_schema,
    written_text,
)
from nsa_oracle.harness.report.markdown import told_in_a_workflow
from nsa_oracle.harness.report.merging import merged
from nsa_oracle.harness.report.page import PageContent, page
from nsa_oracle.harness.scenarios.files import MAX_PATH


@app.command("report")
def write_page(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="JSON of runs (--oracle-json), and of bugs, survey and pytest-benchmark.", show_default=False
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="The page to write.", metavar="FILE")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of a run's report, and nothing else.")
    ] = False,
) -> None:
    """Make a page to look at of what other commands wrote as JSON.

    The page is one HTML file that loads nothing. Exits with 0 if it was written, whatever it shows.
    """
    if schema:
        typer.echo(report_schema(), nl=False)
        return
    if not files or html is None:
        raise unusable("report: name at least one JSON file, and the page with --html")
    content = PageContent()
    try:
        for file in files:
            content = content.and_file(written_text(file), one_line(str(file), MAX_PATH))
    except ScenarioError as error:
        raise unusable(str(error)) from None
    text = page(content)
    write_file("--html", html, text)
    typer.echo(f"{one_line(str(html), MAX_PATH)}: {counted(len(files), 'report')}, {len(text.encode()):,} bytes")


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
    for line in [*whole.gaps, *told_in_a_workflow(whole)]:
        typer.echo(line)
    typer.echo(f"oracle: {counted(len(files), 'report')} merged: {covered}, {whole.verdict.value}")
    raise typer.Exit(0 if whole.verdict is RunVerdict.PASSED else 1)
