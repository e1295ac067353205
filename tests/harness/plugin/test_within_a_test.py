"""Calls of the fixture that end otherwise than their test does, and lines that replay from where they are printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_oracle.harness.scenarios.files import save
from tests.support.metadata_cases import VERIFY, one_replay
from tests.support.pytest_runs import run

CLEAN = "tests.support.backends.clean:Clean"
BROKEN = "tests.support.backends.lengths:VerifyForgetsDrafts"
ENDINGS = f"""
import threading
from contextlib import suppress
import pytest

KNOWN = dict(cases=["saved"])

def test_skipped(oracle):
    with suppress(BaseException):
        oracle.judge("{BROKEN}", **KNOWN)
    pytest.skip("after all")

def test_given_up(oracle):
    with suppress(BaseException):
        oracle.judge("{BROKEN}", **KNOWN)
    pytest.xfail("after all")

def test_not_joined(oracle):
    threading.Thread(target=oracle.judge, args=("{BROKEN}",), kwargs=KNOWN, daemon=True).start()

def test_elsewhere(oracle, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    oracle.judge("{CLEAN}", **KNOWN)

def test_skipped_before(oracle):
    pytest.skip("nothing was judged")
"""


@pytest.fixture
def endings(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    (tmp_path / "test_own.py").write_text(ENDINGS, encoding="utf-8")
    save(one_replay(VERIFY), tmp_path / "tests" / "cases" / "case.json")
    return tmp_path


def test_a_failure_that_a_test_catches_fails_it_though_it_is_skipped(endings: Path) -> None:
    done = run(endings, "-n", "0", "test_own.py", "-k", "skipped or given_up")
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
    assert "2 failed, 1 skipped" in done.output
    assert done.output.count("\noracle.judge failed and the test caught it; ") == 2


def test_a_call_that_outlives_its_test_fails_it(endings: Path) -> None:
    done = run(endings, "-n", "0", "test_own.py", "-k", "not_joined")
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
    assert "not judged: a call of oracle.judge had not ended with the test; join its thread" in done.output


def test_saved_cases_are_found_from_another_folder(endings: Path) -> None:
    done = run(endings, "-n", "0", "test_own.py", "-k", "elsewhere")
    assert done.exit_code == pytest.ExitCode.OK, done.output
    assert "oracle: 1 case passed" in done.output


def test_the_replay_line_names_folders_of_the_setting_pythonpath(endings: Path) -> None:
    (endings / "pytest.ini").write_text("[pytest]\npythonpath = src\n", encoding="utf-8")
    (endings / "src").mkdir()
    (endings / "src" / "of_src.py").write_text(
        "from tests.support.backends.lengths import VerifyForgetsDrafts as Broken\n", encoding="utf-8"
    )
    (endings / "test_own.py").write_text(
        "def test_of_src(oracle):\n    oracle.judge('of_src:Broken', cases=['saved'])\n", encoding="utf-8"
    )
    done = run(endings, "-n", "0", "test_own.py")
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
    assert "replay: PYTHONPATH=src:" in done.output


def test_a_suite_in_which_only_what_failed_last_runs_again(tmp_path: Path) -> None:
    """A module that is skipped is not collected, and its report is of another kind."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    (tmp_path / "test_fails.py").write_text("def test_fails():\n    assert 0\n", encoding="utf-8")
    (tmp_path / "test_passes.py").write_text("def test_passes():\n    pass\n", encoding="utf-8")
    for count in ("1 failed, 1 passed", "1 failed"):
        done = run(tmp_path, "-n", "0", "--lf")
        assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
        assert count in done.output
    assert "1 passed" not in done.output


NEVER_BUILT = """
class Backend:
    def __init__(self, config, req_to_token):
        import not_there_at_all

def test_expects_a_failure(oracle):
    oracle.judge(Backend, cases=["saved"], expect_failure=True)
"""


def test_what_was_never_built_is_no_failure_that_a_test_expects(endings: Path) -> None:
    (endings / "test_own.py").write_text(NEVER_BUILT, encoding="utf-8")
    done = run(endings, "-n", "0", "test_own.py")
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
    assert "No module named 'not_there_at_all'" in done.output
    assert "it was never built, which is not the failure that the test expects" in done.output


TWICE = f"""
from nsa_oracle.harness import judged

@judged(backend="{BROKEN}", cases=["saved"])
@judged(backend="{CLEAN}", cases=["saved"])
def test_both():
    pass
"""


def test_two_marks_of_one_test_are_refused(endings: Path) -> None:
    """Of two marks pytest would take the lower one alone."""
    (endings / "test_own.py").write_text(TWICE, encoding="utf-8")
    done = run(endings, "-n", "0", "test_own.py")
    assert done.exit_code == pytest.ExitCode.USAGE_ERROR, done.output
    assert (
        "test_own.py::test_both: it has two marks of judged, of which pytest sees the lower"
        in done.output + done.errors
    )
