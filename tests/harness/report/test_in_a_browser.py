"""The page in a real browser: it is readable on a wide and a narrow screen, and its button copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_oracle.harness.report.page import PageContent, page
from tests.support.browser import BROWSER, NO_BROWSER, screenshot, seen_by_script
from tests.support.reports import failed, reported, subject

pytestmark = pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)

FAILING = page(PageContent((("run.json", reported(subject(failed(), failed("out")))),)))
PASSING = page(PageContent((("run.json", reported(subject())),)))


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("html", [FAILING, PASSING], ids=["failing", "passing"])
def test_page_is_not_wider_than_the_screen(html: str, width: int, tmp_path: Path) -> None:
    script = "return [view.innerWidth, page.documentElement.scrollWidth]"
    inner, content = seen_by_script(html, script, tmp_path, width)
    assert inner == width
    assert content <= width


def test_wrong_cell_is_shown_with_its_values(tmp_path: Path) -> None:
    script = """
    const cell = page.querySelector("td.x"), row = cell.closest("tr"), at = cell.getBoundingClientRect();
    return [cell.title, row.cells[0].textContent, view.getComputedStyle(cell).backgroundColor, at.width > 10]"""
    title, owner, colour, is_visible = seen_by_script(FAILING, script, tmp_path)
    assert title == "got 1515870810, expected 2"
    assert owner == "row 0 (request 0, draft token 0)"
    assert (colour, is_visible) == ("rgb(207, 34, 46)", True)


@pytest.mark.parametrize("clipboard", ["allowed", "absent"])
def test_button_copies_the_line_that_replays(clipboard: str, tmp_path: Path) -> None:
    """With the clipboard of secure pages, and with a selection where there is none."""
    script = f"""
    let copied = null;
    const fake = {{ writeText: async (text) => {{ copied = text; }} }};
    const given = "{clipboard}" === "allowed" ? fake : undefined;
    Object.defineProperty(view.navigator, "clipboard", {{ value: given }});
    page.execCommand = () => {{ copied = view.getSelection().toString(); return true; }};
    const button = page.querySelectorAll("button")[1];
    button.click();
    await new Promise((done) => setTimeout(done, 100));
    return [copied, button.textContent]"""
    assert seen_by_script(FAILING, script, tmp_path) == ["nsa-oracle replay out.json", "Copied"]


def test_failing_event_is_marked_in_the_timeline(tmp_path: Path) -> None:
    script = """
    const line = page.querySelector("svg"), mark = line.querySelector(".failing").getBoundingClientRect();
    const disc = [...line.querySelectorAll("circle.graph")].map((one) => one.getBoundingClientRect());
    return disc.filter((one) => one.left > mark.left && one.right < mark.right).length"""
    assert seen_by_script(FAILING, script, tmp_path) == 1


def test_passing_page_has_its_picture_taken(tmp_path: Path) -> None:
    file, image = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(PASSING, encoding="utf-8")
    screenshot(file, image, tmp_path, 1280, 800)
    assert image.read_bytes().startswith(b"\x89PNG")
