"""The command ``mutants``: mutates every line of ``optimized/`` and prints the mutants that no case kills."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from nsa_oracle.harness.commands.app import Device, app, check_written, torch_device, unusable
from nsa_oracle.harness.commands.terminal import progress_of
from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.mutants import report as mutant_scores
from nsa_oracle.harness.mutants.cases import gathered_cases
from nsa_oracle.harness.mutants.judging import score
from nsa_oracle.harness.mutants.mutants import all_mutants, sampled
from nsa_oracle.harness.mutants.score import Score, ScoringError
from nsa_oracle.harness.report import text


@app.command()
def mutants(
    listed: Annotated[bool, typer.Option("--list", help="List the mutants and what each changes; judge none.")] = False,
    file: Annotated[
        str, typer.Option(help="Files of optimized/ to mutate, as a pattern such as 'kernels/*' or 'topk.py'.")
    ] = "*",
    only: Annotated[list[str] | None, typer.Option(help="Judge only this mutant; may be given several times.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Judge only this many mutants, picked at random.")] = None,
    cases: Annotated[
        int, typer.Option(min=0, help="Fresh cases of metadata, besides the saved ones; half as many with a layer.")
    ] = 48,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample and of the fresh cases.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Mutants judged in parallel, each in its own process.")] = 2,
    patience: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="A mutant counts as a survivor after cases that take this long on unchanged code.",
        ),
    ] = math.inf,
    device: Annotated[
        Device,
        typer.Option(
            help="cuda: compiled kernels, including the Gluon kernel; cpu: compiled for the CPU; auto: cuda if there "
            "is a GPU."
        ),
    ] = Device.CPU,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Append one JSON record per mutant to this file, as they are judged.")
    ] = None,
) -> None:
    """Mutate optimized/ and print the mutants that no case kills.

    Every line is changed in every way that the mutation operators know. Runs without a GPU unless --device says
    otherwise. A mutant is judged until a case fails, so survivors take longest.
    """
    where = torch_device(device)
    check_written("--json", json_file)
    chosen = all_mutants(file)
    if not chosen:
        raise unusable(f"--file {file}: matches no file of optimized/ that can be mutated")
    if unknown := sorted(set(only or ()) - {mutant.id for mutant in chosen}):
        raise unusable(f"--only {unknown[0]}: no such mutant; --list names them all")
    chosen = [mutant for mutant in chosen if not only or mutant.id in only]
    chosen = chosen if sample is None else sampled(chosen, sample, seed)
    if listed:
        typer.echo(mutant_scores.listing(chosen))
        return
    scores: list[Score] = []
    try:
        with (
            json_file.open("a", encoding="utf-8") if json_file is not None else nullcontext() as records,
            progress_of("judging", len(chosen)) as show_progress,
        ):
            for scored in score(chosen, gathered_cases(cases, seed, where), jobs, patience, device=where):
                scores.append(scored)
                show_progress(len(scores), "")
                if records is not None:
                    print(mutant_scores.as_json(scored), file=records, flush=True)
    except OSError as error:
        raise unusable(f"--json {json_file}: {error.strerror}") from None
    except (ScenarioError, ScoringError) as error:
        raise unusable(str(error)) from None
    order = {mutant.id: number for number, mutant in enumerate(chosen)}
    scores.sort(key=lambda scored: order[scored.mutant.id])
    typer.echo(text.render(mutant_scores.matrix(scores)))
    alive = [scored for scored in scores if scored.fate.is_alive]
    if alive:
        typer.echo(mutant_scores.survivors(alive))
    typer.echo(mutant_scores.sum_line(scores))
    raise typer.Exit(1 if alive else 0)
