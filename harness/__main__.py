"""``python -m harness``: replay saved cases and tell what they are. Exit 0 passes, 1 fails, 2 unusable."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from harness import interpreter, report
from harness.judge import OracleFailure, judge
from harness.protocol import BackendError, BackendFactory, load_backend, optimized_backend, try_out
from harness.scenario import Scenario, ScenarioError, load

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


class Device(Enum):
    """Where the backend runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


Files = Annotated[list[Path], typer.Argument(help="Saved cases (JSON).", show_default=False)]


@app.command()
def replay(
    files: Files,
    device: Annotated[Device, typer.Option(help="cuda: real CUDA graphs; cpu: interpreter, simulated.")] = Device.AUTO,
    backend: Annotated[str | None, typer.Option(help="module:attribute to judge instead of optimized/.")] = None,
) -> None:
    """Judge saved cases, one line each, and explain those that fail."""
    where = _torch_device(device)
    try:
        cases = [(file, load(file)) for file in files]
        factory = optimized_backend if backend is None else load_backend(backend)
        try_out(factory, where)
    except (ScenarioError, BackendError) as error:
        raise _unusable(str(error)) from None
    failed = False
    for file, scenario in cases:
        failed |= not _replay(file, scenario, where, factory, backend)
    raise typer.Exit(1 if failed else 0)


@app.command()
def show(files: Files) -> None:
    """Tell saved cases in plain words."""
    try:
        told = [(scenario.note, report.tell(scenario)) for scenario in map(load, files)]
    except ScenarioError as error:
        raise _unusable(str(error)) from None
    for note, text in told:
        typer.echo(f"{note}\n{text}" if note else text)


def _replay(file: Path, scenario: Scenario, device: torch.device, factory: BackendFactory, backend: str | None) -> bool:
    """Judge one case and print what came of it; whether it passed."""
    try:
        verdict = judge(scenario, factory, device)
    except OracleFailure as failure:
        typer.echo(report.explain(failure, file, report.replay_command(file, backend, device.type)))
        return False
    except BackendError as error:
        raise _unusable(str(error)) from None
    typer.echo(f"{file}: bit-exact ({verdict.replays} replays, {verdict.eager_calls} eager calls on {device.type})")
    return True


def _torch_device(wanted: Device) -> torch.device:
    """The device to use; fixes how kernels run, so it must come before anything imports Triton."""
    if wanted is Device.CUDA and not torch.cuda.is_available():
        raise _unusable("--device cuda: torch sees no CUDA device here; use cpu or auto")
    device = torch.device("cuda" if wanted is not Device.CPU and torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        interpreter.speed_up()
        torch.set_num_threads(1)  # tensors are tiny
    return device


def _unusable(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(2)


if __name__ == "__main__":
    app()
