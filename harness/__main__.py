"""``python -m harness``: replay saved cases and tell what they are. Exit 0 passes, 1 fails, 2 unusable."""

from __future__ import annotations

import math
import os
import tempfile
import time
from contextlib import closing, nullcontext
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from nsa_oracle.harness.bugs import kill_matrix as kill_report
from nsa_oracle.harness.bugs.hunt import Kill, hunt_all
from nsa_oracle.harness.bugs.zoo import ZOO
from nsa_oracle.harness.commands.sanitizer import CASES, Tool, obstacle
from nsa_oracle.harness.commands.sanitizer import sanitize as run_sanitizer
from nsa_oracle.harness.commands.terminal import progress_of
from nsa_oracle.harness.commands.tiers import run_tiers
from nsa_oracle.harness.interpreter import speed
from nsa_oracle.harness.judge import OracleFailure
from nsa_oracle.harness.mutants import report as mutant_scores
from nsa_oracle.harness.mutants.mutants import all_mutants, sampled
from nsa_oracle.harness.mutants.scoring import Score, ScoringError, gathered_cases, score
from nsa_oracle.harness.protocol import BackendError
from nsa_oracle.harness.report import summary
from nsa_oracle.harness.scenarios.scenario import ScenarioError, load
from nsa_oracle.harness.search.explore import Subject
from nsa_oracle.harness.search.survey import INTERRUPTED, Survey, ended_by_a_signal

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


class HuntProfile(Enum):
    """How many cases a bug may survive."""

    DEV = "dev"
    PR = "pr"
    NIGHTLY = "nightly"

    @property
    def cases(self) -> int:
        return {HuntProfile.DEV: 50, HuntProfile.PR: 200, HuntProfile.NIGHTLY: 1000}[self]


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
    layer: Annotated[str | None, typer.Option(help="module:attribute of an attention layer, or stages of one.")] = None,
    graphs: Annotated[bool, typer.Option(help="--no-graphs runs eagerly what the case would replay.")] = True,
) -> None:
    """Judge saved cases, one line each, and explain those that fail."""
    where = _torch_device(device)
    try:
        cases = [(file, load(file)) for file in files]
        subject = Subject.load(backend, layer, where)
        for file, scenario in cases:
            subject.check(scenario, file)
    except (ScenarioError, BackendError) as error:
        raise _unusable(str(error)) from None
    failed = False
    for file, scenario in cases:
        try:
            verdict = subject.judge(scenario, where, graphs=graphs)
        except OracleFailure as failure:
            command = summary.replay_command(file, backend, where.type, layer, graphs)
            typer.echo(summary.explain(failure, file, command))
            failed = True
        except (BackendError, ScenarioError) as error:
            raise _unusable(str(error)) from None
        else:
            counts = f"{verdict.replays} replays, {verdict.eager_calls} eager calls on {where.type}"
            typer.echo(f"{file}: bit-exact ({counts})")
    raise typer.Exit(1 if failed else 0)


@app.command()
def tiers(
    file: Annotated[Path, typer.Argument(help="A saved case (JSON).", show_default=False)],
    backend: Annotated[str | None, typer.Option(help="module:attribute to judge instead of optimized/.")] = None,
    layer: Annotated[str | None, typer.Option(help="module:attribute of an attention layer, or stages of one.")] = None,
) -> None:
    """Replay one case on every tier and name the first that fails: its logic, its compilation, or its capture."""
    try:
        load(file)
        outcomes = list(run_tiers(file, backend, layer))
    except (ScenarioError, BackendError) as error:
        raise _unusable(str(error)) from None
    typer.echo(summary.render(summary.tiers_table(outcomes)))
    failed = next((outcome for outcome in outcomes if outcome.passed is False), None)
    if failed is not None:
        typer.echo(f"first to fail: {failed.tier.value}, so look at the {failed.tier.blames}\n  {failed.told}")
        raise typer.Exit(1)


@app.command()
def survey(
    layer: Annotated[str, typer.Option(help="module:attribute of an attention layer, or stages of one.")],
    cases: Annotated[int, typer.Option(min=1, help="How many cases to draw.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Where they are drawn from.")] = 0,
    device: Annotated[Device, typer.Option(help="cuda: real CUDA graphs; cpu: interpreter, simulated.")] = Device.AUTO,
    budget: Annotated[float | None, typer.Option(min=0, help="End after so many seconds.", metavar="SECONDS")] = None,
) -> None:
    """Tell every property that a layer holds and every one that it does not, instead of stopping at the first.

    Interrupted or out of time it tells what it has. Exit 130 if interrupted with nothing broken so far.
    """
    where = _torch_device(device)
    deadline = None if budget is None else time.monotonic() + budget
    interrupted = False
    try:
        subject = Subject.load(None, layer, where)
        found = Survey(subject, where)
        try:
            with ended_by_a_signal(), progress_of("surveying", cases) as tell:
                found.run(cases, seed, deadline, tell)
        except KeyboardInterrupt:
            interrupted = True
    except (BackendError, ScenarioError, ValueError) as error:
        raise _unusable(str(error)) from None
    typer.echo(summary.render(summary.survey_table(found.records)))
    if found.left_out:
        typer.echo(summary.not_judged(found.left_out))
    if found.cases < cases:
        typer.echo(f"{'interrupted' if interrupted else 'out of time'}: {found.cases} of {cases} cases")
    raise typer.Exit(0 if found.holds and not interrupted else 1 if not found.holds else INTERRUPTED)


@app.command()
def bugs(
    listed: Annotated[bool, typer.Option("--list", help="Name the bugs and what each is, and hunt none.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Hunt this bug; may be given several times.")] = None,
    profile: Annotated[HuntProfile, typer.Option(help="How many cases a bug may survive.")] = HuntProfile.PR,
    device: Annotated[Device, typer.Option(help="cuda: real CUDA graphs; cpu: interpreter, simulated.")] = Device.AUTO,
    seed: Annotated[int, typer.Option(min=0, help="Where cases are drawn from.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Bugs hunted at a time, in processes spread over all GPUs.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the kills to this file as well.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write the matrix to this file as well.")] = None,
) -> None:
    """Plant every bug of the zoo in optimized/ and print which check kills it: the kill matrix.

    Interrupted it tells what it has. Exit 130 if all bugs hunted so far died as they should.
    """
    where = _torch_device(device)
    unknown = [name for name in only or () if name not in ZOO]
    if unknown:
        raise _unusable(f"--only {unknown[0]}: no such bug; --list names them all")
    for option, file in (("--json", json_file), ("--html", html_file)):
        if file is not None and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
            raise _unusable(f"{option} {file}: cannot be written; name a file in a folder that can")
    chosen = [bug for bug in ZOO.values() if not only or bug.name in only]
    if listed:
        typer.echo(summary.render(kill_report.listing(chosen)))
        return
    hunted = [bug for bug in chosen if where.type == "cuda" or not bug.gpu]
    found: dict[str, Kill] = {}
    interrupted = False
    try:
        with (
            tempfile.TemporaryDirectory() as scratch,
            ended_by_a_signal(),
            progress_of("hunting", len(hunted)) as tell,
            closing(hunt_all(hunted, where, profile.cases, seed, Path(scratch), jobs)) as hunt,
        ):
            for kill in hunt:
                found[kill.bug] = kill
                tell(len(found))
    except KeyboardInterrupt:
        interrupted = True
    kills = [found[bug.name] for bug in hunted if bug.name in found]
    typer.echo(summary.render(kill_report.kills_table(kills), kill_report.LOG_WIDTH))
    typer.echo(kill_report.sum_line(kills, len(chosen) - len(hunted)))
    if interrupted:
        typer.echo(f"interrupted: {len(kills)} of {len(hunted)} bugs")
    if json_file is not None:
        json_file.write_text(kill_report.as_json(kills), encoding="utf-8")
    if html_file is not None:
        html_file.write_text(kill_report.as_html(kills), encoding="utf-8")
    as_meant = all(kill.meant for kill in kills)
    raise typer.Exit(1 if not as_meant else INTERRUPTED if interrupted else 0)


@app.command()
def sanitize(
    files: Annotated[list[Path] | None, typer.Argument(help="Saved cases (JSON); by default a few small ones.")] = None,
    tool: Annotated[list[Tool] | None, typer.Option(help="Run this tool alone; may be given several times.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that each tool may take.")] = 600,
) -> None:
    """Judge saved cases on the GPU under NVIDIA's compute-sanitizer, and tell in one line what each tool found."""
    if (why := obstacle()) is not None:
        raise _unusable(f"sanitize: {why}")
    cases = files or list(CASES)
    try:
        for file in cases:
            load(file)
    except ScenarioError as error:
        raise _unusable(str(error)) from None
    outcomes = []
    for outcome in run_sanitizer(cases, tool or list(Tool), timeout):
        typer.echo(outcome.line())
        outcomes.append(outcome)
    if any(outcome.clean is False for outcome in outcomes):
        raise typer.Exit(1)
    raise typer.Exit(2 if any(outcome.clean is None for outcome in outcomes) else 0)


@app.command()
def mutants(
    listed: Annotated[bool, typer.Option("--list", help="Name the mutants and what each changes; judge none.")] = False,
    file: Annotated[str, typer.Option(help="Files of optimized/, as a pattern: 'kernels/*', 'topk.py'.")] = "*",
    only: Annotated[list[str] | None, typer.Option(help="Judge this mutant; may be given several times.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Judge so many of them, picked at random.")] = None,
    cases: Annotated[int, typer.Option(min=0, help="Fresh cases beside the saved ones, and half as many more.")] = 48,
    seed: Annotated[int, typer.Option(min=0, help="Where the sample and fresh cases are drawn from.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Mutants judged at a time, each in its own process.")] = 2,
    patience: Annotated[float, typer.Option(min=0, help="Seconds of cases that a survivor has survived.")] = math.inf,
    device: Annotated[Device, typer.Option(help="cuda: compiled kernels, the Gluon one too.")] = Device.CPU,
    json_file: Annotated[Path | None, typer.Option("--json", help="Add a record a line, as they come.")] = None,
) -> None:
    """Change every line of optimized/ in every way that the operators know, and print what no case notices.

    Runs without a GPU unless told to use one. Fresh cases: so many of metadata alone, and half as many with a
    layer. A mutant is judged until a case fails, so it is the survivors that take long.
    """
    where = _torch_device(device)
    chosen = all_mutants(file)
    if not chosen:
        raise _unusable(f"--file {file}: no file of optimized/ that can be changed has such a name")
    if unknown := sorted(set(only or ()) - {mutant.id for mutant in chosen}):
        raise _unusable(f"--only {unknown[0]}: no such mutant; --list names them all")
    chosen = [mutant for mutant in chosen if not only or mutant.id in only]
    chosen = chosen if sample is None else sampled(chosen, sample, seed)
    if listed:
        typer.echo(mutant_scores.listing(chosen))
        return
    scores: list[Score] = []
    try:
        with (
            json_file.open("a", encoding="utf-8") if json_file is not None else nullcontext() as records,
            progress_of("judging", len(chosen)) as tell,
        ):
            for scored in score(chosen, gathered_cases(cases, seed, where), jobs, patience, device=where):
                scores.append(scored)
                tell(len(scores))
                if records is not None:
                    print(mutant_scores.as_json(scored), file=records, flush=True)
    except OSError as error:
        raise _unusable(f"--json {json_file}: {error.strerror}") from None
    except (ScenarioError, ScoringError) as error:
        raise _unusable(str(error)) from None
    order = {mutant.id: number for number, mutant in enumerate(chosen)}
    scores.sort(key=lambda scored: order[scored.mutant.id])
    typer.echo(summary.render(mutant_scores.matrix(scores)))
    alive = [scored for scored in scores if scored.fate.is_alive]
    if alive:
        typer.echo(mutant_scores.survivors(alive))
    typer.echo(mutant_scores.sum_line(scores))
    raise typer.Exit(1 if alive else 0)


@app.command()
def show(files: Files) -> None:
    """Tell saved cases in plain words."""
    try:
        told = [(scenario.note, summary.tell(scenario)) for scenario in map(load, files)]
    except ScenarioError as error:
        raise _unusable(str(error)) from None
    for note, text in told:
        typer.echo(f"{note}\n{text}" if note else text)


def _torch_device(wanted: Device) -> torch.device:
    """The device to use; fixes how kernels run, so it must come before anything imports Triton."""
    if wanted is Device.CUDA and not torch.cuda.is_available():
        raise _unusable("--device cuda: torch sees no CUDA device here; use cpu or auto")
    device = torch.device("cuda" if wanted is not Device.CPU and torch.cuda.is_available() else "cpu")
    speed.prepare_process(device.type)
    return device


def _unusable(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(2)


if __name__ == "__main__":
    app()
