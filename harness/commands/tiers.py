"""Judges one case on every tier, from the reference to a captured graph. The first to fail shows where the cause is.

Each tier runs in a separate process, because importing Triton fixes how kernels run.
"""

from __future__ import annotations

import enum
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from nsa_oracle.harness.compiled.building import BuildError, build
from nsa_oracle.harness.compiled.launcher import COMPILED_TIER, INTERPRETED_TIER, LEFT_TO_THE_INTERPRETER, TIER_VARIABLE
from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.processes import how_it_ended

FAILED, UNUSABLE = 1, 2  # exit codes of ``nsa-oracle replay``
VERDICT = "ORACLE FAILURE  "


class Tier(enum.Enum):
    """The tiers, in order: each adds something that can fail."""

    REFERENCE = "CPU reference"
    INTERPRETER = "interpreter"
    COMPILED = "compiled kernels"
    SIMULATED = "simulated graph"
    EAGER = "eager GPU"
    GRAPH = "captured graph"

    @property
    def blames(self) -> str:
        match self:
            case Tier.REFERENCE:
                return "case itself"
            case Tier.INTERPRETER:
                return "logic"
            case Tier.COMPILED:
                return "code for GPUs"
            case Tier.EAGER:
                return "compile"
            case _:
                return "capture"

    @property
    def arguments(self) -> list[str]:
        device = "cuda" if self in (Tier.EAGER, Tier.GRAPH) else "cpu"
        eager = ["--no-graphs"] if self in (Tier.REFERENCE, Tier.INTERPRETER, Tier.COMPILED, Tier.EAGER) else []
        return ["--device", device, *eager]


@dataclass(frozen=True)
class TierOutcome:
    """What one tier found. passed: None if the tier cannot run here. message: the verdict, or why it did not run."""

    tier: Tier
    passed: bool | None
    message: str = ""


def run_tiers(
    file: Path, backend: str | None, layer: str | None, timeout: float | None = None
) -> Iterator[TierOutcome]:
    """Replay ``file`` on every tier, cheapest first. Continues after a tier has failed.

    timeout: seconds after which a case that is still running in judged code has failed; 0, None: never.

    Raises BackendError if the backend or layer cannot be judged at all.
    """
    compiled = COMPILED_TIER
    for tier in Tier:
        if tier in (Tier.EAGER, Tier.GRAPH) and not torch.cuda.is_available():
            yield TierOutcome(tier, None, "torch sees no CUDA device here")
            continue
        if tier is Tier.COMPILED:
            try:
                build("int works;")
            except BuildError as error:
                yield TierOutcome(tier, None, str(error))
                compiled = INTERPRETED_TIER
                continue
        spec = ["nsa_oracle.reference.multi_step:MultiStepBackend", "nsa_oracle.reference.layer:SparseAttention"]
        if tier is not Tier.REFERENCE:
            spec = [backend or "", layer or ""]
        options = [
            word for name, value in zip(("--backend", "--layer"), spec, strict=True) if value for word in (name, value)
        ]
        if timeout is not None:
            options += ["--timeout", f"{timeout:g}"]
        command = [sys.executable, "-m", "nsa_oracle", "replay", str(file), *tier.arguments, *options]
        kernels = INTERPRETED_TIER if tier in (Tier.REFERENCE, Tier.INTERPRETER) else compiled
        environment = {**os.environ, "PYTHONPATH": module_path(), TIER_VARIABLE: kernels}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode == UNUSABLE:
            raise BackendError(done.stderr.strip().removeprefix("error: "))
        if done.returncode == 0:
            left = [line for line in done.stdout.splitlines() if line.startswith(LEFT_TO_THE_INTERPRETER)]
            yield TierOutcome(tier, True, left[0] if left else "")
            continue
        gaps = [line for line in done.stdout.splitlines() if line.startswith("NOT JUDGED")]
        if gaps:  # the case passed, but does not call everything that the layer brings
            yield TierOutcome(tier, True, gaps[0])
            continue
        verdicts = [line.removeprefix(VERDICT) for line in done.stdout.splitlines() if line.startswith(VERDICT)]
        crash = f"the process ended ({how_it_ended(done.returncode)}): {(done.stderr.splitlines() or [''])[-1]}"
        yield TierOutcome(tier, False, verdicts[0] if verdicts else crash)


def module_path() -> str:
    """A PYTHONPATH of the folders in which this process finds modules, including the current folder."""
    return os.pathsep.join([str(Path.cwd()), *(path for path in sys.path if path)])


def tiers_table(outcomes: Sequence[TierOutcome]) -> Table:
    """One line per tier."""
    table = Table("tier", "what it adds", "outcome")
    for outcome in outcomes:
        verdict = {True: "passes", False: "FAILS", None: "not run"}[outcome.passed]
        text = f"{verdict}: {outcome.message}" if outcome.message else verdict
        table.add_row(outcome.tier.value, outcome.tier.blames, text)
    return table
