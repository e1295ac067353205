"""Links between pages, and everything that the pages name: files, modules, attributes."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

from tests.support.pages import PAGES, anchors, code, fenced, links
from tests.support.project import PROJECT

each_page = pytest.mark.parametrize("name", PAGES)
ADDED_BY_THE_READER = {"tests/test_my_backend.py", "tests/cases/block-table-not-refreshed.json", "tests/bugs/NAME.json"}


@each_page
def test_relative_links_resolve(name: str) -> None:
    folder = (PROJECT / name).parent
    for path, anchor in links(PAGES[name]):
        target = (folder / path).resolve() if path else PROJECT / name
        assert target.exists(), path
        if anchor:
            linked = target / "README.md" if target.is_dir() else target
            assert anchor in anchors(linked.read_text(encoding="utf-8")), f"{path}#{anchor}"


def test_every_page_is_linked_from_the_readme_or_an_index() -> None:
    linked = {
        ((PROJECT / name).parent / path).resolve()
        for name in ("README.md", "docs/README.md")
        for path, _ in links(PAGES[name])
    }
    assert {name for name in PAGES if (PROJECT / name).resolve() not in linked} <= {"README.md"}


@each_page
def test_named_files_exist(name: str) -> None:
    """Paths set as code; what a run creates (failures/, reports/) and what the reader adds is not there yet."""
    top = r"harness|reference|optimized|nsa_oracle|tests|docs|\.github|\.ci"
    named = set(re.findall(rf"(?<![\w/.])((?:{top})/[\w./-]*\w)", code(PAGES[name])))
    assert [path for path in sorted(named - ADDED_BY_THE_READER) if not (PROJECT / path).exists()] == []


@each_page
def test_symbols_stand_in_the_files_that_are_named_for_them(name: str) -> None:
    """As in: ``STAGES`` of ``harness/protocol.py``."""
    prose = " ".join(PAGES[name].split())
    for symbol, path in re.findall(r"`(\w+)(?:\(\))?` (?:in|of) `((?:harness|optimized|reference)/[\w/]+\.py)`", prose):
        source = (PROJECT / path).read_text(encoding="utf-8")
        assert re.search(rf"^(?:class |(?:async )?def )?{symbol}\b", source, re.MULTILINE), f"{symbol} of {path}"


def test_modules_named_in_the_layout_table_exist() -> None:
    """Rows of the table of packages in CONTRIBUTING.md are files and folders of harness/; none is left out."""
    rows = re.findall(r"^\| ((?:`[\w./]+`(?:, )?)+) \|", PAGES["CONTRIBUTING.md"], re.MULTILINE)
    named = {path.rstrip("/") for row in rows for path in re.findall(r"`([\w./]+)`", row)}
    there = {path.name for path in (PROJECT / "harness").iterdir() if not path.name.startswith("__")}
    assert named == there


@each_page
def test_named_attributes_exist(name: str) -> None:
    """``module:attribute`` of the examples, and dotted names of the package."""
    said = code(PAGES[name])
    for module, attribute in re.findall(r"\b(docs\.examples\.\w+):(\w+)", said):
        assert hasattr(importlib.import_module(module), attribute), f"{module}:{attribute}"
    for dotted in re.findall(r"`(nsa_oracle\.[\w.]+)`", PAGES[name]):
        module, _, attribute = dotted.rpartition(".")
        if attribute[0].isupper():
            assert hasattr(importlib.import_module(module), attribute), dotted
        else:
            importlib.import_module(dotted)


@each_page
def test_python_blocks_are_python(name: str) -> None:
    for block in fenced("python", PAGES[name]):
        ast.parse(block)
