"""Runs on two workers of this machine: one is killed in the middle, and the counts add up."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nsa_oracle.harness.cluster import pool as pool_module
from nsa_oracle.harness.cluster.exploring import Exploring
from nsa_oracle.harness.cluster.pool import connected
from nsa_oracle.harness.cluster.state import FILE, read_state
from nsa_oracle.harness.cluster.work import ClusterTask
from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.judge import Verdict, judge_subject
from nsa_oracle.harness.scenarios.files import load
from nsa_oracle.harness.search.spec import SubjectSpec
from nsa_oracle.harness.search.stream import CaseStream
from nsa_oracle.harness.subjects.subject import optimized_subject
from tests.support.command_line import FAILS, PASSES, assert_one_line_error, harness

distributed = pytest.importorskip("distributed", reason="dask's distributed is not installed")
dask = pytest.importorskip("dask")
CASES = 20


@pytest.fixture
def process_settings() -> None:
    """Kernels of this process run on the CPU: it judges the same cases by itself."""
    if torch.cuda.is_available():
        pytest.skip("this process runs kernels on a GPU, and the cases are those of a CPU")


def test_a_killed_worker_costs_no_case(tmp_path: Path, process_settings: None) -> None:
    alone = Verdict()
    subject, cpu = optimized_subject(), torch.device("cpu")
    for drawn in CaseStream(subject.scale(cpu, with_layer=False), subject.switches, 5).cases(range(CASES)):
        judge_subject(subject, drawn.scenario, cpu, alone)

    with connected("local", 2, gpu=False) as (pool, _):
        run = Exploring(ClusterTask(SubjectSpec(), "cpu", 5), pool, CASES, 0, tmp_path)
        killed: list[int] = []

        def kill_one() -> None:
            if not killed and run.judged:
                (process, *_) = pool._client.run(os.getpid).values()
                killed.append(process)
                os.kill(process, signal.SIGKILL)

        run.run(report=kill_one)
    assert killed
    assert run.found == []
    assert (run.verdict.cases, run.verdict.replays, run.verdict.eager_calls) == (
        CASES,
        alone.replays,
        alone.eager_calls,
    )
    assert run.verdict.boundary_classes == alone.boundary_classes


def test_a_scheduler_that_nobody_answers_at_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_oracle.harness.cluster.pool._SECONDS_TO_CONNECT", 0.5)
    with (
        pytest.raises(BackendError, match=r"--scheduler tcp://127\.0\.0\.1:9"),
        connected("tcp://127.0.0.1:9", 1, None),
    ):
        pass


def test_a_module_that_a_worker_cannot_import_is_one_line_that_names_the_worker(tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("from nsa_oracle.reference.multi_step import MultiStepBackend as Mine\n")
    settings = {"distributed.worker.daemon": False}
    with (
        dask.config.set(settings),
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
    ):
        (worker,) = cluster.workers.values()
        words = ("explore", "--scheduler", cluster.scheduler_address, "--device", "cpu", "--cases", "1")
        done = harness(*words, "--backend", "only_here:Mine", cwd=tmp_path)
        assert_one_line_error(
            done,
            "error: backend 'only_here:Mine': cannot import only_here: No module named 'only_here'; ",
            f"(on worker 0, {worker.worker_address}; start workers where it can be imported)",
        )


@pytest.mark.parametrize("who", ["the scheduler", "worker tcp://one"])
def test_a_cluster_without_the_oracle_is_one_line(who: str) -> None:
    missing = ModuleNotFoundError("No module named 'nsa_oracle'")

    class Cluster:
        def run_on_scheduler(self, function: Callable[..., object], name: str) -> object:
            if who == "the scheduler":
                raise missing
            return function(name)

        def run(self, function: Callable[..., object], name: str, on_error: str) -> dict[str, object]:
            assert on_error == "return"
            return {"tcp://other": function(name), "tcp://one": missing}

    said = (
        rf"^--scheduler here: {who} cannot import nsa_oracle as this process does: No module named 'nsa_oracle'; start"
    )
    with pytest.raises(BackendError, match=said):
        pool_module._check_environments(Cluster(), "here")


def test_the_command_tells_a_finding_once(tmp_path: Path) -> None:
    words = ("explore", "--workers", "1", "--device", "cpu", "--cases", "8", "--layer-cases", "0")
    done = harness(*words, "--save", str(tmp_path), "--backend", "docs.examples.my_backend:MyBrokenBackend")
    assert done.returncode == FAILS, done.stdout + done.stderr
    assert done.stdout.count("ORACLE FAILURE") == 1
    assert "8 of 8 cases" in done.stdout
    (smallest,) = tmp_path.glob("*.min.json")
    assert f"replay {smallest}" in done.stdout
    assert "wrong value" in load(smallest).note
    assert_one_line_error(harness(*words, "--save", str(tmp_path)), "--resume", "--save")
    assert_one_line_error(harness(*words, "--save", str(tmp_path), "--resume"), "had --backend docs.examples")


def test_a_run_goes_on_where_another_ended(tmp_path: Path) -> None:
    words = ("explore", "--workers", "1", "--device", "cpu", "--layer-cases", "0")
    done = harness(*words, "--cases", "2", cwd=tmp_path)
    assert done.returncode == PASSES, done.stdout + done.stderr
    assert "2 of 2 cases" in done.stdout
    more = harness(*words, "--cases", "3", "--resume", cwd=tmp_path)
    assert more.returncode == PASSES, more.stdout + more.stderr
    assert "3 of 3 cases" in more.stdout
    assert read_state(tmp_path / "failures" / FILE).cases == 3


def test_a_layer_that_no_case_has_is_not_green(tmp_path: Path) -> None:
    words = ("explore", "--workers", "1", "--device", "cpu", "--cases", "1", "--layer-cases", "0")
    done = harness(*words, "--layer", "tests.support.layers.topk_alone:Right", cwd=tmp_path)
    assert done.returncode == FAILS, done.stdout + done.stderr
    assert "NOT JUDGED: layer 'tests.support.layers.topk_alone:Right': no case of this run has a layer" in done.stdout
