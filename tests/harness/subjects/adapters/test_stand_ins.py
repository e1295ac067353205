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
    for name in ("pack/real.py", "pack/fast.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(MODULE)
    (tmp_path / "pack/__init__.py").write_text("raise RuntimeError")
    (tmp_path / "pack/other.py").write_text("raise RuntimeError")
    made = Partial(
        "pack", tmp_path, ("pack.real", "pack.fast"), {"pack.other": {"number": constant(3)}}, ("absent", "json"),
        ("pack.fast",),
    )  # fmt: skip
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
    assert real.json.dumps(1) == "1", "a package that exists is itself"


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
