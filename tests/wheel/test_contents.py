"""A wheel has the packages of nsa_oracle and nothing else, and works beside packages that are named like its parts."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from tests.support.project import PROJECT
from tests.support.wheels import PARTS, run

CASE = PROJECT / "tests/cases/stale-host-mirror-is-not-read.json"
IMPORTS = """
import json
import harness, nsa_oracle.harness, nsa_oracle.optimized, nsa_oracle.reference, optimized, reference, tests

modules = (harness, nsa_oracle.harness, nsa_oracle.optimized, nsa_oracle.reference, optimized, reference, tests)
print(json.dumps({module.__name__: module.__file__ for module in modules}))
"""


def modules(folder: Path) -> set[str]:
    """The Python files, C headers, templates and cases of a folder of the checkout, as paths within its parent."""
    files = [*folder.rglob("*.py"), *folder.rglob("*.h"), *folder.rglob("templates/*"), *folder.glob("cases/*.json")]
    return {path.relative_to(folder.parent).as_posix() for path in files}


def test_wheel_has_the_packages_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    (metadata,) = {name.partition("/")[0] for name in names} - {"nsa_oracle"}
    assert metadata.startswith("nsa_oracle-")
    assert metadata.endswith(".dist-info")
    own = {f"nsa_oracle/{path.name}" for path in (PROJECT / "nsa_oracle").glob("*.py")}
    expected = own.union(*({f"nsa_oracle/{name}" for name in modules(PROJECT / part)} for part in PARTS))
    assert {name for name in names if name.startswith("nsa_oracle/")} == expected


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
    count = run(site, tmp_path, "-c", "from nsa_oracle.harness.scenarios.files import *; print(len(shipped_cases()))")
    assert int(count) > 60
