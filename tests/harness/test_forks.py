"""Forks: results, messages, errors, and every way to end without a result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

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


def test_a_process_that_outlives_the_fork_does_not_delay_the_result() -> None:
    def work(tell: Tell) -> int:
        return subprocess.Popen(["sleep", "60"]).pid

    os.kill(forked(work), signal.SIGKILL)


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
    """They go to the parent alone here; a terminal sends them to both."""
    words = [sys.executable, "-c", SLEEPS.format(swallows=swallows)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environment_of_children(), **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(0.3)
        assert process.wait(60) == code
