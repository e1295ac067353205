"""What judged code does to its process is a finding; what a user does to it ends the run."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.interruptions import ProcessExit, exits_refused, interruptions_noted
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.signals import Termination
from tests.support.backends import crashes, process
from tests.support.backends.clean import Clean
from tests.support.command_line import FAILS, PASSES, assert_one_line_error, harness, replay, saved
from tests.support.metadata_cases import DECODE, factory_of, one_replay

CPU = torch.device("cpu")


def failure_of(backend: Any) -> OracleFailure:
    with pytest.raises(OracleFailure) as caught:
        judge(one_replay(DECODE), factory_of(backend), CPU)
    return caught.value


@pytest.mark.parametrize("backend", [crashes.Exits, crashes.ExitsAndGoesOn])
def test_an_end_of_the_process_is_a_finding(backend: Any) -> None:
    finding = failure_of(backend).finding
    assert (finding.kind, finding.field) == (Kind.CRASH, "ProcessExit")
    assert finding.got == "os._exit(0), which ends the process"
    assert "crashes.py" in finding.place
    assert "in refresh" in finding.place


def judged_without_files(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge in a process whose last file is opened behind the first run."""
    refused = Mock(side_effect=OSError(errno.EMFILE, os.strerror(errno.EMFILE)))  # not by a line of these tests
    monkeypatch.setattr(sys.modules[judge.__module__], "frozen_value", refused)
    judge(one_replay(DECODE), factory_of(backend), CPU)


def test_files_that_judged_code_leaves_open_are_a_finding_once_there_are_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge(one_replay(DECODE), factory_of(Clean), CPU)
    try:
        with pytest.raises(OracleFailure) as caught:
            judged_without_files(process.LeavesFilesOpen, monkeypatch)
    finally:
        for file in process.LEFT_OPEN:
            os.close(file)
        process.LEFT_OPEN.clear()
    finding = caught.value.finding
    assert (finding.kind, finding.field) == (Kind.STATE, "open files")
    assert re.match(r"\d+ more than before the first case, and this process may have \d+$", finding.got)


def test_a_process_that_may_open_too_few_files_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ScenarioError, match=r"^too many open files: this process may have \d+; raise that, as by ul"):
        judged_without_files(Clean, monkeypatch)


LEAKS = """
import os, resource
from nsa_oracle.reference.multi_step import MultiStepBackend

resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))

class Leaks(MultiStepBackend):
    def __init__(self, config, req_to_token):
        while True:
            os.open(os.devnull, os.O_RDONLY)
"""


def test_files_that_loading_leaves_open_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "leaks.py").write_text(LEAKS)
    done = replay(saved(tmp_path, one_replay(DECODE)), "--backend", "leaks:Leaks", cwd=tmp_path)
    assert_one_line_error(done, "backend 'leaks:Leaks': loading it left ", " files open, and no more can be opened")


@pytest.mark.parametrize(("backend", "field"), [(crashes.EndsPytest, "Exit"), (crashes.FailsInNumpy, "ValueError")])
def test_an_exception_that_a_library_raises_is_located_in_judged_code(backend: Any, field: str) -> None:
    finding = failure_of(backend).finding
    assert (finding.kind, finding.field) == (Kind.CRASH, field)
    assert "crashes.py" in finding.place
    assert "in refresh" in finding.place


@pytest.mark.parametrize(
    ("backend", "got"),
    [
        (process.SignalsItself, "os.kill(os.getpid(), <Signals.SIGINT: 2>), which ends the process"),
        (process.StopsItself, "os.kill(os.getpid(), <Signals.SIGSTOP: 19>), which stops the process"),
        (process.ClosesFiles, "os.closerange(3, 64), which closes files of the process"),
        (process.LimitsTheStack, "sys.setrecursionlimit(90), which leaves the process too little stack"),
    ],
)
def test_a_signal_to_itself_and_closed_files_are_findings(backend: Any, got: str) -> None:
    finding = failure_of(backend).finding
    assert (finding.kind, finding.field, finding.got) == (Kind.CRASH, "ProcessExit", got)
    assert "process.py" in finding.place
    assert "in refresh" in finding.place


def test_a_signal_that_ends_nothing_is_sent() -> None:
    judge(one_replay(DECODE), factory_of(process.AsksForItself), CPU)


def test_more_stack_may_be_allowed() -> None:
    judge(one_replay(DECODE), factory_of(process.AllowsMoreStack), CPU)


@pytest.mark.parametrize("where", ["import", "constructor"])
def test_too_little_stack_is_told_in_one_line_by_a_survey(where: str, tmp_path: Path) -> None:
    limit = "sys.setrecursionlimit(60)"
    (tmp_path / "own.py").write_text(
        "import sys\nfrom nsa_oracle.reference.multi_step import MultiStepBackend\n"
        + (f"{limit}\n" if where == "import" else "")
        + "class Own(MultiStepBackend):\n    def __init__(self, config, req_to_token):\n"
        + (f"        {limit}\n" if where == "constructor" else "")
        + "        super().__init__(config, req_to_token)\n"
    )
    done = harness("survey", "--device", "cpu", "--backend", "own:Own", "--cases", "1", cwd=tmp_path)
    if where == "import":
        assert_one_line_error(done, f"importing own raised ProcessExit: {limit}, which leaves", "own.py:3")
    else:
        assert done.returncode == FAILS
        assert "is built" in done.stdout
        assert limit in done.stdout
        assert done.stderr == ""


def test_another_current_folder_is_a_finding_and_put_back() -> None:
    before = Path.cwd()
    finding = failure_of(process.ChangesFolder).finding
    assert (finding.kind, finding.field, finding.got, finding.expected) == (Kind.STATE, "os.getcwd()", "/", str(before))
    assert Path.cwd() == before


def test_children_of_judged_code_end_as_they_like() -> None:
    judge(one_replay(DECODE), factory_of(crashes.ForksAChild), CPU)


def test_a_fork_that_leaves_judged_code_is_one_finding(tmp_path: Path) -> None:
    finding = failure_of(process.ReturnsTwice).finding
    assert (finding.kind, finding.field, finding.expected) == (Kind.STATE, "os.fork()", "a child that ends within it")
    assert "process.py" in finding.place
    assert "in refresh" in finding.place
    case = saved(tmp_path, one_replay(DECODE))
    done = replay("--in-process", "--backend", "tests.support.backends.process:ReturnsTwice", case)
    assert done.returncode == FAILS, done.stdout + done.stderr
    assert done.stdout.count("ORACLE FAILURE") == 1
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("backend", "field", "got"),
    [(process.ClosesStdout, "sys.stdout", "a closed file"), (process.DropsStderr, "sys.stderr", "None")],
)
def test_a_lost_stream_is_a_finding_and_put_back(backend: Any, field: str, got: str, tmp_path: Path) -> None:
    before = sys.stdout, sys.stderr
    finding = failure_of(backend).finding
    assert (finding.kind, finding.field, finding.got, finding.expected) == (Kind.STATE, field, got, "an open file")
    assert before == (sys.stdout, sys.stderr)
    assert not any(stream.closed for stream in before)
    words = ("--backend", f"tests.support.backends.process:{backend.__name__}")
    case = saved(tmp_path, one_replay(DECODE))
    done = replay(*words, case)
    assert done.returncode == FAILS, done.stdout + done.stderr
    assert done.stdout.startswith(
        f"ORACLE FAILURE  global state left changed: {field}: got {got}, expected an open file"
    )
    assert done.stderr == ""
    surveyed = harness("survey", *words, "--cases", "1", "--device", "cpu", "--json", "rows.json", cwd=tmp_path)
    broken = [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"] if row["broken"]]
    assert broken == ["leaves sys.stdout and sys.stderr open"], surveyed.stdout + surveyed.stderr


@pytest.mark.parametrize("name", ["ClosesDescriptorOne", "ClosesDescriptorTwo"])
def test_a_closed_descriptor_is_a_finding_and_opened_again(name: str, tmp_path: Path) -> None:
    number = 1 if name.endswith("One") else 2
    words = ("--backend", f"tests.support.backends.process:{name}")
    case = saved(tmp_path, one_replay(DECODE))
    for in_process in ((), ("--in-process",)):
        done = replay(*words, *in_process, case)
        assert done.returncode == FAILS, done.stdout + done.stderr
        told = f"global state left changed: file descriptor {number}: got closed, expected an open file"
        assert done.stdout.startswith(f"ORACLE FAILURE  {told}\n"), done.stdout
        assert done.stderr == ""
    surveyed = harness("survey", *words, "--cases", "1", "--device", "cpu", "--json", "rows.json", cwd=tmp_path)
    broken = [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"] if row["broken"]]
    assert broken == ["leaves sys.stdout and sys.stderr open"], surveyed.stdout + surveyed.stderr


CLOSES = """
import os
from nsa_oracle.optimized.layer import SparseAttention

class Closes(SparseAttention):
    def store_cache(self, *inputs):
        super().store_cache(*inputs)
        os.close(1) if Closes.__doc__ is None else None
        Closes.__doc__ = "closed"
"""


def test_a_layer_that_closes_a_descriptor_is_told_by_a_survey(tmp_path: Path) -> None:
    (tmp_path / "closes.py").write_text(CLOSES)
    words = ("survey", "--layer", "closes:Closes", "--cases", "2", "--device", "cpu")
    done = harness(*words, cwd=tmp_path)
    assert done.returncode == FAILS, done.stdout + done.stderr
    assert "global state left changed: file descriptor 1: got closed, expected an open file" in done.stdout


def test_a_module_that_closes_a_descriptor_is_unusable(tmp_path: Path) -> None:
    (tmp_path / "closes.py").write_text("import os\nos.close(1)\nfrom tests.support.backends.clean import Clean\n")
    done = replay(saved(tmp_path, one_replay(DECODE)), "--backend", "closes:Clean", cwd=tmp_path)
    assert_one_line_error(done, "file descriptor 1", "closed")


def test_another_stream_is_put_back_without_a_word() -> None:
    before = sys.stdout
    judge(one_replay(DECODE), factory_of(process.ReplacesStdout), CPU)
    assert sys.stdout is before


def test_exceptions_in_threads_of_judged_code_are_told(tmp_path: Path) -> None:
    case, module = saved(tmp_path, one_replay(DECODE)), "tests.support.backends.process"
    passed = replay("--backend", f"{module}:LosesAThread", case)
    assert passed.returncode == PASSES, passed.stdout + passed.stderr
    told = rf"ValueError at {process.__file__}:\d+ in fail: in a thread"
    warning = rf"^WARNING: a thread of the judged code raised {told} \(\d+ times\)$"
    assert re.search(warning, passed.stdout, re.MULTILINE)
    failed = replay("--backend", f"{module}:LosesAThreadAndIsWrong", case)
    assert failed.returncode == FAILS, failed.stdout + failed.stderr
    assert re.search(rf"^raised before in threads of the judged code:\n  {told}$", failed.stdout, re.MULTILINE)
    assert "Traceback" not in passed.stderr + failed.stderr


def swallow_the_end() -> None:
    with suppress(ProcessExit):
        os._exit(3)


def test_an_end_by_a_thread_is_noted() -> None:
    with exits_refused() as exits:
        thread = threading.Thread(target=swallow_the_end)
        thread.start()
        thread.join()
    with pytest.raises(ProcessExit, match=r"^os\._exit\(3\), which ends the process$"):
        exits.check()


def test_other_programs_are_refused_and_everything_is_as_before() -> None:
    before = os._exit, os.execv, os.execve
    with exits_refused(), pytest.raises(ProcessExit, match=r"^os\.execv\('/bin/true', \('true',\)\), which ends"):
        os.execl("/bin/true", "true")
    with exits_refused(), pytest.raises(ProcessExit, match=r"^os\.execv\('/bin/true', \['true'\]\), which ends"):
        os.execv("/bin/true", ["true"])
    with exits_refused():
        assert subprocess.run([sys.executable, "-c", "print(3)"], capture_output=True, check=True).stdout == b"3\n"
    assert before == (os._exit, os.execv, os.execve)


def test_an_interruption_that_judged_code_raises_is_a_finding() -> None:
    finding = failure_of(crashes.InterruptsItself).finding
    assert (finding.kind, finding.field) == (Kind.CRASH, "KeyboardInterrupt")
    assert "in refresh" in finding.place


def test_an_interruption_by_the_user_ends_the_run_though_it_is_swallowed() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup has it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            judge(one_replay(DECODE), factory_of(crashes.IsInterrupted), CPU)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_in_a_callback_of_the_garbage_collector_is_not_lost() -> None:
    """Python prints and drops what such a callback raises."""
    sent = []

    def callback(phase: str, info: dict[str, int]) -> None:
        if not sent:
            sent.append(phase)
            signal.raise_signal(signal.SIGTERM)

    def collect() -> None:
        gc.collect()
        time.sleep(10)  # the signal comes again

    termination = Termination()
    gc.callbacks.append(callback)
    try:
        with pytest.raises(KeyboardInterrupt):
            collect()
        assert termination.arrived
    finally:
        gc.callbacks.remove(callback)
        termination.close()


def test_handlers_are_called_and_put_back() -> None:
    called = []
    before = signal.signal(signal.SIGTERM, lambda *_: called.append(None))
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with interruptions_noted() as noted:
            signal.raise_signal(signal.SIGTERM)
        assert (called, noted.received) == ([None], True)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
