"""The plugin in somebody else's repository, which has packages named like the parts of this project."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.support.project import PROJECT
from tests.support.pytest_runs import Run
from tests.support.wheels import python

BACKENDS = """
from nsa_oracle.reference.multi_step import MultiStepBackend

class Good(MultiStepBackend):
    sizes = {"num_draft_tokens": (1,)}

class Broken(Good):
    def init_forward_metadata_replay_cuda_graph(self, forward_batch, bs):
        pass

class Dies(Good):
    def init_forward_metadata(self, forward_batch):
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
"""
TESTS = """
import os, sys
from attn.backend import Broken, Good
from nsa_oracle.harness import judged

@judged(backend=Good, profile="dev", cases=["saved", "metadata"])
def test_good():
    pass

@judged(backend=Broken, profile="dev")
def test_broken():
    pass

def test_by_fixture(oracle):
    oracle.judge(backend="attn.backend:Good", cases=["saved"])

def test_broken_by_fixture(oracle):
    oracle.judge(backend=Broken, cases=["saved"])

def test_process_that_dies(oracle):
    oracle.judge(backend="attn.backend:Dies", cases=["saved"])

def test_passes():
    assert "TRITON_INTERPRET" not in os.environ

def test_local_class(oracle):
    class Local(Good):
        pass
    oracle.judge(backend=Local)
"""
OTHERS = """
import os, sys

def test_nothing_is_changed():
    import harness, reference
    assert "site-packages" not in harness.__file__ and not hasattr(harness, "judge")
    assert "TRITON_INTERPRET" not in os.environ
    loaded = {name for name in sys.modules if name.partition(".")[0] in ("torch", "triton", "hypothesis", "nsa_oracle")}
    ours = {f"nsa_oracle.{name}" for name in ("caught", "plugin_options", "pytest_plugin", "starting")} | {"nsa_oracle"}
    assert loaded - ours == set()
"""
SETTINGS = """
[tool.pytest.ini_options]
testpaths = ["tests"]
pythonpath = ["."]
addopts = "--strict-markers --strict-config"
filterwarnings = ["error"]
oracle_device = "cpu"
oracle_save = "found"
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for package in ("attn", "harness", "reference"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "attn" / "backend.py").write_text(BACKENDS, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(SETTINGS, encoding="utf-8")
    (tmp_path / "tests" / "cases").mkdir(parents=True)
    shutil.copy(PROJECT / "tests/cases/stale-host-mirror-is-not-read.json", tmp_path / "tests/cases/theirs.json")
    shutil.copy(PROJECT / "tests/cases/draft-extend-tail-is-written.json", tmp_path / "tests/cases/other.json")
    (tmp_path / "tests" / "test_attn.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "tests" / "test_others.py").write_text(OTHERS, encoding="utf-8")
    return tmp_path


def theirs(site: Path, repository: Path, *words: str) -> Run:
    """Their test suite, with the plugin as pip installs it: nothing names it."""
    done = python(site, repository, "-m", "pytest", "-p", "no:benchmark", *words)
    return Run(done.returncode, done.stdout, done.stderr)


def test_tests_that_do_not_use_it_are_left_alone(site: Path, repository: Path) -> None:
    done = theirs(site, repository, "tests/test_others.py")
    assert done.exit_code == pytest.ExitCode.OK, done.output
    assert "oracle:" not in done.output


def test_passing_backend(site: Path, repository: Path) -> None:
    done = theirs(site, repository, "-v", "-k", "good or by_fixture and not broken")
    assert done.exit_code == pytest.ExitCode.OK, done.output
    passed = re.findall(r"test_attn\.py::(\S+) PASSED", done.output)
    assert passed == ["test_good[saved-theirs]", *(f"test_good[metadata-{n}]" for n in range(8)), "test_by_fixture"]
    assert "test_good[saved-other] SKIPPED" in done.output, "its number of draft tokens is not declared"
    assert "oracle: attn.backend:Good" in done.output or "= oracle =" in done.output
    assert done.summary == f"oracle: {done.totals[0]} cases passed, {done.totals[1]} replays, all bit-exact"
    assert done.totals[0] == 1 + 48 + 1
    assert "1 saved case" in done.output
    assert not (repository / "found").exists()


@pytest.mark.parametrize("processes", [(), ("-n", "2")])
def test_broken_backend(site: Path, repository: Path, processes: tuple[str, ...]) -> None:
    done = theirs(site, repository, "-k", "broken", *processes)
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED
    assert "Traceback" not in done.output
    files = sorted((repository / "found").glob("*.min.json"))
    assert files
    command = re.findall(r"^replay: (.*)$", done.output, re.MULTILINE)[0].split()
    assert command[-2:] == ["--backend", "attn.backend:Broken"]
    again = python(site, repository, *command[1:])
    assert again.returncode == 1, again.stdout + again.stderr
    note = json.loads((repository / command[4]).read_text(encoding="utf-8"))["note"]
    assert f"ORACLE FAILURE  {note}" in again.stdout


def test_process_that_dies_fails_its_test_alone(site: Path, repository: Path) -> None:
    done = theirs(site, repository, "-k", "dies or passes")
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED
    assert "1 failed, 1 passed" in done.output
    assert "attn.backend:Dies" in done.output
    assert "Traceback" not in done.output


def test_object_without_a_name_is_refused(site: Path, repository: Path) -> None:
    done = theirs(site, repository, "-k", "local")
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED
    assert "define it at the top of a module" in done.output


def test_shipped_test_module(site: Path, repository: Path) -> None:
    words = ["--pyargs", "nsa_oracle.harness.suite", "--oracle-backend", "attn.backend:Good", "--oracle-profile", "dev"]
    done = theirs(site, repository, *words, "-k", "scenarios and (0 or 1)")
    assert done.exit_code == pytest.ExitCode.OK, done.output
    assert done.totals[0] == 2 * 48 // 8
    assert "judging attn.backend:Good on cpu, profile dev, seed 0" in done.output


def test_option_that_cannot_be_used_is_one_line(site: Path, repository: Path) -> None:
    done = theirs(site, repository, "--oracle-backend", "attn.backend:Absent")
    assert done.exit_code == pytest.ExitCode.USAGE_ERROR
    (line,) = (line for line in done.errors.splitlines() if line.startswith("ERROR"))
    assert "attn.backend" in line
    assert "Absent" in line
    assert "Traceback" not in done.errors
