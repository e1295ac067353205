"""Child processes that can be lost, the GPU that is left to each of several, and how kernels run in a process."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_oracle.harness import processes
from nsa_oracle.harness.errors import CaseTimeout
from nsa_oracle.harness.judge import OracleFailure
from nsa_oracle.harness.plugin.session import share_gpus
from nsa_oracle.harness.processes import Child, ChildDied, prepare_process, time_limit
from tests.support.command_line import environment_of_children, run


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child("cpu")
    yield child
    child.close()


def process_id() -> int:
    return os.getpid()


def fail(word: str) -> None:
    raise KeyError(word)


def how_kernels_run() -> str | None:
    return os.environ.get("TRITON_INTERPRET")


def test_calls_run_in_one_process_of_their_own(child: Child) -> None:
    first = child.call(process_id)
    assert first != os.getpid()
    assert child.call(process_id) == first
    assert child.call(how_kernels_run) == "1"


STARTS = """
import os, signal, time
from nsa_oracle.harness.processes import Child

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: None)
    child = Child("cpu")
    child._start()
    for _ in range(20):  # while it starts, and behind that
        os.killpg(0, signal.SIGINT)
        time.sleep(0.2)
    assert child.close() is not None
"""


def test_a_child_says_nothing_of_a_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "starts.py").write_text(STARTS)
    done = subprocess.run(
        [sys.executable, "starts.py"],
        cwd=tmp_path,
        env=environment_of_children(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        start_new_session=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_errors_come_back(child: Child) -> None:
    first = child.call(process_id)
    with pytest.raises(KeyError, match="word"):
        child.call(fail, "word")
    assert child.call(process_id) == first


def test_a_lost_process_is_replaced(child: Child) -> None:
    first = child.call(process_id)
    with pytest.raises(ChildDied, match=r"the process ended \(exit code 7\)"):
        child.call(os._exit, 7)
    assert child.call(process_id) != first


def test_a_process_that_is_lost_between_calls_is_replaced(child: Child) -> None:
    first = child.call(process_id)
    os.kill(first, signal.SIGKILL)
    assert child._process is not None
    child._process.join()
    assert child.call(process_id) != first


def test_a_slow_process_is_ended(child: Child) -> None:
    with pytest.raises(ChildDied, match="took longer than 1 second and"):
        child.call(time.sleep, 60, timeout=1)
    assert child.call(process_id)


def test_closing_ends_the_process() -> None:
    child = Child("cpu")
    number = child.call(process_id)
    assert child.close() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
    assert child.close() is None


def judged_wrong() -> None:
    from nsa_oracle.harness.findings import Finding, Kind
    from tests.support.metadata_cases import DECODE, one_replay

    raise OracleFailure(one_replay(DECODE), Finding(Kind.VALUE, "seq", "3", "4", step=1), 2)


def test_a_failure_of_the_oracle_comes_back_whole(child: Child) -> None:
    with pytest.raises(OracleFailure) as caught:
        child.call(judged_wrong)
    failure = caught.value
    assert (failure.event, failure.finding.got, len(failure.scenario.events)) == (2, "3", 3)
    assert str(failure) == failure.finding.sentence()


@pytest.mark.parametrize(("device", "interpreted"), [("cpu", "1"), ("cuda", "0")])
@pytest.mark.parametrize("environment", ["0", "1"])
def test_device_decides_how_kernels_run_and_not_the_environment(
    device: str, interpreted: str, environment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", environment)
    prepare_process(device)
    assert os.environ["TRITON_INTERPRET"] == interpreted


@pytest.mark.parametrize(
    ("count", "seen", "left"),
    [
        (0, None, [None, None, None]),
        (1, None, [None, None, None]),
        (1, "3", ["3", "3", "3"]),
        (2, None, ["0", "1", "0"]),
        (2, "5,GPU-1f", ["5", "GPU-1f", "5"]),
    ],
)
def test_processes_take_turns(
    count: int, seen: str | None, left: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for number, expected in enumerate(left):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen or "")  # first, so that what take_one sets is undone
        if seen is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        processes.take_gpu(number)
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == expected


@pytest.mark.parametrize(
    ("session", "left"),
    [
        (SimpleNamespace(), "4,5"),  # the controller, whose workers inherit what it leaves
        (SimpleNamespace(workerinput={"workerid": "gw0"}), "4"),
        (SimpleNamespace(workerinput={"workerid": "gw13"}), "5"),
    ],
)
def test_workers_of_xdist_take_turns(session: Any, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    share_gpus(session)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


# Time limits


def test_time_limit_interrupts_what_runs_on() -> None:
    with pytest.raises(CaseTimeout, match=r"^still running after 0\.2 seconds$"), time_limit(0.2):
        time.sleep(60)


def test_time_limit_leaves_nothing_behind() -> None:
    handler = signal.getsignal(signal.SIGALRM)
    with time_limit(0.2):
        pass
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    time.sleep(0.3)


def test_a_signal_while_a_time_limit_ends_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cancel, handler = faulthandler.cancel_dump_traceback_later, signal.getsignal(signal.SIGALRM)

    def cancel_late() -> None:
        cancel()
        signal.raise_signal(signal.SIGALRM)

    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", cancel_late)
    with time_limit(60):
        pass
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def swallowing() -> None:
    while True:
        with suppress(BaseException):
            time.sleep(60)


def test_time_limit_ends_what_swallows_it() -> None:
    trace = sys.gettrace()
    said = r"^still running after 0\.5 seconds and ignores interruption$"
    with pytest.raises(CaseTimeout, match=said) as caught, time_limit(0.5):
        swallowing()
    assert caught.value.stack[-1].name == "swallowing"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert sys.gettrace() is trace


def test_what_swallows_everything_ends_its_process_with_a_verdict() -> None:
    code = """
import time
from nsa_oracle.harness.processes import time_limit

with time_limit(0.5):
    while True:
        try:
            time.sleep(60)
        except BaseException:
            try:
                time.sleep(60)
            except BaseException:
                continue
        finally:
            continue
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 1
    assert done.stderr.startswith("ORACLE FAILURE  does not end: still running after 0.5 seconds and ignores ") or (
        "Timeout (0:00:01.500000)!" in done.stderr
    )


def test_limit_of_none_and_another_thread_have_no_limit() -> None:
    def wait() -> str:
        with time_limit(0.05):
            time.sleep(0.2)
        return "done"

    with time_limit(None):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(wait).result() == "done"
