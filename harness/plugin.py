"""The pytest plugin: ``--oracle-*`` options, the ``oracle`` and ``device`` fixtures, and the table that ends a run."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
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
from nsa_oracle.harness.checks.tally import LayerTally, StageTally, Tally
from nsa_oracle.harness.errors import BackendError, ScenarioError
from nsa_oracle.harness.graphs.audit import AuditTally
from nsa_oracle.harness.judge import Verdict
from nsa_oracle.harness.report import failure, summary
from nsa_oracle.harness.scenarios.files import cases_of_dead_processes, corpus, load
from nsa_oracle.harness.search.drawing import PROFILES, SHARDS
from nsa_oracle.harness.search.explore import Exploration
from nsa_oracle.harness.search.recovery import Recovery, SubjectSpec
from nsa_oracle.harness.subjects.subject import Subject

ENTROPY = "oracle_entropy"
BUG = "oracle_bug"  # of a test report: the planted bug that its item had to kill
PROPERTY = "oracle"  # of a test report: what its item covered, so that it survives the way from an xdist worker


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("oracle", "correctness oracle for multi-step attention backends")
    group.addoption(
        "--oracle-profile",
        choices=sorted(PROFILES),
        default="pr",
        help="how much to explore: "
        + ", ".join(f"{name} {profile.cases} cases" for name, profile in PROFILES.items())
        + "; nightly draws new ones every time (default: pr)",
    )
    group.addoption(
        "--oracle-device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the backend runs: cuda uses real CUDA graphs, cpu Triton's interpreter and a simulated graph "
        "(default: auto, cuda if there is one)",
    )
    group.addoption(
        "--oracle-backend",
        metavar="MODULE:ATTRIBUTE",
        help="judge what this callable builds from (config, req_to_token) instead of optimized/",
    )
    group.addoption(
        "--oracle-layer",
        metavar="MODULE:ATTRIBUTE",
        help="judge the attention layer, or single stages of it, that this callable builds from (config, attention)",
    )
    group.addoption(
        "--oracle-replay",
        metavar="FILE",
        action="append",
        default=[],
        help="judge only this saved case; may be given several times",
    )
    group.addoption(
        "--oracle-save", metavar="DIR", default="failures", help="where failing cases are saved (default: failures)"
    )
    group.addoption(
        "--oracle-budget",
        metavar="SECONDS",
        type=_seconds,
        help="stop exploring after this long; what was found by then is still shrunk and reported",
    )


def _seconds(text: str) -> float:
    """A number of seconds from the command line."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds, 0 or more")
    return seconds


@dataclass
class Oracle:
    """One session's settings, and the ways to judge with them."""

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
        """Judges here, and elsewhere once this process has lost its GPU."""
        return Recovery(SubjectSpec(self.backend_spec, self.layer_spec), self.subject, self.device)

    def judge_file(self, path: Path) -> Exploration:
        """Judge one saved case as it is, without shrinking."""
        outcome = self.recovery.judge(load(path))
        outcome.saved = path
        return outcome

    def explore(self, shard: int, with_layer: bool = False) -> Exploration:
        """Judge the part of the profile's cases that falls to this shard."""
        profile = PROFILES[self.profile]
        return self.recovery.explore(
            (profile.layer_cases if with_layer else profile.cases) // SHARDS,
            self.entropy + shard,
            self.save_dir,
            self.deadline,
            with_layer=with_layer,
        )

    def told(self, outcome: Exploration) -> str | None:
        """The report of a failed outcome, or None."""
        if outcome.failure is None:
            return None
        text = failure.explain(outcome.failure, outcome.saved, self.replay_command(outcome), outcome.unsaved)
        note = "NOT REPRODUCIBLE: the case failed once and passed when repeated (a race?); this is the raw case.\n"
        lost = "THE GPU FAULTED: what is left of this process's cases is judged in a process of its own.\n"
        return (note if outcome.flaky else "") + (lost if outcome.lost else "") + text

    def replay_command(self, outcome: Exploration) -> str:
        saved = outcome.saved or Path("CASE.json")
        return failure.replay_command(saved, self.backend_spec, self.device.type, self.layer_spec)


def pytest_configure(config: pytest.Config) -> None:
    """Fix how kernels run before anything imports Triton, and refuse unusable options in one line."""
    share_gpus(config)
    wanted = config.getoption("--oracle-device")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--oracle-device cuda: torch sees no CUDA device here; use cpu or auto")
    device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
    processes.prepare_process(device.type)
    try:
        spec, layer_spec = config.getoption("--oracle-backend"), config.getoption("--oracle-layer")
        subject = Subject.load(spec, layer_spec, device)
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
    """Workers of pytest-xdist, which are gw0, gw1, ..., take a GPU each. Their controller leaves them all to them."""
    worker: dict[str, str] | None = getattr(config, "workerinput", None)
    if worker is not None:
        processes.take_gpu(int(worker["workerid"].removeprefix("gw")))


def _writable_folder(name: str) -> Path:
    """The folder ``name``, which need not exist. Raises ValueError where nothing could be saved in it."""
    folder = Path(name)
    try:
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    except OSError as error:
        raise ValueError(f"--oracle-save {name}: {error.strerror}") from None
    if not there.is_dir():
        raise ValueError(f"--oracle-save {name}: {there} is a file; name a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--oracle-save {name}: nothing can be written in {there}; name another directory")
    return folder


def _entropy(config: pytest.Config, fresh: bool) -> int:
    """Where this session's cases are drawn from; workers of pytest-xdist take the controller's."""
    worker_input = getattr(config, "workerinput", {})
    if ENTROPY in worker_input:
        return int(worker_input[ENTROPY])
    return int.from_bytes(os.urandom(6), "big") if fresh else 0


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist where to draw its cases from."""
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
    """A function that fails the test with the oracle's report, and counts what it covered, whatever the outcome."""

    def conclude(outcome: Exploration) -> None:
        text = oracle.told(outcome)
        request.node.user_properties.append((PROPERTY, _as_property(oracle, outcome)))
        if text is not None:
            pytest.fail(text, pytrace=False)

    return conclude


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each oracle test its items: saved cases first, then the shards of the exploration."""
    replayed = [Path(file) for file in metafunc.config.getoption("--oracle-replay")]
    if "saved_case" in metafunc.fixturenames:
        oracle = metafunc.config.stash[ORACLE]
        saved = _corpus(oracle.subject, oracle.device)
        files = replayed or [file for file, misfit in saved if misfit is None]
        metafunc.parametrize("saved_case", files, ids=[file.stem for file in files])
    if "shard" in metafunc.fixturenames:
        metafunc.parametrize("shard", range(SHARDS))


def _corpus(subject: Subject, device: torch.device) -> list[tuple[Path, str | None]]:
    """The saved cases, and why one is not for ``subject``."""
    try:
        saved = [(file, load(file)) for file in corpus(device)]
        for file, scenario in saved:
            subject.check_switches(scenario, file)
        return [(file, subject.misfit(scenario)) for file, scenario in saved]
    except ScenarioError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The corpus runs first; with ``--oracle-replay`` nothing else runs."""
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
    """What cannot be judged is one line."""
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    verdict, failures, judged = Verdict(), [], False
    bugs: Counter[str] = Counter()
    for outcome, reports in terminalreporter.stats.items():
        for item in reports:
            for name, value in getattr(item, "user_properties", ()):
                if name == BUG and outcome in ("passed", "failed"):
                    bugs[outcome] += 1
                if name == PROPERTY and getattr(item, "when", "") == "call":
                    failures += _add_property(verdict, value)
                    judged = True
    oracle = config.stash[ORACLE]
    seconds = time.monotonic() - config.stash[STARTED]
    failures += [_died(oracle, file) for file in cases_of_dead_processes(oracle.save_dir, time.time() - seconds)]
    if judged or failures:
        terminalreporter.section("oracle")
        left_out = oracle.subject.not_judged(oracle.device)
        if not config.getoption("--oracle-replay"):
            saved = [file.stem for file, misfit in _corpus(oracle.subject, oracle.device) if misfit is not None]
            left_out += [f"saved cases {', '.join(saved)}"] if saved else []
        terminalreporter.write_line(summary.summary(verdict, failures, seconds, oracle.subject.switches, left_out))
    if bugs:
        terminalreporter.write_line(summary.bugs_line(bugs["passed"], bugs.total()))


def _died(oracle: Oracle, file: Path) -> dict[str, str]:
    """The failure of a case that took down the process that judged it."""
    command = oracle.replay_command(Exploration(saved=file))
    return {"sentence": "the process died while it judged a case", "command": command, "optimizations": ""}


def _as_property(oracle: Oracle, outcome: Exploration) -> str:
    verdict = outcome.verdict
    failures = []
    if outcome.failure is not None:
        failures.append(
            {
                "sentence": outcome.failure.finding.sentence(),
                "command": oracle.replay_command(outcome),
                "optimizations": " ".join(outcome.failure.scenario.optimizations),
            }
        )
    counts = [verdict.cases, verdict.replays, verdict.eager_calls, verdict.tally.fields, verdict.tally.cells]
    layers = dataclasses.asdict(verdict.layers)
    data = {"counts": counts, "classes": verdict.boundary_classes, "layers": layers, "failures": failures}
    return json.dumps(data | {"audit": dataclasses.asdict(verdict.audit)})


def _add_property(verdict: Verdict, value: str) -> list[dict[str, str]]:
    """Add one item's coverage to ``verdict``; return its failures."""
    data = json.loads(value)
    cases, replays, eager_calls, compared, cells = data["counts"]
    layers = data["layers"]
    stages = {name: StageTally(**tally) for name, tally in layers["stages"].items()}
    tally = LayerTally(stages, layers["relations"], layers["replays"], layers["selections"], layers["keys"])
    audit = AuditTally(**data["audit"])
    verdict.add(Verdict(cases, replays, eager_calls, Tally(compared, cells), tally, audit, Counter(data["classes"])))
    found: list[dict[str, str]] = data["failures"]
    return found
