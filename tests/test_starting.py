"""A signal while torch is imported, or while a backend is loaded, ends a process in one line."""

from __future__ import annotations

import argparse
import builtins
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch

from nsa_oracle import plugin_options
from nsa_oracle.starting import MESSAGE
from tests.support.command_line import environment_of_children, run, saved
from tests.support.metadata_cases import DECODE, one_replay
from tests.support.pytest_runs import environment

SLEEPS = """
import pathlib, time
pathlib.Path("started").touch()
while True:
    try:
        time.sleep(60)
    except Exception:  # as modules do that try what there is
        pass
"""
SWALLOWS = """
import pathlib, time
pathlib.Path("started").touch()
while not pathlib.Path("sent").exists():
    try:
        time.sleep(0.05)
    except KeyboardInterrupt:  # as a library may, or make an ImportError of it
        pass
"""
SIGNALS = pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"])


def ended(folder: Path, sent: signal.Signals, *words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a process that gets a signal once there is a file "started"."""
    inherited = environment() if words[0] == "pytest" else environment_of_children()
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=folder,
        env={**inherited, "PYTHONPATH": os.pathsep.join([str(folder), inherited["PYTHONPATH"]])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    while not (folder / "started").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, sent)
    (folder / "sent").touch()
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


@SIGNALS
@pytest.mark.parametrize("words", [("nsa_oracle", "show", "x"), ("pytest", "-p", "nsa_oracle.pytest_plugin")])
def test_while_torch_is_imported(words: tuple[str, ...], sent: signal.Signals, code: int, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(SLEEPS, encoding="utf-8")
    options = ("--oracle-profile=dev",) if words[0] == "pytest" else ()
    assert ended(tmp_path, sent, *words, *options) == (code, "", MESSAGE)


@SIGNALS
@pytest.mark.parametrize("in_process", ["false", "true"])
def test_while_a_backend_is_loaded_by_pytest(sent: signal.Signals, code: int, in_process: str, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLEEPS, encoding="utf-8")
    words = ("-p", "nsa_oracle.pytest_plugin", "--oracle-backend=slow:X", "-o", f"oracle_in_process={in_process}")
    assert ended(tmp_path, sent, "pytest", *words, "--oracle-device=cpu") == (code, "", MESSAGE)


@SIGNALS
@pytest.mark.parametrize("command", [("replay", "case.json"), ("survey",)], ids=lambda words: words[0])
def test_while_a_backend_is_loaded_by_a_command(
    sent: signal.Signals, code: int, command: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLEEPS, encoding="utf-8")
    saved(tmp_path, one_replay(DECODE))
    words = (*command, "--backend", "slow:X", "--device", "cpu")
    assert ended(tmp_path, sent, "nsa_oracle", *words) == (code, "", MESSAGE)


@pytest.mark.parametrize("imports", ["from nsa_oracle.harness import judged", "import pytest"])
def test_a_ctrl_c_that_an_import_swallows_ends_the_collection(imports: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(SWALLOWS, encoding="utf-8")
    test = f"{imports}\nimport pytest\n\n@pytest.mark.oracle(profile='smoke')\ndef test_marked(): pass\n"
    (tmp_path / "test_marked.py").write_text(test, encoding="utf-8")
    code, output, errors = ended(tmp_path, signal.SIGINT, "pytest", "-p", "nsa_oracle.pytest_plugin", "-q")
    assert code == pytest.ExitCode.INTERRUPTED, output
    assert [line for line in output.splitlines() if line.endswith(": KeyboardInterrupt")]
    assert "Traceback" not in output + errors
    assert errors == ""


IN_A_COLLECTION = """
import ctypes, gc, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # as before nohup
import nsa_oracle.harness.signals

interrupt = ctypes.pythonapi.PyErr_SetInterrupt  # as a signal does that arrives in native code
interrupt.argtypes = [ctypes.py_object, ctypes.py_object]
gc.collect()  # nothing that has a finaliser is left
gc.callbacks.insert(0, interrupt)
try:
    gc.collect()
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
finally:
    gc.callbacks.remove(interrupt)
"""


def test_a_ctrl_c_while_garbage_is_collected_is_not_lost() -> None:
    done = run(sys.executable, "-c", IN_A_COLLECTION)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


TOO_MANY = r"too many open files: this process may have \d+; raise that, as by ulimit -n 1024"


def test_a_command_that_may_open_too_few_files_says_so(tmp_path: Path) -> None:
    saved(tmp_path, one_replay(DECODE))
    command = ["sh", "-c", f"ulimit -n 9; exec {sys.executable} -m nsa_oracle replay case.json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment_of_children(), capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    warned, line = re.fullmatch("(?s)(.*?)(error: .*\n)", done.stderr).groups()  # type: ignore[union-attr]
    assert re.fullmatch(f"error: {TOO_MANY}\n", line), done.stderr
    assert not warned or torch.version.cuda, done.stderr  # which cannot open the GPU either, and says so


def test_an_option_of_pytest_that_may_open_too_few_files_says_so() -> None:
    full = Mock(side_effect=OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    with (
        pytest.raises(argparse.ArgumentTypeError, match=TOO_MANY),
        patch.object(builtins, "__import__", full),
    ):
        plugin_options._profile("smoke")


@pytest.mark.parametrize("option", ["--oracle-profile=smoke", "--oracle-shard=1/2", "--oracle-device=cpu"])
@pytest.mark.parametrize("most", [6, 11])
def test_a_run_of_pytest_that_may_open_too_few_files_says_so(option: str, most: int, tmp_path: Path) -> None:
    words = f"-m pytest -p nsa_oracle.pytest_plugin {option}"
    command = ["sh", "-c", f"ulimit -n {most}; exec {sys.executable} {words}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert len(re.findall(TOO_MANY, done.stderr)) == 1, done.stderr
    assert "Traceback" not in done.stderr


OPENS_NOTHING = """
import resource
before = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
try:
    {line}
finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
"""


def test_a_module_that_imports_the_oracle_and_may_open_no_file_says_so(tmp_path: Path) -> None:
    text = OPENS_NOTHING.format(line="from nsa_oracle.harness import judge")
    (tmp_path / "test_it.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "nsa_oracle.pytest_plugin"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert re.search(f"^{TOO_MANY}$", done.stdout, re.MULTILINE), done.stdout
    assert "OSError" not in done.stdout


def test_a_test_that_uses_the_oracle_and_may_open_no_file_says_so(tmp_path: Path) -> None:
    """Its limit holds while its items are made, or its fixture."""
    limit = OPENS_NOTHING.format(line="yield").replace("\n", "\n    ")
    conftest = f"import pytest\n\n@pytest.hookimpl(wrapper=True, tryfirst=True)\ndef {{hook}}:{limit}\n"
    uses = {
        "pytest_generate_tests()": "@pytest.mark.oracle(profile='smoke')\ndef test_marked(): pass\n",
        "pytest_fixture_setup()": "def test_fixture(oracle): pass\n",
    }
    for hook, text in uses.items():
        (tmp_path / "conftest.py").write_text(conftest.format(hook=hook), encoding="utf-8")
        (tmp_path / "test_it.py").write_text(f"import pytest\n\n{text}", encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-p", "nsa_oracle.pytest_plugin"]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert done.returncode in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.TESTS_FAILED), done.stdout
        assert re.search(f"^{TOO_MANY}$", done.stdout, re.MULTILINE), done.stdout
        assert "OSError" not in done.stdout
