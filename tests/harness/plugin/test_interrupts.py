"""Ctrl-C and SIGTERM: what was found so far is reported, and no case that was being judged is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.pytest_runs import Run, environment, pytest_command

BACKENDS = """
import time
from nsa_oracle.reference.multi_step import MultiStepBackend

class Broken(MultiStepBackend):
    def init_forward_metadata_replay_cuda_graph(self, forward_batch, bs):
        time.sleep(0.2)  # so that shrinking takes long

class Slow(MultiStepBackend):
    def init_forward_metadata(self, forward_batch):
        time.sleep(0.2)
        super().init_forward_metadata(forward_batch)
"""
TESTS = """
from nsa_oracle.harness import judged

@judged(backend="slow:{backend}", profile="dev", cases=["metadata"])
def test_judged():
    pass
"""


BY_FIXTURE = """
def test_by_fixture(oracle):
    oracle.judge(backend="slow:{backend}", profile="dev", cases=["metadata"])
"""
OTHER = """
import pathlib, time

def test_other():
    pathlib.Path("failures").mkdir()
    pathlib.Path("failures/begun").touch()
    time.sleep(60)
"""


def interrupted(folder: Path, backend: str, sent: signal.Signals, until: str, *words: str, tests: str = TESTS) -> Run:
    """A run that gets a signal, as from a terminal or from ``kill``, once there is a file like ``until``.

    tests: of a module; others than TESTS run without an option of the oracle.
    """
    (folder / "slow.py").write_text(BACKENDS, encoding="utf-8")
    (folder / "test_slow.py").write_text(tests.format(backend=backend), encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\npythonpath = .\noracle_device = cpu\n", encoding="utf-8")
    command = [word for word in pytest_command(*words) if tests == TESTS or not word.startswith("--oracle-")]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    while not list((folder / "failures").glob(until)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    if sent is signal.SIGINT:
        os.killpg(process.pid, sent)
    else:
        process.send_signal(sent)
    output, errors = process.communicate(timeout=120)
    return Run(process.returncode, output, errors)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"])
@pytest.mark.parametrize("processes", ["0", "2"])
def test_while_a_failure_is_shrunk(tmp_path: Path, sent: signal.Signals, code: int, processes: str) -> None:
    # -v lists the commands of all cases of one story.
    done = interrupted(tmp_path, "Broken", sent, "*.min.json", "-v", "-n", processes)
    assert done.exit_code == code, done.output + done.errors
    assert re.search(r"^oracle: [\d,]+ of 48 cases, .* finding", done.output, re.MULTILINE), done.output
    files = sorted((tmp_path / "failures").iterdir())
    assert done.failures
    assert "ORACLE FAILURE  " in done.output
    for file in files:
        assert not file.name.endswith(".running.json")
        if file.name.endswith(".min.json"):
            assert f"replay failures/{file.name} --device cpu --backend slow:Broken" in done.output
    assert "Traceback" not in done.output + done.errors


def test_before_anything_was_found(tmp_path: Path) -> None:
    done = interrupted(tmp_path, "Slow", signal.SIGINT, "*.running.json", "-n", "0")
    assert done.exit_code == 130, done.output + done.errors
    assert re.search(r"^oracle: \d+ of 48 cases, .* no finding after", done.output, re.MULTILINE), done.output
    assert not list(tmp_path.glob("failures/*"))


@pytest.mark.parametrize("processes", ["0", "2"])
def test_by_fixture(tmp_path: Path, processes: str) -> None:
    """The process that a signal reaches is told by a worker that its tests take the fixture."""
    done = interrupted(tmp_path, "Slow", signal.SIGTERM, "*.running.json", "-n", processes, tests=BY_FIXTURE)
    assert done.exit_code == 143, done.output + done.errors
    assert re.search(r"^oracle: \d+ cases, .* no finding after", done.output, re.MULTILINE), done.output
    assert not list(tmp_path.glob("failures/*"))


@pytest.mark.parametrize("processes", ["0", "2"])
def test_runs_that_do_not_use_the_oracle_end_as_pytest_does(tmp_path: Path, processes: str) -> None:
    done = interrupted(tmp_path, "", signal.SIGINT, "begun", "-n", processes, tests=OTHER)
    assert done.exit_code == pytest.ExitCode.INTERRUPTED, done.output + done.errors
    assert "oracle: " not in done.output
