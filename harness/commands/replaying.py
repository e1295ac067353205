"""Commands that judge saved cases: replay, tiers. In a fork, so that a case that ends its process is reported too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from nsa_oracle.harness.commands.app import (
    BackendOption,
    Device,
    DeviceOption,
    Files,
    LayerOption,
    TimeoutOption,
    app,
    torch_device,
    unusable,
)
from nsa_oracle.harness.commands.terminal import ended_by_a_signal
from nsa_oracle.harness.commands.tiers import FAILED, run_tiers, tiers_table
from nsa_oracle.harness.errors import BackendError, ScenarioError, counted, one_line
from nsa_oracle.harness.forks import Tell, forked
from nsa_oracle.harness.judge import OracleFailure, Verdict, judge_subject
from nsa_oracle.harness.processes import ChildDied
from nsa_oracle.harness.report.declared import declared_lines, unneeded_declarations
from nsa_oracle.harness.report.failure import explain, explain_death, replay_command
from nsa_oracle.harness.report.records import NOTHING_COMPARED
from nsa_oracle.harness.report.summary import how_exact, interpreted_lines, methods_report, thread_error_lines
from nsa_oracle.harness.report.text import render
from nsa_oracle.harness.scenarios.files import MAX_PATH, load
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.search.spec import SubjectSpec
from nsa_oracle.harness.subjects.subject import Subject
from nsa_oracle.starting import CASE_SECONDS, MESSAGE

PASSED = 0  # exit code


@dataclass(frozen=True)
class Replaying:
    """Saved cases and what to judge on them; as the options of ``replay``.

    timeout: of a case, in seconds. None: no limit, but ``CASE_SECONDS`` for the imports; 0: no limit at all.
    """

    files: tuple[Path, ...]
    device: Device = Device.AUTO
    backend: str | None = None
    layer: str | None = None
    graphs: bool = True
    timeout: float | None = None

    def watched(self) -> int:
        """As ``run``, in a fork. A case that ends it is reported, and the cases behind it get a new fork.

        Raises KeyboardInterrupt, as ``run`` does, with the number of files that were judged before.
        """
        code, first = PASSED, 0
        while first < len(self.files):
            begun: tuple[int, str] | None = None

            def hear(message: tuple[int, str]) -> None:
                nonlocal begun
                begun = message

            try:
                return forked(lambda tell, first=first: self.run(first, tell), hear) or code  # type: ignore[misc]
            except KeyboardInterrupt:
                raise KeyboardInterrupt(begun[0] if begun else first) from None
            except ChildDied as died:
                if begun is None:
                    return _unusable(f"{died} while it loaded {self._judged()}")
                number, device = begun
                file = self.files[number]
                typer.echo(explain_death(str(died), load(file), file, self.command(file, device)))
                code, first = FAILED, number + 1
        return code

    def run(self, first: int = 0, tell: Tell | None = None) -> int:
        """Judge the files from number ``first`` on, in this process, and print the verdicts. Returns the exit code.

        tell: is called with the number of each file and the device before it is judged.
        """
        where = torch_device(self.device)
        try:
            cases, subject = self.checked(where)
        except (ScenarioError, BackendError) as error:
            return _unusable(str(error))
        failed = False
        total = Verdict()
        for number, (file, scenario) in enumerate(cases[first:], first):
            if tell is not None:
                tell((number, where.type))
            try:
                verdict = judge_subject(subject, scenario, where, graphs=self.graphs)
                total.add(verdict)
            except OracleFailure as failure:
                typer.echo(explain(failure, file, self.command(file, where.type)))
                failed = True
            except (BackendError, ScenarioError) as error:
                return _unusable(str(error))
            except KeyboardInterrupt:
                raise KeyboardInterrupt(number) from None
            else:
                calls = f"{counted(verdict.replays, 'replay')}, {counted(verdict.eager_calls, 'eager call')}"
                told = how_exact(verdict).removeprefix("all ")
                typer.echo(f"{one_line(str(file), MAX_PATH)}: {told} ({calls} on {where.type})")
        if total.layers.calls and not failed:
            typer.echo(methods_report(total.layers))
        gaps = [] if failed else unneeded_declarations(total.declared)
        if not failed and not total.tally.cells:
            gaps.append(NOTHING_COMPARED)
        for line in [*interpreted_lines(total), *thread_error_lines(total), *declared_lines(total.declared), *gaps]:
            typer.echo(line)
        return FAILED if failed or gaps or total.layers.never_called else PASSED

    def checked(self, where: torch.device) -> tuple[list[tuple[Path, Scenario]], Subject]:
        """The cases, and the subject to judge on them. Raises ScenarioError or BackendError if they do not fit."""
        cases = [(file, load(file)) for file in self.files]
        loading = CASE_SECONDS if self.timeout is None else None
        subject = SubjectSpec(self.backend, self.layer, self.timeout or None, loading).build(where)
        for file, scenario in cases:
            subject.check(scenario, file)
        if self.layer is not None and self.backend is None and all(case.setup.layer is None for _, case in cases):
            raise BackendError(f"layer '{self.layer}': no case here has a layer, so it would not be judged")
        return cases, subject

    def command(self, file: Path, device: str) -> str:
        return replay_command((file,), self.backend, device, self.layer, self.graphs, self.timeout or None)

    def _judged(self) -> str:
        return " and ".join(spec for spec in (self.backend, self.layer) if spec) or "optimized/"


def _unusable(message: str) -> int:
    return unusable(message).exit_code


def check_at_once(replaying: Replaying) -> None:
    """Raises BackendError or ScenarioError if ``replaying`` cannot be judged. Loads the subject in a fork."""

    def check(tell: Tell) -> None:
        replaying.checked(torch_device(Device.CPU))

    try:
        forked(check)
    except ChildDied as died:
        raise BackendError(f"{died} while it loaded {replaying._judged()}") from None


@app.command()
def replay(
    files: Files,
    device: DeviceOption = Device.AUTO,
    backend: BackendOption = None,
    layer: LayerOption = None,
    graphs: Annotated[bool, typer.Option(help="Replay captured graphs, or run each replay as an eager call.")] = True,
    timeout: TimeoutOption = None,
    in_process: Annotated[
        bool,
        typer.Option(
            "--in-process",
            help="Judge in this process, for profilers and debuggers of native code, not in a fork of it.",
        ),
    ] = False,
) -> None:
    """Judge saved cases, in the given order and in one process, and explain those that fail.

    Prints one line for each case that passes and a full report for each that fails. If judged code ends the process,
    that case has failed, and the rest is judged in a new process.
    """
    judging = Replaying(tuple(files), device, backend, layer, graphs, timeout)
    with ended_by_a_signal() as termination:
        try:
            code = judging.run() if in_process else judging.watched()
        except KeyboardInterrupt as interruption:
            done = next((note for note in interruption.args if isinstance(note, int)), 0)
            typer.echo(
                f"interrupted: {done} of {counted(len(files), 'case')} judged" if done else MESSAGE.rstrip(), err=True
            )
            code = termination.exit_code
    raise typer.Exit(code)


@app.command()
def tiers(
    file: Annotated[Path, typer.Argument(help="A saved case (JSON).", show_default=False)],
    backend: BackendOption = None,
    layer: LayerOption = None,
    timeout: TimeoutOption = None,
) -> None:
    """Judge one case on every tier and name the first that fails.

    Tiers go from the reference on the CPU to the captured graph on the GPU. The first tier that fails shows where the
    cause is: in the case itself, the logic, the compilation or the capture.
    """
    try:
        check_at_once(Replaying((file,), Device.CPU, backend, layer, timeout=timeout))
        outcomes = list(run_tiers(file, backend, layer, timeout))
    except (ScenarioError, BackendError) as error:
        raise unusable(str(error)) from None
    typer.echo(render(tiers_table(outcomes)))
    failed = next((outcome for outcome in outcomes if outcome.passed is False), None)
    if failed is not None:
        typer.echo(f"first to fail: {failed.tier.value}, so look at the {failed.tier.blames}\n  {failed.message}")
        raise typer.Exit(1)
