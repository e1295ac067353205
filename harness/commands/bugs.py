"""The command ``bugs``: plants every bug of the zoo and prints which check kills it."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, closing
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nsa_oracle.harness.bugs import report
from nsa_oracle.harness.bugs.hunt import hunt_all, hunt_on
from nsa_oracle.harness.bugs.kill import Kill
from nsa_oracle.harness.bugs.zoo import ZOO
from nsa_oracle.harness.cluster.pool import PoolLost, connected
from nsa_oracle.harness.commands.app import Device, DeviceOption, app, check_written, torch_device, unusable, write_file
from nsa_oracle.harness.commands.terminal import ended_by_a_signal, progress_of
from nsa_oracle.harness.errors import BackendError, counted
from nsa_oracle.harness.report import text
from nsa_oracle.harness.search.drawing import PROFILES
from nsa_oracle.harness.signals import INTERRUPTED


class HuntProfile(Enum):
    """How many cases are tried on a bug before it counts as a survivor: as many as a run of that profile judges."""

    SMOKE = "smoke"
    DEV = "dev"
    PR = "pr"
    NIGHTLY = "nightly"


PROFILE_HELP = "Most cases tried on a bug, those of a run of the oracle: " + ", ".join(
    f"{name} {profile.cases:,} (with a layer {profile.layer_cases:,})" for name, profile in PROFILES.items()
)


@app.command()
def bugs(
    listed: Annotated[bool, typer.Option("--list", help="List the bugs with descriptions, and hunt none.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Hunt only this bug; may be given several times.")] = None,
    profile: Annotated[HuntProfile, typer.Option(help=PROFILE_HELP)] = HuntProfile.PR,
    device: DeviceOption = Device.AUTO,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawn cases.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Bugs hunted in parallel, in processes spread over all GPUs.")] = 2,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS|local", help="Hunt on the workers of a Dask scheduler.", show_default=False),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the kills to this JSON file.")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Also write the kill matrix to this HTML file.")
    ] = None,
) -> None:
    """Plant every bug of the zoo and print which check kills it.

    Each bug is planted by itself, in optimized/; the table of bugs and checks is the kill matrix. If interrupted, the
    command prints the results so far, and exits with 130 if all bugs hunted so far were killed by a check that is meant
    to find them.
    """
    where = torch_device(device)
    unknown = [name for name in only or () if name not in ZOO]
    if unknown:
        raise unusable(f"--only {unknown[0]}: no such bug; --list names them all")
    for option, file in (("--json", json_file), ("--html", html_file)):
        check_written(option, file)
    chosen = [bug for bug in ZOO.values() if not only or bug.name in only]
    if listed:
        typer.echo(text.render(report.listing(chosen)))
        return
    hunted = [bug for bug in chosen if bug.shows_on(where.type)]
    if not hunted:
        lacking = "no GPU" if where.type == "cuda" else "a GPU"
        raise unusable(f"nothing was hunted: {', '.join(bug.name for bug in chosen)}: to be seen it needs {lacking}")
    found: dict[str, Kill] = {}
    interrupted = False
    try:
        with (
            tempfile.TemporaryDirectory() as scratch,
            ended_by_a_signal(),
            progress_of("hunting", len(hunted)) as show_progress,
            ExitStack() as stack,
        ):
            if scheduler is None:
                hunt = hunt_all(hunted, where, PROFILES[profile.value], seed, Path(scratch), jobs)
            else:
                pool, _ = stack.enter_context(connected(scheduler, jobs, where.type == "cuda"))
                hunt = hunt_on(pool, hunted, where.type, PROFILES[profile.value], seed)
            stack.enter_context(closing(hunt))
            for kill in hunt:
                found[kill.bug] = kill
                show_progress(len(found), "")
    except KeyboardInterrupt:
        interrupted = True
    except BackendError as error:
        raise unusable(str(error)) from None
    except PoolLost as error:
        typer.echo(f"error: {error}", err=True)
        interrupted = True
    kills = [found[bug.name] for bug in hunted if bug.name in found]
    typer.echo(text.render(report.kills_table(kills), text.UNBROKEN))
    typer.echo(report.sum_line(kills, len(chosen) - len(hunted)))
    if interrupted:
        typer.echo(f"interrupted: {len(kills)} of {counted(len(hunted), 'bug')}")
    if json_file is not None:
        write_file("--json", json_file, report.as_json(kills))
    if html_file is not None:
        write_file("--html", html_file, report.as_html(kills))
    as_meant = all(kill.meant for kill in kills)
    raise typer.Exit(1 if not as_meant else INTERRUPTED if interrupted else 0)
