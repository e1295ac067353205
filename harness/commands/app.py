"""The command-line application, and what its commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from nsa_oracle.harness import processes
from nsa_oracle.harness.errors import BackendError, ScenarioError, one_line
from nsa_oracle.harness.scenarios.files import MAX_PATH, check_file, replace_file
from nsa_oracle.starting import LIMITS, LONGEST_LIMIT, SHORTEST_LIMIT

_Misused: Any = typer.BadParameter.__base__  # of Click, which newer versions of Typer have within them


class Commands(TyperGroup):
    """The commands, whose misuse is told in one line.

    None takes an empty word, which is what an unset variable of a CI job leaves of a name.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of the command line. Raises typer.Exit(2) for an empty one."""
        for before, word in pairwise(["nsa-oracle", *args]):
            option, sign, value = word.partition("=")
            if not word.strip():
                raise unusable(f"the word behind {one_line(before)} is empty; give a name, or leave it out")
            if sign and option.startswith("--") and not value.strip():
                raise unusable(f"{one_line(option)}: the name is empty; give one, or leave the option out")
        if not args:
            return super().parse_args(ctx, args)  # which shows the help
        with _told_in_one_line(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command. Raises typer.Exit(2) if its words are not its own."""
        with _told_in_one_line(ctx):
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    help="Judge saved cases, survey layers, and measure how good the oracle is.\n\nExit codes: 0 everything passed, "
    "1 something failed, 2 a file, backend, layer, option or tool cannot be used, 130 interrupted before anything "
    "failed, 143 so by SIGTERM.",
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
DeviceOption = Annotated[
    Device,
    typer.Option(
        help="cuda: real CUDA graphs; cpu: kernels compiled for the CPU, a simulated graph; auto: cuda if it is there."
    ),
]
SPEC = "MODULE:ATTRIBUTE"
BackendOption = Annotated[
    str | None,
    typer.Option(metavar=SPEC, help="Backend to judge instead of optimized/: a callable of (config, req_to_token)."),
]
LAYER_HELP = "a callable of (config, attention) that returns an attention layer or single stages of one."
LayerOption = Annotated[
    str | None, typer.Option(metavar=SPEC, help=f"Layer to judge instead of that of optimized/: {LAYER_HELP}")
]


def _time_limit(seconds: float | None) -> float | None:
    """``seconds``. Raises BadParameter if they are neither 0 nor a limit that can be kept."""
    if seconds and not SHORTEST_LIMIT <= seconds <= LONGEST_LIMIT:
        raise typer.BadParameter(f"{seconds:g} is not in the range {LIMITS}.")
    return seconds


TimeoutOption = Annotated[
    float | None,
    typer.Option(
        callback=_time_limit, help="A case that runs longer in judged code has failed; 0: no limit.", metavar="SECONDS"
    ),
]


def torch_device(wanted: Device) -> torch.device:
    """The device to use. Fixes how kernels run in this process, so call it before anything imports Triton.

    Raises typer.Exit(2) if ``wanted`` is CUDA and there is no such device, or kernels cannot run as is wanted.
    """
    if wanted is Device.CUDA and not torch.cuda.is_available():
        raise unusable("--device cuda: torch sees no CUDA device here; use cpu or auto")
    device = torch.device("cuda" if wanted is not Device.CPU and torch.cuda.is_available() else "cpu")
    try:
        processes.prepare_process(device.type)
    except BackendError as error:
        raise unusable(str(error)) from None
    return device


@contextmanager
def _told_in_one_line(ctx: Any) -> Iterator[None]:
    try:
        yield
    except _Misused as error:
        command = (error.ctx or ctx).command_path
        raise unusable(f"{command}: {one_line(error.format_message().rstrip('.'))}; see {command} --help") from None


def unusable(message: str) -> typer.Exit:
    """Print ``message`` as an error. Returns the exit with code 2, for the caller to raise."""
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(2)


def check_written(option: str, file: Path | None) -> None:
    """Raises typer.Exit(2) if the file that an option names could not be written later. Its folder must exist."""
    if file is None:
        return
    if not file.absolute().parent.is_dir():
        said = f"{option} {one_line(str(file), MAX_PATH)}: cannot be written"
        raise unusable(f"{said}; name a file in a folder that exists")
    try:
        check_file(file, option)
    except ScenarioError as error:
        raise unusable(str(error)) from None


def write_file(option: str, file: Path, text: str) -> None:
    """Write the file that an option names, as a whole. Raises typer.Exit(2) if that is not possible."""
    try:
        replace_file(file, text)
    except OSError as error:
        said = f"{option} {one_line(str(file), MAX_PATH)}: cannot be written: {error.strerror or error}"
        raise unusable(f"{said}; name a file in a folder that can") from None
