"""The command that replays a failure can be pasted as it is."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_oracle.harness.report.failure import replay_command

CASE = Path("tests/cases/layer-one-key.json")


def test_it_names_the_folder_that_only_this_process_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "beside_a_test.py").write_text("")
    package = tmp_path / "a_package_of_tests"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for module in ("beside_a_test", "a_package_of_tests.backends"):
        line = replay_command([CASE], f"{module}:Mine", "cpu")
        assert line.startswith(f"PYTHONPATH={tmp_path} ")
    monkeypatch.chdir(tmp_path.parent)
    assert replay_command([CASE], "beside_a_test:Mine", "cpu").startswith(f"PYTHONPATH={tmp_path.name} ")
    monkeypatch.chdir(tmp_path)
    assert not replay_command([CASE], "beside_a_test:Mine", "cpu").startswith("PYTHONPATH")


def test_it_keeps_the_folders_that_the_shell_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "/of/the/shell")
    (tmp_path / "beside_another_test.py").write_text("")
    line = replay_command([CASE], "beside_another_test:Mine", "cpu")
    assert line.startswith(f"PYTHONPATH={tmp_path}:/of/the/shell ")


def test_it_names_no_folder_that_every_process_searches() -> None:
    for spec in ("nsa_oracle.reference.multi_step:MultiStepBackend", "json:loads", "no_such_module:Mine", None):
        assert not replay_command([CASE], spec, "cpu").startswith("PYTHONPATH")


def test_the_line_of_a_backend_in_a_test_module_works_as_it_is(tmp_path: Path) -> None:
    tests = tmp_path / "in here"
    tests.mkdir()
    (tests / "test_here.py").write_text(
        "from nsa_oracle import harness as oracle\n"
        "from nsa_oracle.reference.multi_step import MultiStepBackend\n\n\n"
        "class Wrong(MultiStepBackend):\n"
        "    def init_forward_metadata(self, batch):\n"
        "        super().init_forward_metadata(batch)\n"
        "        for step in self.attn_backends:\n"
        "            step.forward_metadata.cache_seqlens_int32.add_(1)\n\n\n"
        "@oracle.judged(backend=Wrong, profile='smoke')\n"
        "def test_it():\n"
        "    pass\n"
    )
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *("-p", "no:cacheprovider", "-p", "nsa_oracle.pytest_plugin"),  # which need not be installed
        "-x",
        "--rootdir",
        str(tmp_path),
        "in here",
    ]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # the package need not be installed
    run = functools.partial(subprocess.run, cwd=tmp_path, env=here, capture_output=True, text=True)
    done = run(words)
    line = next(line for line in done.stdout.splitlines() if line.startswith("replay: "))
    again = run(line.removeprefix("replay: "), shell=True)
    assert again.returncode == 1, again.stderr
    assert "ORACLE FAILURE  wrong value: cache_seqlens_int32" in again.stdout
