"""Forks: results, messages, errors, and every way to end without a result."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nsa_oracle.harness import watching
from nsa_oracle.harness.forks import Tell, forked
from nsa_oracle.harness.processes import Child, ChildDied, time_limit
from tests.support.command_line import environment_of_children


def test_result_and_messages_come_back() -> None:
    def work(tell: Tell) -> int:
        tell("one")
        tell("two")
        return os.getpid()

    heard: list[str] = []
    assert forked(work, heard.append) != os.getpid()
    assert heard == ["one", "two"]


def test_errors_come_back_with_the_lines_that_raised_them() -> None:
    def work(tell: Tell) -> None:
        raise KeyError("word")

    with pytest.raises(KeyError, match="word") as caught:
        forked(work)
    assert 'raise KeyError("word")' in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os._exit(0), "exit code 0"),
        (lambda: os._exit(7), "exit code 7"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "signal SIGKILL"),
    ],
)
def test_an_end_without_a_result_is_an_error(end: Callable[[], Any], how: str) -> None:
    heard: list[object] = []

    def work(tell: Tell) -> None:
        tell("begun")
        end()

    with pytest.raises(ChildDied, match=rf"^the process ended \({how}\)$"):
        forked(work, heard.append)
    assert heard == ["begun"], "what it said before is not lost"


def fault() -> None:
    ctypes.string_at(0)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


AT_THE_FAULT = rf"^the process ended \(signal SIGSEGV\) at {__file__}:\d+ in fault$"
IN_THE_CALL = rf"^the process ended \(signal SIGKILL\) during the call of {__file__}:\d+ in kill_itself$"


def test_a_fault_of_native_code_is_told_with_the_line_that_called_it(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ChildDied, match=AT_THE_FAULT):
        forked(lambda tell: fault())
    with pytest.raises(ChildDied, match=AT_THE_FAULT):
        Child("cpu").call(fault)
    said = capfd.readouterr().err
    assert said.count("Fatal Python error: Segmentation fault") == 2
    assert f'"{__file__}", line ' in said
    assert "/harness/forks.py" not in said
    assert "/harness/processes.py" not in said


def killed_in_a_call() -> None:
    watching.noted(kill_itself)()


def killed_behind_a_call() -> None:
    watching.noted(os.getpid)()
    watching.noted(fault_of_python)()


def fault_of_python() -> None:
    with suppress(ZeroDivisionError):
        watching.noted(lambda: 1 / 0)()
    kill_itself()


def killed_between_calls() -> None:
    watching.noted(is_closed)(os.open(os.devnull, os.O_RDONLY))
    kill_itself()


def test_what_is_killed_is_told_with_the_method_that_was_called() -> None:
    """Nothing but what it has noted before is left of it."""
    with pytest.raises(ChildDied, match=IN_THE_CALL):
        forked(lambda tell: killed_in_a_call())
    with pytest.raises(ChildDied, match=IN_THE_CALL):
        Child("cpu").call(killed_in_a_call)
    with pytest.raises(ChildDied, match=r"during the call of .* in fault_of_python$"):
        forked(lambda tell: killed_behind_a_call())
    with pytest.raises(ChildDied, match=r"^the process ended \(signal SIGKILL\)$"):
        forked(lambda tell: killed_between_calls())


def is_closed(receiver: int) -> bool:
    """Whether all that could write to the pipe end, within a minute."""
    return bool(select.select([receiver], [], [], 60)[0]) and os.read(receiver, 1) == b""


def test_a_process_that_a_fork_leaves_does_not_delay_the_result_and_is_ended() -> None:
    receiver, sender = os.pipe()

    def work(tell: Tell) -> None:
        subprocess.Popen(["sleep", "1000"], pass_fds=[sender])

    forked(work)
    os.close(sender)
    assert is_closed(receiver)
    os.close(receiver)


def hold(fifo: str, code: int | None) -> None:
    """Leave a process that holds what this one has open; then end as ``code`` says, or return."""
    os.open(fifo, os.O_WRONLY)
    if os.fork() == 0:
        time.sleep(1000)
    if code is not None:
        os._exit(code)


@pytest.mark.parametrize("code", [None, 7])
def test_a_process_that_a_child_leaves_does_not_delay_its_end_and_is_ended(code: int | None, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    receiver = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    child = Child("cpu")
    if code is None:
        child.call(hold, str(tmp_path / "fifo"), code)
        assert child.close() == 0
    else:
        with pytest.raises(ChildDied, match=r"the process ended \(exit code 7\)"):
            child.call(hold, str(tmp_path / "fifo"), code)
    assert is_closed(receiver)
    os.close(receiver)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


STOPPED = "^the process was stopped, did not answer within 3 s, and was ended$"


def test_a_stopped_process_is_ended() -> None:
    with pytest.raises(ChildDied, match=STOPPED):
        forked(lambda tell: stop())
    child = Child("cpu")
    with pytest.raises(ChildDied, match=STOPPED) as caught:
        child.call(stop)
    assert caught.value.process is not None


def stop_for_a_moment() -> str:
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {os.getpid()}"])
    stop()
    return "went on"


def test_a_process_that_is_stopped_for_a_moment_goes_on() -> None:
    assert forked(lambda tell: stop_for_a_moment()) == "went on"


def outlive_the_time_limit() -> None:
    with time_limit(0.2):
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGALRM,))
        faulthandler.cancel_dump_traceback_later()
        time.sleep(60)


def test_what_switches_its_time_limit_off_is_ended_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_SECONDS_BEHIND", 0.5)
    said = r"^the process did not answer within 0\.2 s, nor long after that, and was ended$"
    with pytest.raises(ChildDied, match=said) as caught:
        forked(lambda tell: outlive_the_time_limit())
    assert caught.value.hung
    with pytest.raises(ChildDied, match=said):
        Child("cpu").call(outlive_the_time_limit)


ON_A_TERMINAL = """
from nsa_oracle.harness.forks import forked

def work(tell):
    return input("name? ")

print("hello", forked(work), flush=True)
"""


@pytest.mark.parametrize(("typed", "answer"), [(b"you\n", b"hello you"), (b"\x03", b"KeyboardInterrupt")])
def test_a_fork_reads_from_the_terminal(typed: bytes, answer: bytes) -> None:
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, [sys.executable, "-c", ON_A_TERMINAL], environment_of_children())
    seen = b""
    with suppress(OSError):  # at the end
        while more := os.read(terminal, 1 << 16):
            seen += more
            if seen.endswith(b"name? "):
                os.write(terminal, typed)
    os.waitpid(process, 0)
    os.close(terminal)
    assert answer in seen, seen


def test_a_slow_fork_is_ended() -> None:
    with pytest.raises(ChildDied, match="took longer than 1 s and was ended"):
        forked(lambda tell: time.sleep(60), timeout=1)


def sleep_without_signals() -> None:
    with time_limit(0.2):
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGALRM,))
        time.sleep(60)


TOO_LONG = rf"still running at {__file__}:\d+ in sleep_without_signals long after the time limit, and was ended$"


def test_a_fork_that_blocks_the_signal_of_its_time_limit_is_told_as_one_that_hung() -> None:
    with pytest.raises(ChildDied, match=TOO_LONG) as caught:
        forked(lambda tell: sleep_without_signals())
    assert caught.value.hung


def test_a_child_that_blocks_the_signal_of_its_time_limit_is_told_as_one_that_hung() -> None:
    child = Child("cpu")
    with pytest.raises(ChildDied, match=TOO_LONG) as caught:
        child.call(sleep_without_signals)
    assert caught.value.hung


def test_a_signal_that_was_blocked_within_a_time_limit_is_blocked_no_more() -> None:
    with time_limit(60):
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGALRM,))
    assert signal.SIGALRM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


SLEEPS = """
import time
from nsa_oracle.harness.forks import forked

def work(tell):
    tell("begun")
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            if not {swallows}:
                raise

forked(work, lambda message: print(message, flush=True))
"""


@pytest.mark.parametrize(
    ("swallows", "signals", "code"),
    [
        (False, [signal.SIGINT], -signal.SIGINT),
        (True, [signal.SIGINT, signal.SIGINT], -signal.SIGINT),
        (True, [signal.SIGINT], -signal.SIGINT),
        (False, [signal.SIGTERM], -signal.SIGTERM),
    ],
)
def test_signals_that_ask_to_stop_end_both(swallows: bool, signals: list[signal.Signals], code: int) -> None:
    """They go to the parent alone, as from a terminal."""
    words = [sys.executable, "-c", SLEEPS.format(swallows=swallows)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environment_of_children(), **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(0.3)
        assert process.wait(60) == code
