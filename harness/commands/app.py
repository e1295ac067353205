"""The command line application, and what its commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from nsa_oracle.harness import processes

app = typer.Typer(
    help="Replay saved cases, survey layers, and measure the oracle itself. Exit 0 passes, 1 fails, 2 unusable.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Device(Enum):
    """Where the backend runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


Files = Annotated[list[Path], typer.Argument(help="Saved cases (JSON).", show_default=False)]


def torch_device(wanted: Device) -> torch.device:
    """The device to use; fixes how kernels run, so it must come before anything imports Triton."""
    if wanted is Device.CUDA and not torch.cuda.is_available():
        raise unusable("--device cuda: torch sees no CUDA device here; use cpu or auto")
    device = torch.device("cuda" if wanted is not Device.CPU and torch.cuda.is_available() else "cpu")
    processes.prepare_process(device.type)
    return device


def unusable(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(2)
