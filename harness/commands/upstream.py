"""The upstream command: surveys a published version of an engine and compares with the verdict on record."""

from __future__ import annotations

import enum
import importlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from nsa_oracle.harness.commands.app import Device, app, unusable
from nsa_oracle.harness.commands.surveying import SurveyedBackend, backend_report, surveyed_backend
from nsa_oracle.harness.commands.terminal import progress_of
from nsa_oracle.harness.errors import BackendError, ScenarioError, counted
from nsa_oracle.harness.report.failure import replay_command
from nsa_oracle.harness.scenarios.files import check_folder, load
from nsa_oracle.harness.search.backend_survey import BUILDS, BackendFound, Property
from nsa_oracle.harness.search.upstream import (
    VersionRecord,
    changes,
    load_record,
    record_file,
    record_of,
    save_record,
)
from nsa_oracle.harness.signals import INTERRUPTED
from nsa_oracle.harness.subjects.adapters import wheels
from nsa_oracle.harness.subjects.adapters.packages import REFUSED, Package

ADAPTERS = "nsa_oracle.harness.subjects.adapters"


class PublishedEngine(enum.Enum):
    """The engines that have adapters, by the names of their packages and of the adapters' modules."""

    SGLANG = "sglang"
    VLLM = "vllm"

    @property
    def package(self) -> Package:
        """The package. Like any adapter it is imported only if it is asked for."""
        found: Package = importlib.import_module(f"{ADAPTERS}.{self.value}").PUBLISHED
        return found


@app.command()
def upstream(
    engine: Annotated[PublishedEngine, typer.Option(help="Whose backend.")] = PublishedEngine.SGLANG,
    version: Annotated[
        str | None, typer.Option(help="Version of it, as 0.5.23; the newest by default.", show_default=False)
    ] = None,
    cases: Annotated[int, typer.Option(min=1, help="Number of cases to draw.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawn cases.")] = 0,
    record: Annotated[bool, typer.Option("--record", help="Record the verdict and a case of each broken row.")] = False,
    records: Annotated[Path, typer.Option(help="Folder of the recorded verdicts.")] = Path("docs/upstream"),
    cache: Annotated[Path, typer.Option(help="Folder for wheels and what is unpacked of them.")] = Path(".upstream"),
    save: Annotated[Path, typer.Option(help="Folder for a case of each broken row.")] = Path("failures"),
) -> None:
    """Survey the backend of SGLang or vLLM, from the package index, and compare with the verdict on record.

    The wheel is fetched and not installed; kernels run as in any run without a GPU. Exits with 1 if something broke
    that is not on record, and with 2 if the version has a layout that no adapter knows.
    """
    name, package = engine.value, engine.package
    try:
        check_folder(save, "--save")
        wheel, found_version = wheels.fetched(name, version, cache)
        near = package.nearest_to(found_version)
        if near is None:
            raise BackendError(f"{name} {found_version} is near no known version; known are {package.known}")
        old_file = record_file(records, name, found_version)
        old = load_record(old_file)
        if old is None:
            old_file = record_file(records, name, near)
            old = load_record(old_file)
        folder = cache / (found_version if engine is PublishedEngine.SGLANG else f"{name}-{found_version}")
        try:
            wheels.unpacked(wheel, package.adapters[near].layout.files, folder)
            os.environ[package.folder] = str(folder)
            backend = f"{ADAPTERS}.{name}:{'installed' if near == found_version else 'nearest'}"
            with progress_of("surveying", cases) as show_progress:
                files = [records / row.case for row in (old.rows if old else ()) if row.case]
                known = [(file, load(file)) for file in files if file.is_file()]
                done = surveyed_backend(backend, Device.CPU, cases, seed, None, show_progress, known, skip_unfit=True)
            _check_layout(done.found)
        except BackendError as error:
            raise BackendError(
                f"{name} {found_version} has a layout that the adapter of {near} does not know: {error}; "
                f"known versions are {package.known}"
            ) from None
        if done.interrupted:
            typer.echo(f"interrupted: {done.found.cases} of {counted(cases, 'case')}; nothing is compared")
            raise typer.Exit(INTERRUPTED)
        if near != found_version:
            typer.echo(f"{name} {found_version} has no adapter; tried with that of {near}, the nearest known version")
        gaps = backend_report(
            done.found,
            save,
            lambda file: f"{package.folder}={folder} {replay_command((file,), backend, done.device)}",
        )
        new = record_of(done.found, name, found_version, near, cases, seed)
        for gap in gaps:
            typer.echo(gap)
        has_broken = _compare(old, old_file, new, done)
        if record:
            typer.echo(f"recorded: {save_record(new, done.found, records)}")
    except (BackendError, ScenarioError, ValueError) as error:
        raise unusable(str(error)) from None
    raise typer.Exit(1 if has_broken and not record else 0)


def _check_layout(found: BackendFound) -> None:
    """Raises BackendError if what was judged was not the engine's backend as it is built on a server."""
    built = found.rows.get(Property("-", "-", BUILDS))
    if built is not None and built.broken:
        raise BackendError(built.finding)
    for name in found.declared.stand_ins:
        if name.endswith(REFUSED):
            raise BackendError(name)


def _compare(old: VersionRecord | None, file: Path, new: VersionRecord, done: SurveyedBackend) -> bool:
    """Print what changed. Returns whether anything broke that is not on record."""
    found = changes(old, new)
    if old is None:
        typer.echo("no verdict is on record: every break is new (--record records this one)")
    else:
        typer.echo(f"compared with the verdict on {old.version}, {file}:")
    for key in found.new_breaks:
        row = done.found.rows[key]
        typer.echo(f"NEW BREAK: {_names([key])}: {row.finding}\n  replay: {row.replay}")
    for what, keys in (
        ("mended", found.mended),
        ("no longer checked", found.no_longer_checked),
        ("checked for the first time", found.newly_checked),
    ):
        if keys:
            typer.echo(f"{what}: {_names(keys)}")
    if found.new_breaks:
        return True
    on_record = f"; {len(new.broken)} on record are" if new.broken else ""
    typer.echo(f"nothing new is broken of {len(new.checked)} properties{on_record}")
    return False


def _names(keys: Iterable[Property]) -> str:
    return ", ".join(" ".join(word for word in key if word != "-") for key in keys)
