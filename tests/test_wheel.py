"""A wheel has the packages of nsa_oracle and nothing else, and works beside packages that are named like its parts."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.project import PROJECT

PARTS = ("harness", "optimized", "reference")
CASE = PROJECT / "tests/cases/stale-host-mirror-is-not-read.json"
IMPORTS = """
import json
import harness, nsa_oracle.harness, nsa_oracle.optimized, nsa_oracle.reference, optimized, reference, tests

modules = (harness, nsa_oracle.harness, nsa_oracle.optimized, nsa_oracle.reference, optimized, reference, tests)
print(json.dumps({module.__name__: module.__file__ for module in modules}))
"""


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout, as building leaves files behind. Needs an index only without setuptools."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    for name in ("nsa_oracle", "tests", *PARTS):  # of tests/ nothing must get in
        shutil.copytree(PROJECT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    here = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    pip("wheel", "--no-deps", *here, "--wheel-dir", str(target), str(source))
    (built,) = target.iterdir()
    return built


def modules(folder: Path) -> set[str]:
    """The Python files of a folder of the checkout, as paths within its parent."""
    return {path.relative_to(folder.parent).as_posix() for path in folder.rglob("*.py")}


def test_wheel_has_the_packages_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    (metadata,) = {name.partition("/")[0] for name in names} - {"nsa_oracle"}
    assert metadata.startswith("nsa_oracle-")
    assert metadata.endswith(".dist-info")
    own = {f"nsa_oracle/{path.name}" for path in (PROJECT / "nsa_oracle").glob("*.py")}
    expected = own.union(*({f"nsa_oracle/{name}" for name in modules(PROJECT / part)} for part in PARTS))
    assert {name for name in names if name.startswith("nsa_oracle/")} == expected


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages: the wheel, and four of other people's with names of folders of this checkout."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    for name in (*PARTS, "tests"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("", encoding="utf-8")
    return folder


def run(site: Path, folder: Path, *words: str) -> str:
    """What Python prints, in a folder where nothing of the checkout is found."""
    libraries = [path for path in sys.path if path and not Path(path).resolve().is_relative_to(PROJECT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *libraries])}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_installed_beside_packages_of_the_same_names(site: Path, tmp_path: Path) -> None:
    found = json.loads(run(site, tmp_path, "-c", IMPORTS))
    expected = {name: site / name for name in (*PARTS, "tests")}
    expected |= {f"nsa_oracle.{part}": site / "nsa_oracle" / part for part in PARTS}
    assert found == {name: str(folder / "__init__.py") for name, folder in expected.items()}


def test_its_command_line_works_beside_them(site: Path, tmp_path: Path) -> None:
    reported = run(site, tmp_path, "-m", "nsa_oracle", "show", str(CASE))
    note = json.loads(CASE.read_text(encoding="utf-8"))["note"]
    assert reported.splitlines()[0] == note
    assert "Replay" in reported
