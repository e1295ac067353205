"""The import hook runs what it is told to run, and stands in for the rest."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsa_oracle.harness.subjects.adapters.stand_ins import NotStoodIn, Partial, constant

MODULE = """
from pack.other import Base, decorate, number, unknown
from absent.deep import thing
import json

class Derived(Base): ...

def strict():
    assert False, "checked"
    return number()
"""


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[Partial]:
    for name in ("pack/real.py", "pack/fast.py", "pack/whole/__init__.py", "pack/whole/part.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(MODULE)
    (tmp_path / "pack/__init__.py").write_text("raise RuntimeError")
    (tmp_path / "pack/other.py").write_text("raise RuntimeError")
    made = Partial(
        "pack",
        tmp_path,
        real=("pack.real", "pack.fast", "pack.whole.*"),
        values={"pack.other": {"number": constant(3)}},
        others=("absent",),
        without_asserts=("pack.fast",),
    )
    made.install()
    yield made
    sys.meta_path.remove(made)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("pack", "absent")]:
        del sys.modules[name]


def test_only_real_modules_run(hook: Partial) -> None:
    real = importlib.import_module("pack.real")
    assert real.number() == 3
    assert hook.used == {"pack.other.number"}, "of what was given"
    with pytest.raises(NotStoodIn, match=r"pack.other.unknown is only a stand-in here: it cannot be called"):
        real.unknown()
    with pytest.raises(NotStoodIn):
        real.Derived()
    assert "absent.deep" in sys.modules
    assert real.json.dumps(1) == "1", "a package that is not named is itself"


def test_assertions_are_left_out_where_asked(hook: Partial) -> None:
    assert importlib.import_module("pack.fast").strict() == 3
    with pytest.raises(AssertionError, match="checked"):
        importlib.import_module("pack.real").strict()


def test_a_package_that_has_been_imported_is_left_alone(hook: Partial) -> None:
    importlib.import_module("pack.real")
    with pytest.raises(ImportError, match="pack has been imported already"):
        hook.install()


def test_modules_have_no_other_special_names(hook: Partial) -> None:
    other = importlib.import_module("pack.other")
    assert not hasattr(other, "__wrapped__")
    assert other.anything is other.anything


def test_packages_run_whole_where_asked(hook: Partial) -> None:
    assert importlib.import_module("pack.whole").number() == 3
    assert importlib.import_module("pack.whole.part").number() == 3
    with pytest.raises(NotStoodIn):
        importlib.import_module("pack.wholesale").number()


def test_a_package_that_is_installed_gets_a_stand_in_too(hook: Partial, tmp_path: Path) -> None:
    (tmp_path / "absent.py").write_text("thing = 1")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(NotStoodIn):
            importlib.import_module("absent").thing()
    finally:
        sys.path.remove(str(tmp_path))
