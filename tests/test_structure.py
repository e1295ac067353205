"""The layout of harness/ and tests/: sizes, import contracts, what an import loads, and one name for each thing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.project import PROJECT

pytest.importorskip("importlinter", reason="the layout is checked where the developers' tools are installed")

from tests.support.structure import (  # needs grimp, which comes with import-linter
    LONGEST_CHAIN,
    MOST_LINES_OF_A_CLASS,
    MOST_LINES_OF_A_FILE,
    Structure,
    circles_of,
    longest_chain,
    measured,
    public_names,
)

MOST_LINES_OF_A_TEST = 600
# Names that several modules of harness/ define, and why that is right.
SHARED_NAMES = {
    "BUGS": "one list for each group of bugs; bugs/zoo.py joins them",
    "as_json": "bugs/report.py and mutants/report.py are the same report of two hunts",
    "Current": "what the stand-ins of an engine answer for; each engine has its own",
    "PUBLISHED": "the published package of an engine, in the module of its adapters",
    "get_paged_mqa_logits_metadata": "a kernel's name, in the stand-ins of each engine that calls it",
    "values": "the stand-ins of an engine",
    "install": "interpreter/gluon.py and interpreter/promises.py are each installed by their module's name",
    "listing": "as as_json",
    "sanitize": "the command, and what it runs",
    "sum_line": "as as_json",
}
# For each contract of pyproject.toml, an import that must break it: the file that gets it, and the line.
BREAKING = {
    "harness": ("harness/findings.py", "import nsa_oracle.harness.judge"),
    "checks": ("harness/checks/tally.py", "import nsa_oracle.harness.engine.engine"),
    "subject": ("harness/report/text.py", "import nsa_oracle.optimized.layer"),
    "drawing": ("harness/search/explore.py", "import hypothesis"),
    "optimized": ("optimized/layer.py", "import nsa_oracle.reference.attention"),
    "reference": ("reference/topk.py", "import numpy"),
}


def test_sizes_and_imports_are_within_their_limits() -> None:
    assert measured().faults() == []


def lint_imports(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "--no-cache", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_import_contracts_are_kept() -> None:
    done = lint_imports(PROJECT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Contracts: {len(BREAKING)} kept, 0 broken." in done.stdout


def test_every_contract_has_an_import_that_breaks_it() -> None:
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {contract["id"] for contract in settings["tool"]["importlinter"]["contracts"]} == set(BREAKING)


@pytest.mark.parametrize("contract", BREAKING)
def test_contract_is_broken_by_a_wrong_import(contract: str, tmp_path: Path) -> None:
    """In a copy of the package, in which the contract was kept before."""
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    shutil.copytree(PROJECT / "nsa_oracle", tmp_path / "nsa_oracle", ignore=shutil.ignore_patterns("__pycache__"))
    before = lint_imports(tmp_path, "--contract", contract)
    assert before.returncode == 0, before.stdout + before.stderr
    file, line = BREAKING[contract]
    with (tmp_path / "nsa_oracle" / file).open("a", encoding="utf-8") as module:
        module.write(f"\n{line}\n")
    after = lint_imports(tmp_path, "--contract", contract)
    assert after.returncode == 1, after.stdout + after.stderr
    assert "Contracts: 0 kept, 1 broken." in after.stdout
    importer = file.removesuffix(".py").replace("/", ".")
    assert f"nsa_oracle.{importer} -> {line.removeprefix('import ')}" in after.stdout


def test_importing_the_harness_loads_no_triton_and_no_test_tools() -> None:
    program = "import json, sys, nsa_oracle.harness; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert "nsa_oracle.harness.judge" in loaded
    packages = ("triton", "pytest", "hypothesis", "torch._dynamo")
    assert [name for name in loaded if name.startswith(tuple(f"{package}." for package in packages))] == []
    assert set(packages).isdisjoint(loaded)


def test_one_name_is_one_thing() -> None:
    """No two modules define the same public name, but for those above."""
    shared = {name: files for name, files in public_names().items() if len(files) > 1}
    assert {name: files for name, files in shared.items() if name not in SHARED_NAMES} == {}
    assert set(SHARED_NAMES) == set(shared), "an exception that is none any more"


def test_whatever_exceeds_a_limit_is_reported() -> None:
    imports = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    circles = circles_of(imports)
    assert circles == (frozenset({"b", "c"}),)
    assert longest_chain(imports, circles) == ("a", "b"), "no further than into a circle"
    chain = tuple(f"m{number}" for number in range(LONGEST_CHAIN + 1))
    at_limit = Structure({"a.py": MOST_LINES_OF_A_FILE}, {"a.py:A": MOST_LINES_OF_A_CLASS}, chain[1:], ())
    assert at_limit.faults() == []
    beyond = Structure({"a.py": MOST_LINES_OF_A_FILE + 1}, {"a.py:A": MOST_LINES_OF_A_CLASS + 1}, chain, circles)
    file, owner, circle, long = beyond.faults()
    assert file == f"a.py has {MOST_LINES_OF_A_FILE + 1} lines"
    assert owner == f"class a.py:A has {MOST_LINES_OF_A_CLASS + 1} lines"
    assert circle == "circle of imports: b, c"
    assert long == f"a chain of {LONGEST_CHAIN + 1} imports: {' -> '.join(chain)}"


def test_tests_are_short_and_import_no_test_module() -> None:
    """What several tests share is in tests/support/."""
    for path in sorted((PROJECT / "tests").rglob("*.py")):
        text, is_shared = path.read_text(encoding="utf-8"), path.is_relative_to(PROJECT / "tests/support")
        assert len(text.splitlines()) <= (MOST_LINES_OF_A_FILE if is_shared else MOST_LINES_OF_A_TEST), path
        assert not re.search(r"^\s*(?:from|import) (?:[\w.]+\.)?(?:test_\w+|conftest)\b", text, re.MULTILINE), path
        assert is_shared or (path.parent / "__init__.py").exists(), path
