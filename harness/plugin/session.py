"""The settings of one pytest run, and the judges of the backends and layers that its tests name."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from nsa_oracle.harness import processes
from nsa_oracle.harness.errors import BackendError, ScenarioError
from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.plugin.live import Live
from nsa_oracle.harness.plugin.output import Output
from nsa_oracle.harness.plugin.parts import Part, Shard
from nsa_oracle.harness.plugin.reports import ReportFiles
from nsa_oracle.harness.plugin.saved import SavedCases, folder_of
from nsa_oracle.harness.report.failure import explain, explain_death, replay_command
from nsa_oracle.harness.report.records import FailureRecord
from nsa_oracle.harness.scenarios.files import cases_of_dead_processes, check_folder, load, process_of, to_json
from nsa_oracle.harness.search.drawing import PROFILES
from nsa_oracle.harness.search.explore import Exploration
from nsa_oracle.harness.search.progress import CaseCounter
from nsa_oracle.harness.search.recovery import Recovery
from nsa_oracle.harness.search.spec import SubjectSpec
from nsa_oracle.harness.signals import Termination
from nsa_oracle.plugin_options import setting
from nsa_oracle.starting import CASE_SECONDS

Specs = tuple[str | None, str | None]
"""The backend and the layer that are judged, as ``module:attribute``; None stands for ``optimized/``."""


def name_of(specs: Specs) -> str:
    """What is judged, for a person."""
    backend, layer = specs
    return (backend or "optimized/") + (f" and {layer}" if layer is not None else "")


def _save_folder(config: pytest.Config) -> Path:
    """The folder for failing cases. Raises UsageError if one is named in which nothing can be saved."""
    kept, named = setting(config, "save"), config.getoption("oracle_save")
    folder = folder_of(config, named, kept or "failures")
    if kept is not None:  # else a failure is told without a file, as in a folder that is mounted read-only
        try:
            check_folder(folder, "oracle_save" if named is None else "--oracle-save")
        except ScenarioError as error:
            raise pytest.UsageError(str(error)) from None
    return folder


@dataclass
class Session:
    """The settings of one run, and methods that judge with them.

    started: a value of ``time.time()``. in_process: judge in this process, not in a child. specs: of the options.
    deadline: value of ``time.monotonic()`` after which no further case is judged. seed: of --oracle-seed, or None;
    random_seed: what a profile that draws new cases starts from otherwise. counts: the folder in which all processes of
    the run count. shard: the part of each test that is judged; None for all of it.
    """

    config: pytest.Config
    started: float
    is_worker: bool
    in_process: bool
    device: torch.device
    specs: Specs
    profile: str
    save_dir: Path
    saved: SavedCases
    case_timeout: float | None
    replayed: tuple[Path, ...]
    deadline: float | None
    seed: int | None
    random_seed: int
    counts: Path
    shard: Shard | None
    reports: ReportFiles
    _judges: dict[Specs, Recovery] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output = Output(self.counts / f"{os.getpid()}.output")  # of children
        self.termination: Termination | None = None
        self.live = None if self.is_worker else Live(self.config, self.counts)

    def begin(self) -> None:
        """Have SIGTERM end the run as Ctrl-C does."""
        self.termination = None if self.is_worker else Termination()

    @staticmethod
    def of(config: pytest.Config, started: float, random_seed: int, counts: Path, is_worker: bool) -> Session:
        """The session that the options and the configuration file ask for.

        Raises UsageError for options that cannot be used. If cases are judged in this process, this fixes how its
        kernels run, so it must come before anything imports Triton.
        """
        share_gpus(config)
        backend, layer, wanted = (setting(config, name) for name in ("backend", "layer", "device"))
        profile, timeout = (setting(config, name) for name in ("profile", "case_timeout"))
        budget, save_dir = config.getoption("oracle_budget"), _save_folder(config)
        if wanted == "cuda" and not torch.cuda.is_available():
            raise pytest.UsageError("--oracle-device cuda: torch sees no CUDA device here; use cpu or auto")
        device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
        in_process = bool(config.getini("oracle_in_process"))
        if in_process:
            try:
                processes.prepare_process(device.type)
            except BackendError as error:
                raise pytest.UsageError(str(error)) from None
        counts.mkdir(exist_ok=True)  # behind whatever may be refused: it says that the run is the oracle's
        return Session(
            config=config,
            started=started,
            is_worker=is_worker,
            in_process=in_process,
            device=device,
            specs=(backend, layer),
            profile="pr" if profile is None else profile,
            save_dir=save_dir,
            saved=SavedCases.of(config, device),
            case_timeout=CASE_SECONDS if timeout is None else timeout or None,
            replayed=tuple(Path(file) for file in config.getoption("oracle_replay")),
            deadline=None if budget is None else time.monotonic() + budget,
            seed=config.getoption("oracle_seed"),
            random_seed=random_seed,
            counts=counts,
            shard=config.getoption("oracle_shard"),
            reports=ReportFiles.of(config),
        )

    def check(self) -> None:
        """Raises UsageError, in one line, if the options name something that cannot be judged or written."""
        try:
            self.reports.check()
            if not self.replayed:
                self.saved.files()
            cases = [(file, load(file)) for file in self.replayed]
            if self.is_worker or (self.specs == (None, None) and not cases):
                return
            judge = self.judge_of(self.specs)
            for file, scenario in cases:
                judge.check(scenario, file)
            backend, layer = self.specs
            if not cases and self.specs != (None, None):
                judge.check_drawing(with_layer=backend is None and layer is not None)
        except (BackendError, ScenarioError, processes.ChildDied) as error:
            raise pytest.UsageError(str(error)) from None

    def header(self) -> str:
        """What is judged, for the head of the run."""
        how = f"profile {self.profile}, seed {self.seed_of(self.profile)}"
        how += f", shard {self.shard}" if self.shard else ""
        return f"oracle: judging {name_of(self.specs)} on {self.device.type}, {how}, unless a test names its own"

    def seed_of(self, profile: str) -> int:
        """The seed from which the cases of ``profile`` are drawn."""
        if self.seed is not None:
            return self.seed
        return self.random_seed if PROFILES[profile].fresh else 0

    def judge_of(self, specs: Specs) -> Recovery:
        """The judge of a backend and a layer, made once. Raises BackendError if they cannot be judged at all."""
        if specs not in self._judges:
            spec = SubjectSpec(*specs, self.case_timeout)
            subject = spec.build(self.device) if self.in_process else None
            output = None if self.in_process else self.output.file
            self._judges[specs] = Recovery(spec, subject, self.device, output)
        return self._judges[specs]

    def death(self, died: processes.ChildDied, part: Part) -> FailureRecord:
        """The record of a case that ended the process which judged it. Its file is kept."""
        specs = part.backend, part.layer
        left = cases_of_dead_processes(self.save_dir, self.started)
        file = part.file or next((file for file in left if process_of(file) == died.process), None)
        if file is None:
            sentence = f"{died} between two cases"
            return FailureRecord("died", "process", sentence, "", f"ORACLE FAILURE  {sentence}")
        command = self.replay_command(Exploration(saved=file), specs, Kind.TIMEOUT if died.hung else None)
        case = load(file)
        report = explain_death(str(died), case, file, command)
        sentence = f"{died} while it judged a case"
        return FailureRecord("died", "process", sentence, command, report, saved=str(file), case=to_json(case))

    def expect(self, parts: Sequence[Part]) -> None:
        """Note how many cases the run will judge, and say from now on how far it is."""
        CaseCounter(self.counts, "expected").note(expected=sum(part.cases for part in parts))
        self.show_progress()

    def judge(self, part: Part, name: str) -> Exploration:
        """Judge a share of a test: one saved case as it is, or drawn cases until one fails. name: to count under.

        Raises BackendError or ScenarioError for what cannot be judged, and ``Unfit`` for a saved case that is outside
        what backend and layer declare.
        """
        judge = self.judge_of((part.backend, part.layer))
        counter = CaseCounter(self.counts, name, part.backend, part.layer)
        if part.file is None:
            seed, within = self.seed_of(part.profile), (self.save_dir, self.deadline)
            return judge.explore(part.numbers, seed, *within, with_layer=part.with_layer, counter=counter)
        scenario = load(part.file)
        if (misfit := judge.misfit(scenario, part.file)) is not None:
            raise Unfit(f"{misfit} is not among the sizes and modes that are declared")
        outcome = judge.judge(scenario, self.save_dir)
        outcome.saved, verdict = part.file, outcome.verdict
        saved = part.file if outcome.failure is not None else None
        counter.note(verdict.cases, verdict.replays, saved, failure=outcome.failure)
        return outcome

    def unvisited(self, part: Part, outcome: Exploration) -> list[str]:
        """The classes that the drawn cases of ``part`` were to visit and did not, because time was up."""
        if part.file is not None or outcome.failure is not None:
            return []
        judge, visited = self.judge_of((part.backend, part.layer)), list(outcome.verdict.boundary_classes)
        seed = self.seed_of(part.profile)
        return judge.unvisited(visited, PROFILES[part.profile], part.with_layer, seed, part.shard)

    def report_of(self, outcome: Exploration, specs: Specs) -> str | None:
        """The report of a failed outcome, or None."""
        if outcome.failure is None:
            return None
        command = self.replay_command(outcome, specs)
        return outcome.remark + explain(outcome.failure, outcome.saved, command, outcome.unsaved)

    def replay_command(self, outcome: Exploration, specs: Specs, kind: Kind | None = None) -> str:
        """The command that replays the case of an outcome on the same backend and layer. kind: of its failure."""
        files = (*outcome.before, outcome.saved or Path("CASE.json"))
        kind = outcome.failure.finding.kind if outcome.failure is not None else kind
        timeout = self.case_timeout if kind is Kind.TIMEOUT else None
        return replay_command(files, specs[0], self.device.type, specs[1], timeout=timeout)

    def show_progress(self) -> None:
        """Say from now on how far the run is."""
        if self.live is not None:
            self.live.start()

    def end_children(self) -> None:
        """End the child processes that judge."""
        for judge in self._judges.values():
            judge.close()

    def close(self) -> None:
        """End the child processes, and show and count nothing more."""
        self.end_children()
        if self.live is not None:
            self.live.close()
        if self.termination is not None:
            self.termination.close()
            with suppress(OSError):
                shutil.rmtree(self.counts)


class Unfit(Exception):
    """A saved case is outside the sizes and modes that the backend or the layer declares."""


def share_gpus(config: pytest.Config) -> None:
    """Give each worker of pytest-xdist (gw0, gw1, ...) one of the GPUs. The controller uses none."""
    worker: dict[str, str] | None = getattr(config, "workerinput", None)
    if worker is not None:
        processes.take_gpu(int(worker["workerid"].removeprefix("gw")))
