"""A process that can be lost: its answers, its errors, its end, and the fresh one after it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from nsa_oracle.harness.judge import OracleFailure
from nsa_oracle.harness.processes import Child, ChildDied


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


def test_errors_come_back(child: Child) -> None:
    first = child.call(process_id)
    with pytest.raises(KeyError, match="word"):
        child.call(fail, "word")
    assert child.call(process_id) == first


def test_a_lost_process_is_replaced(child: Child) -> None:
    first = child.call(process_id)
    with pytest.raises(ChildDied, match="its process ended with 7"):
        child.call(os._exit, 7)
    assert child.call(process_id) != first


def test_a_slow_process_is_ended(child: Child) -> None:
    with pytest.raises(ChildDied, match="took longer than 1 seconds"):
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
    from test_detection import DECODE, one_replay

    from nsa_oracle.harness.findings import Finding, Kind

    raise OracleFailure(one_replay(DECODE), Finding(Kind.VALUE, "seq", "3", "4", step=1), 2)


def test_a_failure_of_the_oracle_comes_back_whole(child: Child) -> None:
    with pytest.raises(OracleFailure) as caught:
        child.call(judged_wrong)
    failure = caught.value
    assert (failure.event, failure.finding.got, len(failure.scenario.events)) == (2, "3", 3)
    assert str(failure) == failure.finding.sentence()
