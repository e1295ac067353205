"""The import command: saved cases of what a server gave to its backend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nsa_oracle.harness.commands.app import app, unusable
from nsa_oracle.harness.errors import ScenarioError, counted, meant, one_line
from nsa_oracle.harness.scenarios.files import MAX_FILE_BYTES, save, to_json
from nsa_oracle.harness.scenarios.recorded import read_record
from nsa_oracle.harness.scenarios.setup import Setup
from nsa_oracle.harness.scenarios.translation import Import, imported

MOST_NOTES = 20


@app.command("import")
def import_(
    record: Annotated[
        Path, typer.Argument(help="What nsa_oracle.harness.record has written.", metavar="RECORD", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the cases.", metavar="DIR")] = Path(
        "imported"
    ),
    last: Annotated[int | None, typer.Option(min=1, help="Import only the last calls.", metavar="N")] = None,
    per_case: Annotated[int, typer.Option(min=1, max=4096, help="Most calls of one case.", metavar="N")] = 200,
    size: Annotated[
        list[str] | None,
        typer.Option(help="A size that the record does not say, or says wrongly.", metavar="NAME=VALUE"),
    ] = None,
    compact: Annotated[
        bool,
        typer.Option(
            "--compact", help="Renumber pool rows, narrow the tables, and leave out graphs that no call replays."
        ),
    ] = False,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out calls that no case can have.")] = False,
) -> None:
    """Make saved cases of the record of a server.

    Each case makes the same calls with the same numbers, from the first recorded call on.
    """
    try:
        sizes = dict(_size(text) for text in size or ())
        cases, notes = imported(read_record(record), Import(sizes, last, per_case, compact, skip))
        for case in cases:
            if len(to_json(case).encode()) > MAX_FILE_BYTES:
                raise ScenarioError(f"{case.note}: more than {MAX_FILE_BYTES:,} bytes; choose a smaller --per-case")
        first = 0
        for case in cases:
            file = output / f"{record.name.partition('.')[0] or 'record'}.{first:06}-{first + case.calls - 1:06}.json"
            first += case.calls
            save(case, file)
            typer.echo(f"{file}: {counted(case.calls, 'call')}, {counted(len(case.events), 'event')}")
    except ScenarioError as error:
        raise unusable(str(error)) from None
    except OSError as error:
        reason = f"{one_line(str(output))}: cannot be written: {error.strerror or error}; choose another --output"
        raise unusable(reason) from None
    for note in notes[:MOST_NOTES]:
        typer.echo(note)
    if len(notes) > MOST_NOTES:
        typer.echo(f"and {len(notes) - MOST_NOTES:,} more")


def _size(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    known = [field for field in Setup.model_fields if field not in ("inputs", "layer")]
    if equals and name in known:
        return name, value
    near = meant(name, known)
    mend = f"did you mean {near}=...?" if near else f"give NAME=VALUE, with a name of {', '.join(known)}"
    raise ScenarioError(f"--size {one_line(text, 60)}: {mend}")
