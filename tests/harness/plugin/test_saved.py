"""Saved cases that are not there: fine by default, refused in one line if they were asked for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nsa_oracle.harness.scenarios.files import save
from tests.support.metadata_cases import DECODE, one_replay
from tests.support.pytest_runs import run

CLEAN = "tests.support.backends.clean:Clean"
ASKS = """
from nsa_oracle.harness import judged

@judged(backend="tests.support.backends.clean:Clean", cases=["saved", "metadata"])
def test_judged():
    pass
"""


@pytest.mark.parametrize("processes", [("-p", "no:xdist"), ("-n", "1")])
@pytest.mark.parametrize(
    ("setting", "cause"),
    [
        ("", "cases: 'saved' is asked for, and there is no saved case: there is no folder tests/cases"),
        ("oracle_cases = nowhere", "oracle_cases nowhere: there is no folder nowhere"),
    ],
)
def test_saved_cases_that_are_asked_for_must_exist(
    setting: str, cause: str, processes: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "test_asks.py").write_text(ASKS)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\n{setting}\n")
    done = run(tmp_path, "test_asks.py", "-p", "no:cacheprovider", *processes)
    assert done.exit_code == pytest.ExitCode.USAGE_ERROR, done.output
    said = [line.removeprefix("ERROR: ") for line in (done.output + done.errors).splitlines()]
    assert said.count(cause) == 1
    assert "Traceback" not in done.output + done.errors


NAMES = """
from nsa_oracle.harness import judged

@judged(backend="absent_module:X", cases=["metadata"])
def test_judged():
    pass

def test_fixture(oracle):
    oracle.judge(backend="absent_module:X", cases=["metadata"])

def test_profile(oracle):
    oracle.judge(backend="absent_module:X", profile="huge")
"""


def test_backend_of_a_test_that_cannot_be_judged_is_told_once_an_item(tmp_path: Path) -> None:
    (tmp_path / "test_names.py").write_text(NAMES)
    done = run(tmp_path, "test_names.py", "-p", "no:cacheprovider")
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED
    lines = done.output.splitlines()
    assert sum(line.startswith("backend 'absent_module:X': cannot import absent_module") for line in lines) == 9
    assert sum(line.startswith("profile: there is no 'huge'") for line in lines) == 1
    assert "During handling" not in done.output
    assert "Traceback" not in done.output


EMPTY = """
from nsa_oracle.harness import judged

def test_fixture(oracle):
    oracle.judge(cases=())

if {decorated}:
    @judged(cases=[])
    def test_judged():
        pass
"""


def test_an_empty_list_of_cases_is_refused_in_one_line(tmp_path: Path) -> None:
    said = (
        "cases: the list is empty, so nothing would be judged; give some of ('saved', 'metadata', 'layers'), or leave "
        "the argument out"
    )
    for decorated, code in ((False, pytest.ExitCode.TESTS_FAILED), (True, pytest.ExitCode.USAGE_ERROR)):
        (tmp_path / "test_empty.py").write_text(EMPTY.format(decorated=decorated))
        done = run(tmp_path, "test_empty.py", "-p", "no:cacheprovider")
        assert done.exit_code == code, done.output
        assert said in done.output.splitlines()
        assert "Traceback" not in done.output


MISTAKEN = """
from pathlib import Path
import pytest
from nsa_oracle.harness import judged
from tests.support.backends.clean import Clean

BUILT = object.__new__(Clean)

@pytest.mark.parametrize("given", [
    dict(backend=BUILT), dict(backend=Path("a.py")), dict(layer=3), dict(profile=["dev"]), dict(cases=5),
    dict(layer="a:b", cases="metadata"), dict(backend="a:b", layer="a:b", cases=["metadata"]),
])
def test_fixture(oracle, given):
    oracle.judge(**given)

if {decorated}:
    @judged(backend=BUILT)
    def test_judged():
        pass
"""


def test_arguments_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path) -> None:
    mend = "give a class or function of (config, req_to_token), or its name as 'module:attribute'"
    said = (
        f"backend: PosixPath('a.py') builds nothing; {mend}",
        "layer: 3 builds nothing; give a class or function of (config, attention), or its name as 'module:attribute'",
        "profile: there is no '['dev']'; choose from smoke, dev, pr, nightly",
        "cases: 5 is no list; give some of ('saved', 'metadata', 'layers'), or leave the argument out",
    )
    for decorated, code in ((False, pytest.ExitCode.TESTS_FAILED), (True, pytest.ExitCode.USAGE_ERROR)):
        (tmp_path / "test_mistaken.py").write_text(MISTAKEN.format(decorated=decorated))
        done = run(tmp_path, "test_mistaken.py", "-p", "no:cacheprovider")
        assert done.exit_code == code, done.output
        lines = done.output.splitlines()
        assert any(line.startswith("backend: <") and line.endswith(f" builds nothing; {mend}") for line in lines)
        if not decorated:
            assert not set(said) - set(lines), done.output
            unseen = "cases: 'metadata' has no layer, so the one given would not be judged; add 'layers'"
            assert lines.count(unseen) == 2
        assert "Traceback" not in done.output


def test_suite_in_a_repository_without_saved_cases(tmp_path: Path) -> None:
    words = ("--pyargs", "nsa_oracle.harness.suite", f"--oracle-backend={CLEAN}", "--oracle-profile=smoke")
    done = run(tmp_path, *words, "-k", "saved or scenarios and 1")
    assert done.exit_code == pytest.ExitCode.OK, done.output + done.errors
    assert re.search(r"1 passed, 1 skipped", done.output)
    assert "no saved case: there is no folder tests/cases" in done.output.splitlines()
    assert done.totals[0] == 2
    alone = run(tmp_path, *words, "-k", "saved")
    assert alone.exit_code == pytest.ExitCode.TESTS_FAILED
    assert "NOT JUDGED: no case at all was judged" in alone.output


def test_folder_of_an_option_is_that_of_the_current_folder_and_of_a_setting_that_of_its_file(tmp_path: Path) -> None:
    within = tmp_path / "root" / "tests"
    within.mkdir(parents=True)
    save(one_replay(DECODE), tmp_path / "root" / "kept" / "here.json")
    save(one_replay(DECODE), tmp_path / "kept" / "outside.json")
    (within.parent / "pytest.ini").write_text("[pytest]\noracle_cases = ../kept\n")
    words = ("--pyargs", "nsa_oracle.harness.suite", "--collect-only", "-q", "-k", "saved", "-p", "no:cacheprovider")
    for options, name in (
        ((), "outside"),
        (("--oracle-cases=../kept",), "here"),
        (("--oracle-cases=../../kept",), "outside"),
    ):
        done = run(within, *words, *options)
        assert re.findall(r"::test_saved_case\[(\w+)\]$", done.output, re.MULTILINE) == [name], (
            done.output + done.errors
        )


def test_a_cache_of_kernels_that_cannot_be_used_is_a_line_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSA_ORACLE_CACHE", "/proc/x")
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    words = ("--pyargs", "nsa_oracle.harness.suite", f"--oracle-backend={CLEAN}", "--oracle-profile=smoke")
    done = run(tmp_path, *words, "-k", "scenarios and 1", "-p", "no:cacheprovider")
    assert done.exit_code == pytest.ExitCode.OK, done.output + done.errors
    (line,) = (line for line in done.output.splitlines() if "NSA_ORACLE_CACHE" in line)
    assert line.startswith("WARNING: NSA_ORACLE_CACHE: /proc/x cannot be written to (")
