"""Judged code that skips or gives up the test, as pytest's own functions do, is told as any other exception of it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.plugin.fixture import Oracle
from nsa_oracle.harness.plugin.parts import Part
from nsa_oracle.harness.scenarios.files import save
from tests.support.metadata_cases import VERIFY, one_replay
from tests.support.pytest_runs import run

SKIPPING = """
import pytest
from nsa_oracle.reference.multi_step import MultiStepBackend

class Skips(MultiStepBackend):
    def __init__(self, config, req_to_token): pytest.skip("no gpu")

class GivesUp(MultiStepBackend):
    def __init__(self, config, req_to_token): pytest.xfail("known")

class SkipsLate(MultiStepBackend):
    def __init__(self, config, req_to_token):
        if len(req_to_token) > 1: pytest.skip("too many")
        super().__init__(config, req_to_token)

class Own(BaseException): pass

class RaisesItsOwn(MultiStepBackend):
    def __init__(self, config, req_to_token): raise Own("not today")

class SkipsLayer:
    def __init__(self, config, attention): pytest.skip("no gpu")
    def sparse_mla(self, q, kv_cache, indices): pass
"""
TESTS = """
import pytest
from nsa_oracle.harness import judged

@pytest.mark.parametrize("name", ["Skips", "GivesUp", "SkipsLate", "RaisesItsOwn"])
def test_backend(oracle, name):
    oracle.judge(backend=f"skipping:{name}", cases=["saved"])

@pytest.mark.parametrize("name", ["absent", "raising"])
def test_import(oracle, name):
    oracle.judge(backend=f"{name}:Any", cases=["saved"])

def test_layer(oracle):
    oracle.judge(layer="skipping:SkipsLayer", profile="smoke", cases=["layers"])

@judged(backend="skipping:Skips", cases=["saved"])
def test_marked_skip(): pass

@judged(backend="skipping:GivesUp", cases=["saved"])
def test_marked_giving_up(): pass

@judged(backend="absent:Any", cases=["saved"])
def test_marked_import(): pass
"""
IMPORTING = (
    "backend 'absent:Any': importing absent raised Skipped: could not import 'no_such_module'",
    "backend 'raising:Any': importing raising raised BaseException: x, at ",
)
BUILDING = (
    "backend raised: Skipped at ",
    "backend raised: XFailed at ",
    "backend raised: Own at ",
    "layer raised: Skipped at ",
    "got too many, expected no exception",
)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n", encoding="utf-8")
    (tmp_path / "skipping.py").write_text(SKIPPING, encoding="utf-8")
    (tmp_path / "absent.py").write_text('import pytest\npytest.importorskip("no_such_module")\n', encoding="utf-8")
    (tmp_path / "raising.py").write_text('raise BaseException("x")\n', encoding="utf-8")
    (tmp_path / "test_own.py").write_text(TESTS, encoding="utf-8")
    save(one_replay(VERIFY), tmp_path / "tests" / "cases" / "case.json")
    return tmp_path


@pytest.mark.parametrize(
    ("in_process", "chosen", "failed", "told"),
    [("true", "test", 10, (*IMPORTING, *BUILDING)), ("false", "import or Late", 4, (*IMPORTING, BUILDING[-1]))],
)
def test_they_fail_the_test(in_process: str, chosen: str, failed: int, told: tuple[str, ...], repository: Path) -> None:
    done = run(repository, "-n", "0", "-o", f"oracle_in_process={in_process}", "test_own.py", "-k", chosen)
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
    assert re.search(rf"= {failed} failed(, \d+ deselected)? in ", done.output), done.output
    assert "between two cases" not in done.output
    missing = [part for part in told if part not in done.output]
    assert not missing, done.output


@pytest.mark.parametrize("in_process", ["true", "false"])
def test_of_a_backend_that_an_option_names_they_are_one_line(in_process: str, repository: Path) -> None:
    options = ("-n", "0", "-o", f"oracle_in_process={in_process}", "--oracle-backend", "absent:Any")
    done = run(repository, *options, "test_own.py")
    assert done.exit_code == pytest.ExitCode.USAGE_ERROR, done.output
    assert done.errors.strip().startswith(f"ERROR: {IMPORTING[0]}")
    assert len(done.errors.strip().splitlines()) == 1


@pytest.mark.parametrize("outcome", [pytest.skip.Exception("no gpu"), pytest.xfail.Exception("known")])
def test_none_that_comes_from_elsewhere_passes(outcome: BaseException) -> None:
    def judge(part: Part, name: str) -> None:
        raise outcome

    session = SimpleNamespace(judge=judge, output=SimpleNamespace(show=lambda: None))
    node = SimpleNamespace(nodeid="test", name="test", user_properties=[])
    with pytest.raises(BackendError, match=f"^mine:Mine: raised {type(outcome).__name__}: {outcome}, at "):
        Oracle(cast(Any, session), cast(Any, node)).judge_part(Part("mine:Mine", None, "smoke"))
