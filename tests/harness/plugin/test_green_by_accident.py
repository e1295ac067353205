"""Runs that judge nothing, or not what was asked for, and must not be green."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nsa_oracle.caught import CAUGHT, caught_line
from nsa_oracle.harness.decorator import NOT_JUDGED, judged, judged_item
from nsa_oracle.harness.scenarios.files import save
from nsa_oracle.harness.search.drawing import PROFILES
from tests.support.metadata_cases import DECODE, VERIFY, one_replay
from tests.support.pytest_runs import Run, environment, run

CLEAN = "tests.support.backends.clean:Clean"
OWN = f"""
import unittest
from nsa_oracle.harness import judged

@judged(backend="{CLEAN}", profile="smoke", cases=["metadata"])
def test_judged():
    pass

@judged(backend="{CLEAN}", profile="smoke", cases=["metadata"])
async def test_coroutine():
    pass

@judged(backend="{CLEAN}", profile="smoke", cases=["metadata"])
class TestMarked:
    def test_method(self):
        pass

class TestOfUnittest(unittest.TestCase):
    @judged(backend="{CLEAN}", profile="smoke", cases=["metadata"])
    def test_marked(self):
        pass

@judged(backend="{CLEAN}", profile="smoke", cases=["metadata"])
class TestMarkedOfUnittest(unittest.TestCase):
    def test_within(self):
        pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository with tests of its own, and no settings."""
    (tmp_path / "test_own.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    return tmp_path


def without_plugin(folder: Path, *words: str) -> Run:
    """A run for which nothing loads the plugin, unless a conftest.py of this repository does."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    switched_off = {**environment(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=folder, env=switched_off, capture_output=True, text=True, timeout=600)
    return Run(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("words", "failed"),
    [
        (("test_own.py", "-k", "test_judged or test_marked"), 2),
        (("-p", "no:nsa_oracle.pytest_plugin", "test_own.py", "-k", "test_judged"), 1),
        (("--noconftest", "--pyargs", "nsa_oracle.harness.suite"), 3),
    ],
    ids=["own", "blocked", "suite"],
)
def test_marked_tests_fail_without_the_plugin(words: tuple[str, ...], failed: int, folder: Path) -> None:
    done = without_plugin(folder, *words)
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
    assert done.output.splitlines().count(NOT_JUDGED) == failed
    assert f"{failed} failed" in done.output
    assert " passed" not in done.output
    assert "Traceback" not in done.output


def test_methods_of_a_marked_class_fail_without_the_plugin(folder: Path) -> None:
    done = without_plugin(folder, "test_own.py", "-k", "test_method or test_within")
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
    assert done.output.count("fixture '_oracle_judges_this_test' not found") == 2
    assert "2 errors" in done.output


def test_what_unittest_runs_is_not_judged_and_fails(folder: Path) -> None:
    done = run(folder, "test_own.py", "-p", "no:cacheprovider", "-k", "test_marked or test_within")
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
    assert done.output.splitlines().count(NOT_JUDGED) == 2, done.output
    assert "passed" not in done.output


def test_with_the_plugin_functions_and_methods_are_judged(folder: Path) -> None:
    done = run(folder, "test_own.py", "-p", "no:cacheprovider", "-k", "(test_judged or test_method) and 1")
    assert done.exit_code == pytest.ExitCode.OK, done.output
    assert "2 passed" in done.output
    assert done.totals[0] == 4


def test_coroutines_stay_coroutines_and_fail_alike() -> None:
    @judged(backend=CLEAN)
    async def body() -> str:
        return "ran"

    def outcome() -> object:
        with pytest.raises(StopIteration) as ended:
            body().send(None)
        return ended.value.value

    with pytest.raises(pytest.fail.Exception, match="not judged: "):
        body().send(None)
    with judged_item():
        assert outcome() == "ran"


BY_FIXTURE = """
def test_backend(oracle):
    oracle.judge(backend="", profile="smoke", cases=["metadata"])

def test_layer(oracle):
    oracle.judge(layer=" ", profile="smoke", cases=["layers"])

def test_settings(oracle):
    oracle.judge(profile="smoke", cases=["metadata"])
"""


@pytest.mark.parametrize("name", ["backend", "layer", "profile", "save", "cases"])
def test_empty_option_is_refused_in_one_line(name: str, folder: Path) -> None:
    done = run(folder, f"--oracle-{name}=", "--noconftest", "--pyargs", "nsa_oracle.harness.suite", "-k", "0")
    assert done.exit_code == pytest.ExitCode.USAGE_ERROR, done.output
    assert re.findall(rf"error: argument --oracle-{name}: (.*)", done.errors), done.errors
    assert "Traceback" not in done.errors


@pytest.mark.parametrize(
    ("setting", "cause"),
    [
        ("oracle_backend =", "oracle_backend: the name is empty; give one, or leave the option out"),
        ("oracle_layer =", "oracle_layer: the name is empty; give one, or leave the option out"),
        ("oracle_profile = huge", "oracle_profile: invalid choice: 'huge'"),
        ("oracle_device = tpu", "oracle_device: invalid choice: 'tpu'"),
        ("oracle_save = /proc/x", "oracle_save /proc/x: cannot be written: "),
        ("oracle_case_timeout = soon", "oracle_case_timeout: 'soon' is not a number of seconds, 0 or more"),
    ],
)
def test_setting_that_an_option_would_refuse_is_refused_in_one_line(setting: str, cause: str, folder: Path) -> None:
    (folder / "pytest.ini").write_text(f"[pytest]\n{setting}\n", encoding="utf-8")
    (folder / "test_fixture.py").write_text(BY_FIXTURE, encoding="utf-8")
    words = ("-p", "no:cacheprovider", "-p", "nsa_oracle.pytest_plugin")
    marked = without_plugin(folder, *words, "test_own.py", "-k", "test_judged")
    assert marked.exit_code == pytest.ExitCode.USAGE_ERROR, marked.output
    assert sum(line.startswith(cause) for line in marked.output.splitlines()) == 1, marked.output
    by_fixture = without_plugin(folder, *words, "test_fixture.py", "-k", "settings")
    assert by_fixture.exit_code == pytest.ExitCode.TESTS_FAILED, by_fixture.output
    assert sum(line.startswith(cause) for line in by_fixture.output.splitlines()) == 1, by_fixture.output
    assert "Traceback" not in marked.output + by_fixture.output


def test_empty_name_in_a_test_is_refused_in_one_line(folder: Path) -> None:
    (folder / "test_fixture.py").write_text(BY_FIXTURE, encoding="utf-8")
    done = run(folder, "test_fixture.py", "-p", "no:cacheprovider", "-k", "backend or layer")
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
    assert "2 failed" in done.output
    for name in ("backend", "layer"):
        assert done.output.splitlines().count(f"{name}: the name is empty; give one, or leave the argument out") == 1


def test_bare_decorator_is_refused() -> None:
    def test_something(one: object, other: object) -> None: ...

    def check_something(config: object) -> None: ...

    class TestSomething: ...

    for test in (test_something, check_something, TestSomething):
        with pytest.raises(TypeError, match=rf"write @judged\(\) above {test.__name__}, not @judged; "):
            judged(test)


def test_backend_may_be_given_by_position() -> None:
    class TestDouble:
        def __init__(self, config: object, req_to_token: object) -> None: ...

    def factory(config: object, req_to_token: object) -> None: ...

    def body() -> None: ...

    for backend in (TestDouble, factory, CLEAN, lambda *sizes: None):
        (mark,) = vars(judged(backend)(body))["pytestmark"]
        assert mark.kwargs["backend"] is backend


BARE = """
from nsa_oracle.harness import judged

@judged
def test_bare():
    pass
"""


def test_bare_decorator_does_not_hide_the_test(folder: Path) -> None:
    (folder / "test_bare.py").write_text(BARE, encoding="utf-8")
    done = run(folder, "test_bare.py", "-p", "no:cacheprovider")
    assert done.exit_code == pytest.ExitCode.INTERRUPTED, done.output
    assert done.output.count("TypeError: write @judged() above test_bare, not @judged") >= 1


BROKEN = "tests.support.backends.lengths:VerifyForgetsDrafts"
LAYER = "tests.support.layers.clean:SharesOutputs"
NAMES_ALL = f"""
import pytest
from nsa_oracle.harness import judged

@pytest.mark.parametrize("again", [0])
@judged("{CLEAN}", "{LAYER}", profile="smoke", cases=["layers"])
def test_marked(again):
    pass

def test_by_fixture(oracle):
    oracle.judge("{CLEAN}", profile="smoke", cases=["saved"])

def test_other():
    pass
"""
TAKEN_BY_NONE = {
    f"--oracle-backend={BROKEN}": f"backend {BROKEN}: no test of this run takes it; the tests name their own backend",
    f"--oracle-layer={LAYER}": f"layer {LAYER}: no test of this run takes it; the tests name their own layer",
    "--oracle-profile=dev": "profile dev: no test of this run takes it; the tests name their own profile",
}


def of_tests_that_name_all(folder: Path, *words: str) -> Run:
    (folder / "test_names.py").write_text(NAMES_ALL, encoding="utf-8")
    return run(folder, "test_names.py", "-p", "no:cacheprovider", *words)


@pytest.mark.parametrize("processes", [("-p", "no:xdist"), ("-n", "1")])
def test_options_that_no_test_takes_are_told_and_fail_the_run(processes: tuple[str, ...], folder: Path) -> None:
    some = ("-k", "marked and 1 or other")
    done = of_tests_that_name_all(folder, *TAKEN_BY_NONE, "--oracle-seed=3", *some, *processes)
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
    assert "2 passed" in done.output
    said = [line for line in done.output.splitlines() if line.startswith("NOT JUDGED: ")]
    assert said == [f"NOT JUDGED: --oracle-{line}" for line in TAKEN_BY_NONE.values()]
    assert f"judging {BROKEN} and {LAYER} on cpu, profile dev, seed 3, unless a test names its own" in done.output


def test_options_without_a_test_of_the_oracle_fail_the_run(folder: Path) -> None:
    done = of_tests_that_name_all(folder, f"--oracle-backend={CLEAN}", "--oracle-seed", "3", "-k", "other")
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
    said = [line for line in done.output.splitlines() if line.startswith("NOT JUDGED: ")]
    why = "no test of this run uses the oracle"
    assert said == [f"NOT JUDGED: --oracle-backend {CLEAN}: {why}", f"NOT JUDGED: --oracle-seed 3: {why}"]


def test_options_of_the_settings_and_of_a_listing_may_go_unused(folder: Path) -> None:
    listed = of_tests_that_name_all(folder, f"--oracle-backend={CLEAN}", "--collect-only")
    assert listed.exit_code == pytest.ExitCode.OK, listed.output
    (folder / "pytest.ini").write_text(f"[pytest]\naddopts = --oracle-backend={CLEAN}\n", encoding="utf-8")
    set_so = of_tests_that_name_all(folder, "-k", "other")
    assert set_so.exit_code == pytest.ExitCode.OK, set_so.output
    assert "NOT JUDGED" not in listed.output + set_so.output


TAKES = f"""
def test_by_fixture(oracle):
    oracle.judge("{CLEAN}", cases=["metadata"])
"""


def test_an_option_that_one_test_takes_is_used(folder: Path) -> None:
    (folder / "test_takes.py").write_text(TAKES, encoding="utf-8")
    words = ("-p", "no:cacheprovider", "-k", "by_fixture or judged and 0")
    done = run(folder, "test_own.py", "test_takes.py", "--oracle-profile=smoke", "--oracle-seed=3", *words)
    assert done.exit_code == pytest.ExitCode.OK, done.output
    assert "2 passed" in done.output


TAKES_THE_FIXTURE = f"""
import pytest
from nsa_oracle.harness import judged

def test_idle(oracle):
    pass

def test_skipped(oracle):
    pytest.skip("for a reason")

def test_fails_by_itself(oracle):
    assert 0, "for another reason"

@judged("{CLEAN}", profile="smoke", cases=["metadata"])
def test_marked(oracle):
    pass
"""


IN_A_THREAD = """
import threading
from nsa_oracle.reference.multi_step import MultiStepBackend

class Wrong(MultiStepBackend):
    def init_forward_metadata(self, batch):
        super().init_forward_metadata(batch)
        for step in self.attn_backends:
            step.forward_metadata.cache_seqlens_int32.add_(1)

def test_threaded(oracle):
    thread = threading.Thread(target=oracle.judge, kwargs=dict(backend=Wrong, profile="smoke", cases=["metadata"]))
    thread.start()
    thread.join()
"""


def test_a_failure_in_a_thread_fails_the_test(folder: Path) -> None:
    (folder / "test_own.py").write_text(IN_A_THREAD, encoding="utf-8")
    done = run(folder, "-n", "0", "test_own.py")
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
    assert "oracle.judge failed in a thread, which fails no test by itself: " in done.output


CATCHES = f"""
from contextlib import suppress
import pytest
import torch
from nsa_oracle.harness import OracleFailure, judge
from tests.support.backends.lengths import VerifyForgetsDrafts
from tests.support.metadata_cases import VERIFY, factory_of, one_replay

KNOWN = dict(profile="smoke", cases=["saved"])

def test_swallowed(oracle):
    with suppress(BaseException):
        oracle.judge("{BROKEN}", **KNOWN)

def test_unusable(oracle):
    with suppress(Exception):
        oracle.judge("absent:X", **KNOWN)

def test_expected(oracle):
    oracle.judge("{BROKEN}", **KNOWN, expect_failure=True)

def test_expected_in_vain(oracle):
    oracle.judge("{CLEAN}", **KNOWN, expect_failure=True)

@pytest.mark.parametrize("times", [1, 2])
def test_own_call(times):
    for _ in range(times):
        with pytest.raises(OracleFailure):
            judge(one_replay(VERIFY), factory_of(VerifyForgetsDrafts), torch.device("cpu"))
"""


@pytest.fixture
def catches(folder: Path) -> Path:
    (folder / "test_own.py").write_text(CATCHES, encoding="utf-8")
    save(one_replay(VERIFY), folder / "tests" / "cases" / "case.json")
    return folder


def test_a_failure_that_a_test_catches_fails_it_unless_it_is_expected(catches: Path) -> None:
    done = run(catches, "-n", "0", "test_own.py", "-k", "not own_call")
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
    assert "3 failed, 1 passed" in done.output
    caught = (
        "oracle.judge failed and the test caught it; one that expects it calls oracle.judge(..., expect_failure=True)"
    )
    assert f"\n{caught}: wrong value: cache_seqlens_int32 " in done.output
    assert f"\n{caught}: backend 'absent:X': cannot import absent" in done.output
    assert "\noracle.judge found no failure, and one was expected\n" in done.output
    alone = run(catches, "-n", "0", "test_own.py", "-k", "test_expected and not vain")
    assert alone.exit_code == pytest.ExitCode.OK, alone.output
    assert "1 case failed, as the tests expect" in alone.output
    assert "FAILED" not in alone.output
    assert "JUDGED" not in alone.output


@pytest.mark.parametrize("processes", ["0", "2"])
def test_failures_of_judge_that_tests_catch_are_named(processes: str, catches: Path) -> None:
    done = run(catches, "-n", processes, "test_own.py", "-k", "own_call")
    assert done.exit_code == pytest.ExitCode.OK, done.output
    (line,) = (line for line in done.output.splitlines() if "caught" in line)
    names = [f"test_own.py::test_own_call[{times}]" for times in (1, 2)]
    told = "oracle: 3 failures of judge were caught by tests that passed: "
    assert line in (told + ", ".join(names), told + ", ".join(reversed(names)))


def test_of_many_tests_that_catch_few_are_named() -> None:
    reports = [SimpleNamespace(nodeid=f"t{n}", user_properties=[(CAUGHT, 1)], when="call") for n in range(7)]
    line = "oracle: 7 failures of judge were caught by tests that passed: t0, t1, t2"
    assert caught_line(reports, verbose=False) == f"{line} and 4 more (-v names them)"
    assert caught_line(reports, verbose=True) == f"{line}, t3, t4, t5, t6"
    assert caught_line(reports[:1], verbose=False) == "oracle: 1 failure of judge was caught by tests that passed: t0"
    assert caught_line([], verbose=False) == ""


def test_fixture_that_judges_nothing_fails_its_test(folder: Path) -> None:
    (folder / "test_takes.py").write_text(TAKES_THE_FIXTURE, encoding="utf-8")
    done = run(folder, "test_takes.py", "-p", "no:cacheprovider", "-k", "not marked or 1")
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
    assert "2 failed, 1 passed, 1 skipped" in done.output
    line = "not judged: the test takes the fixture oracle and never calls oracle.judge"
    assert done.output.splitlines().count(line) == 1
    assert "for another reason" in done.output


@pytest.mark.parametrize("words", [("empty",), ("test_own.py",), ("test_own.py", "-k", "nothing")])
def test_a_case_that_no_test_replays_is_told_in_one_line(words: tuple[str, ...], folder: Path) -> None:
    (folder / "empty").mkdir()
    save(one_replay(DECODE), folder / "case.json")
    done = run(folder, *words, "--oracle-replay=case.json", "-p", "no:cacheprovider")
    assert done.exit_code == pytest.ExitCode.NO_TESTS_COLLECTED, done.output
    said = [line for line in done.output.splitlines() if line.startswith("NOT JUDGED: ")]
    assert len(said) == 1
    assert said[0].startswith("NOT JUDGED: --oracle-replay case.json: no selected test judges saved cases; ")


def test_a_case_is_replayed_whatever_the_profile(folder: Path) -> None:
    save(one_replay(DECODE), folder / "case.json")
    words = ("--pyargs", "nsa_oracle.harness.suite", f"--oracle-backend={CLEAN}", "--oracle-profile=smoke")
    done = run(folder, *words, "--oracle-replay=case.json", "-p", "no:cacheprovider")
    assert done.exit_code == pytest.ExitCode.OK, done.output
    assert done.totals[0] == 1


def test_each_shard_has_a_case(folder: Path) -> None:
    words = ("--pyargs", "nsa_oracle.harness.suite", "--oracle-profile=smoke", "--collect-only", "-q", "-k", "layers")
    done = run(folder, *words, "-p", "no:cacheprovider")
    listed = re.findall(r"::test_layers\[(\d)\]$", done.output, re.MULTILINE)
    assert listed == [str(number) for number in range(PROFILES["smoke"].layer_cases)]
