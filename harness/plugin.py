"""The pytest plugin: ``--oracle-*`` options, the ``oracle`` and ``device`` fixtures, and the closing report."""

from __future__ import annotations

import argparse
import functools
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_oracle.harness import processes
from nsa_oracle.harness.errors import BackendError, ScenarioError
from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.report import summary
from nsa_oracle.harness.report.failure import explain, replay_command
from nsa_oracle.harness.report.records import FailureRecord, ItemRecord, RunRecord
from nsa_oracle.harness.scenarios.files import cases_of_dead_processes, corpus, load
from nsa_oracle.harness.scenarios.switches import NO_SWITCHES
from nsa_oracle.harness.search.drawing import PROFILES, SHARDS
from nsa_oracle.harness.search.explore import Exploration
from nsa_oracle.harness.search.recovery import Recovery, SubjectSpec
from nsa_oracle.harness.subjects.subject import Subject

ENTROPY = "oracle_entropy"
BUG = "oracle_bug"  # property of a test report: the planted bug that its item had to kill
PROPERTY = "oracle"  # property of a test report: what its item covered, in a form that xdist workers can send


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("oracle", "correctness oracle for multi-step attention backends")
    group.addoption(
        "--oracle-profile",
        choices=sorted(PROFILES),
        default="pr",
        help="how many cases to draw, of metadata alone + with an attention layer: "
        + ", ".join(f"{name} {profile.cases:,} + {profile.layer_cases:,}" for name, profile in PROFILES.items())
        + "; dev and pr draw the same cases in every run, nightly new ones (default: pr)",
    )
    group.addoption(
        "--oracle-device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the backend runs; cuda: real CUDA graphs; cpu: Triton's interpreter and a simulated graph; auto: "
        "cuda if there is a GPU (default: auto)",
    )
    group.addoption(
        "--oracle-backend",
        metavar="MODULE:ATTRIBUTE",
        help="backend to judge: a callable of (config, req_to_token) (default: optimized/)",
    )
    group.addoption(
        "--oracle-layer",
        metavar="MODULE:ATTRIBUTE",
        help="attention layer to judge: a callable of (config, attention) that returns a layer or single stages of "
        "one (default: optimized/)",
    )
    group.addoption(
        "--oracle-replay",
        metavar="FILE",
        action="append",
        default=[],
        help="judge this saved case and run nothing else; may be given several times",
    )
    group.addoption(
        "--oracle-save", metavar="DIR", default="failures", help="folder to save failing cases in (default: failures)"
    )
    group.addoption(
        "--oracle-budget",
        metavar="SECONDS",
        type=_seconds,
        help="judge no new case after this time; a failure found by then is still shrunk and reported (default: no "
        "limit)",
    )
    group.addoption(
        "--oracle-case-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=600.0,
        help="a case that is still running in judged code after this time has failed; 0: no limit (default: 600)",
    )
    group.addoption(
        "--oracle-seed",
        metavar="N",
        type=_seed,
        help="draw the cases of this seed, as the header of another run shows it (default: 0; nightly: a new one)",
    )


def _seconds(text: str) -> float:
    """Parse a number of seconds from the command line."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds, 0 or more")
    return seconds


def _seed(text: str) -> int:
    """The type of --oracle-seed: a whole number below 2**48."""
    if not text.isdecimal() or int(text) >= 1 << 48:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to {(1 << 48) - 1}")
    return int(text)


@dataclass
class Oracle:
    """The settings of one session, and methods that judge with them.

    backend_spec, layer_spec: ``module:attribute``, or None for ``optimized/``. deadline: value of ``time.monotonic()``
    after which no further case is judged. entropy: the seed from which the session's cases are drawn.
    """

    device: torch.device
    subject: Subject
    backend_spec: str | None
    layer_spec: str | None
    profile: str
    save_dir: Path
    deadline: float | None
    entropy: int

    @functools.cached_property
    def recovery(self) -> Recovery:
        """Judges in this process, or in a child process once this one has lost its GPU."""
        spec = SubjectSpec(self.backend_spec, self.layer_spec, self.subject.case_timeout)
        return Recovery(spec, self.subject, self.device)

    def judge_file(self, path: Path) -> Exploration:
        """Judge one saved case as it is, without shrinking."""
        outcome = self.recovery.judge(load(path))
        outcome.saved = path
        return outcome

    def explore(self, shard: int, with_layer: bool = False) -> Exploration:
        """Judge this shard's share of the profile's cases."""
        profile = PROFILES[self.profile]
        return self.recovery.explore(
            (profile.layer_cases if with_layer else profile.cases) // SHARDS,
            self.entropy + shard,
            self.save_dir,
            self.deadline,
            with_layer=with_layer,
        )

    def report_of(self, outcome: Exploration) -> str | None:
        """The report of a failed outcome, or None."""
        if outcome.failure is None:
            return None
        text = explain(outcome.failure, outcome.saved, self.replay_command(outcome), outcome.unsaved)
        note = "NOT REPRODUCIBLE: the case failed once and passed when repeated (a race?); this is the raw case.\n"
        lost = "THE GPU FAULTED: the remaining cases of this process are judged in a child process.\n"
        return (note if outcome.flaky else "") + (lost if outcome.lost else "") + text

    def replay_command(self, outcome: Exploration) -> str:
        saved = outcome.saved or Path("CASE.json")
        is_timeout = outcome.failure is not None and outcome.failure.finding.kind is Kind.TIMEOUT
        timeout = self.subject.case_timeout if is_timeout else None
        return replay_command(saved, self.backend_spec, self.device.type, self.layer_spec, timeout=timeout)


def pytest_configure(config: pytest.Config) -> None:
    """Fix how kernels run before anything imports Triton, and reject unusable options with a one-line error."""
    share_gpus(config)
    wanted = config.getoption("--oracle-device")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--oracle-device cuda: torch sees no CUDA device here; use cpu or auto")
    device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
    processes.prepare_process(device.type)
    try:
        spec, layer_spec = config.getoption("--oracle-backend"), config.getoption("--oracle-layer")
        seconds = config.getoption("--oracle-case-timeout")
        subject = Subject.load(spec, layer_spec, device, seconds or None)
        replayed = [Path(file) for file in config.getoption("--oracle-replay")]
        for file in replayed:
            subject.check(load(file), file)
        for with_layer in (False, True) if not replayed else ():
            subject.scale(device, with_layer)
        save_dir = _writable_folder(config.getoption("--oracle-save"))
    except (BackendError, ScenarioError, ValueError) as error:
        raise pytest.UsageError(str(error)) from None
    budget = config.getoption("--oracle-budget")
    profile = config.getoption("--oracle-profile")
    config.stash[ORACLE] = Oracle(
        device=device,
        subject=subject,
        backend_spec=spec,
        layer_spec=layer_spec,
        profile=profile,
        save_dir=save_dir,
        deadline=None if budget is None else time.monotonic() + budget,
        entropy=_entropy(config, PROFILES[profile].fresh),
    )
    config.stash[STARTED] = time.monotonic()


def share_gpus(config: pytest.Config) -> None:
    """Give each worker of pytest-xdist (gw0, gw1, ...) one of the GPUs. The controller uses none."""
    worker: dict[str, str] | None = getattr(config, "workerinput", None)
    if worker is not None:
        processes.take_gpu(int(worker["workerid"].removeprefix("gw")))


def _writable_folder(name: str) -> Path:
    """The folder ``name``, which need not exist yet. Raises ValueError if nothing could be saved in it."""
    folder = Path(name)
    try:
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    except OSError as error:
        raise ValueError(f"--oracle-save {name}: {error.strerror}") from None
    if not existing.is_dir():
        raise ValueError(f"--oracle-save {name}: {existing} is a file; name a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--oracle-save {name}: nothing can be written in {existing}; name another directory")
    return folder


def _entropy(config: pytest.Config, fresh: bool) -> int:
    """The seed from which this session's cases are drawn; workers of pytest-xdist use the controller's."""
    worker_input = getattr(config, "workerinput", {})
    if ENTROPY in worker_input:
        return int(worker_input[ENTROPY])
    if (seed := config.getoption("--oracle-seed")) is not None:
        return int(seed)
    return int.from_bytes(os.urandom(6), "big") if fresh else 0


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Send the seed of the session to a worker of pytest-xdist."""
    node.workerinput[ENTROPY] = node.config.stash[ORACLE].entropy


ORACLE = pytest.StashKey[Oracle]()
STARTED = pytest.StashKey[float]()


@pytest.fixture(scope="session")
def oracle(pytestconfig: pytest.Config) -> Oracle:
    """The session's oracle."""
    return pytestconfig.stash[ORACLE]


@pytest.fixture(scope="session")
def device(oracle: Oracle) -> torch.device:
    """Where backends run in this session."""
    return oracle.device


@pytest.fixture
def verdict_of(oracle: Oracle, request: pytest.FixtureRequest) -> Callable[[Exploration], None]:
    """A function that records what an exploration covered and, if it failed, fails the test with its report."""

    def conclude(outcome: Exploration) -> None:
        report = oracle.report_of(outcome)
        failures: tuple[FailureRecord, ...] = ()
        if outcome.failure is not None and report is not None:
            failures = (FailureRecord.of(outcome.failure, oracle.replay_command(outcome), report),)
        drawn_by = request.node.originalname if "shard" in request.fixturenames else ""
        request.node.user_properties.append((PROPERTY, ItemRecord(outcome.verdict, failures, drawn_by).to_json()))
        for failure in failures:  # the report of each different failure is printed once, at the end
            pytest.fail(f"{failure.sentence}\nreplay: {failure.command}", pytrace=False)

    return conclude


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Create the items of the oracle's tests: one per saved case, and one per shard of the exploration."""
    replayed = [Path(file) for file in metafunc.config.getoption("--oracle-replay")]
    if "saved_case" in metafunc.fixturenames:
        oracle = metafunc.config.stash[ORACLE]
        saved = _corpus(oracle.subject, oracle.device)
        files = replayed or [file for file, misfit in saved if misfit is None]
        metafunc.parametrize("saved_case", files, ids=[file.stem for file in files])
    if "shard" in metafunc.fixturenames:
        metafunc.parametrize("shard", range(SHARDS))


def _corpus(subject: Subject, device: torch.device) -> list[tuple[Path, str | None]]:
    """The saved cases, each with what is outside the limits of ``subject``, or None.

    Raises UsageError if a case is malformed or names wrong switches.
    """
    try:
        saved = [(file, load(file)) for file in corpus(device)]
        for file, scenario in saved:
            subject.check_switches(scenario, file)
        return [(file, subject.misfit(scenario)) for file, scenario in saved]
    except ScenarioError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Saved cases run first. With ``--oracle-replay`` nothing else runs."""
    saved = [item for item in items if "saved_case" in getattr(item, "fixturenames", ())]
    others = [item for item in items if item not in saved]
    if config.getoption("--oracle-replay"):
        config.hook.pytest_deselected(items=others)
        others = []
    items[:] = saved + others


def pytest_unconfigure(config: pytest.Config) -> None:
    if ORACLE in config.stash:
        config.stash[ORACLE].recovery.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Report what cannot be judged in one line, without a traceback."""
    try:
        return (yield)
    except (BackendError, ScenarioError) as error:
        pytest.fail(str(error), pytrace=False)


def pytest_report_header(config: pytest.Config) -> str:
    oracle = config.stash[ORACLE]
    judged = oracle.backend_spec or "optimized/"
    if oracle.layer_spec is not None:
        judged += f" and {oracle.layer_spec}"
    return f"oracle: judging {judged} on {oracle.device.type}, profile {oracle.profile}, seed {oracle.entropy}"


def _reported(terminalreporter: pytest.TerminalReporter) -> tuple[RunRecord, Counter[str]]:
    """What the oracle's items reported, those of xdist workers included; and outcomes of the items of the zoo."""
    run, bugs = RunRecord(), Counter[str]()
    for outcome, reports in terminalreporter.stats.items():
        for item in reports:
            for name, value in getattr(item, "user_properties", ()):
                if name == BUG and outcome in ("passed", "failed"):
                    bugs[outcome] += 1
                if name == PROPERTY and getattr(item, "when", "") == "call":
                    run.add(ItemRecord.from_json(value))
    return run, bugs


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a session in which nothing failed because nothing, or not everything, was judged."""
    terminalreporter = session.config.pluginmanager.get_plugin("terminalreporter")
    is_worker = hasattr(session.config, "workerinput")
    if exitstatus == pytest.ExitCode.OK and terminalreporter is not None and not is_worker:
        gaps = _gaps(_reported(terminalreporter)[0], session.config.stash[ORACLE])
        session.exitstatus = pytest.ExitCode.TESTS_FAILED if gaps else exitstatus


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run, bugs = _reported(terminalreporter)
    verbose, oracle = config.get_verbosity() > 0, config.stash[ORACLE]
    seconds = time.monotonic() - config.stash[STARTED]
    run.failures += [_died(oracle, file) for file in cases_of_dead_processes(oracle.save_dir, time.time() - seconds)]
    if run.items or run.failures:
        terminalreporter.section("oracle")
        left_out = oracle.subject.not_judged(oracle.device)
        if not config.getoption("--oracle-replay"):
            saved = [file.stem for file, misfit in _corpus(oracle.subject, oracle.device) if misfit is not None]
            if saved:
                names = f": {', '.join(saved)}" if verbose else " (-v names them)"
                left_out.append(f"{len(saved)} saved cases{names}")
        is_ours = oracle.layer_spec is None or verbose
        switches = oracle.subject.switches if is_ours else NO_SWITCHES
        if run.failures:
            terminalreporter.write_line(f"{summary.stories(run.failures, verbose)}\n")
        terminalreporter.write_line(summary.summary(run.verdict, run.failures, seconds, switches, left_out, verbose))
        for gap in _gaps(run, oracle):
            terminalreporter.write_line(gap, red=True)
    if bugs:
        terminalreporter.write_line(summary.bugs_line(bugs["passed"], bugs.total()))


def _gaps(run: RunRecord, oracle: Oracle) -> list[str]:
    """What the run did not judge. With a backend of its own as well, it may judge that one's metadata alone."""
    return run.gaps(oracle.layer_spec if oracle.backend_spec is None else None)


def _died(oracle: Oracle, file: Path) -> FailureRecord:
    """The record of a case that killed the process that judged it."""
    command, sentence = oracle.replay_command(Exploration(saved=file)), "the process died while it judged a case"
    return FailureRecord("died", "process", sentence, command, f"ORACLE FAILURE  {sentence}\n\nreplay: {command}")
