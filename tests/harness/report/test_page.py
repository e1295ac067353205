"""The page to look at: what it shows of each report, that it needs nothing else, and how large it may become."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nsa_oracle.harness.bugs.kill import Kill
from nsa_oracle.harness.bugs.report import as_html, as_json
from nsa_oracle.harness.bugs.zoo import ZOO
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.checks.declared import WaiverTally
from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.findings import Owner, Picture, PictureRow
from nsa_oracle.harness.report.document import report_as_json
from nsa_oracle.harness.report.page import MOST_PAGE_BYTES, PageContent, cropped, page
from nsa_oracle.harness.report.records import FailureRecord
from nsa_oracle.harness.scenarios.files import to_json
from nsa_oracle.harness.scenarios.scenario import Accept, Join
from tests.support.metadata_cases import CROWDED, case
from tests.support.reports import failed, reported, subject

VOID = {"meta", "br", "rect", "circle", "line"}


class Outline(HTMLParser):
    """Elements with their attributes, and the text; fails if tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.text += " "
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def titles(self, css: str) -> list[str | None]:
        """The ``title`` of cells of one class."""
        return [attrs.get("title") for tag, attrs in self.elements if tag == "td" and attrs.get("class") == css]


def shown(*failures: FailureRecord) -> Outline:
    return Outline(page(PageContent((("run.json", reported(subject(*failures))),))))


def test_failure_is_a_picture_with_its_case_and_its_replay() -> None:
    seen = shown(failed())
    assert seen.titles("x") == ["got 1515870810, expected 2"]
    assert seen.titles("d") == ["0, unspecified"]
    assert "row 1 (padding request 1, draft token 0)" in seen.text
    assert [attrs["class"] for tag, attrs in seen.elements if tag == "tr" and "class" in attrs] == ["p"]
    assert sum(attrs.get("class") == "failing" for _, attrs in seen.elements) == 1
    assert sum(attrs.get("class") == "bar" for _, attrs in seen.elements) == 2
    assert "6. Replay DECODE (bucket 2): lengths 7, pool rows 1.  <- fails here" in seen.text
    (button,) = [attrs for tag, attrs in seen.elements if tag == "button"]
    (line,) = [attrs for tag, attrs in seen.elements if attrs.get("id") == button["data-copies"]]
    assert "nsa-oracle replay real_page_table.json" in seen.text
    assert line["id"]


def test_unvisited_classes_come_first() -> None:
    text = " ".join(shown().text.split())
    assert "Boundary classes: 1 of 2 visited" in text
    assert text.index("length P: none") < text.index("length 1: 1")
    assert "passed" in text


def test_stages_methods_and_waivers_are_shown() -> None:
    one = subject()
    layers, declared = one.coverage.layers, one.coverage.declared
    layers.stage("out").bounded, layers.stage("out").worst = 1000, 0.625
    layers.count_calls({"sparse_mla": {"isolated stage": 12}, "topk_indices": {}})
    declared.waivers["tail"] = WaiverTally("rows that nothing reads", 40, 30, 1234)
    html = page(PageContent((("", reported(one)),)))
    text = " ".join(Outline(html).text.split())
    assert "width:62.50%" in html
    assert "isolated stage 12" in text
    assert "topk_indices none" in text
    assert "waiver tail rows that nothing reads 40 30 1,234" in text


def test_page_loads_nothing() -> None:
    html = page(PageContent((("run.json", reported(subject(failed()))),)))
    assert "default-src 'none'" in html
    assert not re.search(r"\b(?:src|href|action)=|@import|url\(|https?://|<link", html)


def test_text_of_judged_code_is_only_text() -> None:
    nasty = "</pre><script>alert(1)</script>\" onload='x'"
    record = FailureRecord("died", "process", nasty, nasty, nasty, saved="\udcff")
    html = page(PageContent(((nasty, reported(subject(record, backend=nasty))),)))
    assert "<script>alert" not in html
    assert nasty in Outline(html).text
    assert not any("onload" in attrs for _, attrs in Outline(html).elements)


def large_picture() -> Picture:
    numbers = tuple(str(10**9 + n) for n in range(64))
    rows = tuple(
        PictureRow(f"row {n} (request {n}, draft token 0)", Owner.REQUEST, "x" * 64, numbers, numbers)
        for n in range(64)
    )
    return Picture((1000, 1000), 100, 200, "column", rows)


@pytest.mark.parametrize("count", [1, 12, 100])
def test_page_of_many_findings_is_below_its_limit(count: int) -> None:
    events = (Join(seq_len=1, count=3), *[Accept(accept_lengths=(0, 1, 0))] * 150)
    long = case(*events)
    several = [failed(f"field_{number}", scenario=long, picture=large_picture()) for number in range(count)]
    html = page(PageContent((("", reported(subject(*several))),)))
    assert len(html.encode()) < MOST_PAGE_BYTES
    seen = Outline(html)
    assert all(f"field_{number}" in seen.text for number in range(count))
    assert seen.titles("x")
    assert "<- fails here" in seen.text


def test_picture_is_cut_around_its_first_wrong_cell() -> None:
    picture = large_picture()
    whole = [PictureRow(r.label, r.owner, "." * 64, r.got, r.expected) for r in picture.rows]
    whole[50] = PictureRow("here", Owner.TAIL, "." * 60 + "x...", picture.rows[0].got, picture.rows[0].expected)
    cut = cropped(Picture((1000, 1000), 100, 200, "column", tuple(whole)), 9)
    assert (len(cut.rows), {len(row.states) for row in cut.rows}) == (9, {9})
    (row,) = (row for row in cut.rows if "x" in row.states)
    assert row.label == "here"
    assert cut.column + row.states.index("x") == 200 + 60
    assert cut.row + cut.rows.index(row) == 100 + 50
    assert row.got[row.states.index("x")] == picture.rows[0].got[60]


BUG = ZOO["workspace-cleared-by-the-mirror"]
KILLS = [
    Kill(BUG.name, Check.CAPTURE, True, 7, 3.6, "wrong value: x", to_json(CROWDED)),
    Kill(BUG.name, None, False, 9, 1),
]


def test_kill_matrix_is_shown() -> None:
    text = " ".join(Outline(as_html(KILLS)).text.split())
    assert "1 of 2 killed by a check that is meant to" in text
    assert BUG.sentence in text
    assert "SURVIVED" in text


def test_each_kind_of_file_is_known() -> None:
    survey = {
        "cases": 40,
        "rows": [
            {"property": "runs", "checked": 4, "broken": 0},
            {"property": "bits", "checked": 3, "broken": 2, "steps": [0, 1]},
        ],
        "not judged": [],
    }
    benchmark = {
        "benchmarks": [
            {
                "group": "indexer rows=4",
                "param": "ours-4",
                "params": {"name": "ours"},
                "stats": {"median": 2e-5},
                "name": "t",
            }
        ]
    }
    content = PageContent()
    for name, text in (
        ("kills.json", as_json(KILLS)),
        ("survey.json", json.dumps(survey)),
        ("benchmark.json", json.dumps(benchmark)),
        ("run.json", report_as_json(reported(subject()))),
    ):
        content = content.and_file(text, name)
    text = " ".join(Outline(page(content)).text.split())
    for part in (
        "kills.json",
        "survey.json",
        "run.json",
        "indexer rows=4 ours 20.0",
        "Survey of 40 cases",
        "1 of 2 rows are broken",
    ):
        assert part in text
    assert text.index("bits 3 2 0 1") < text.index("runs 4 0"), "broken rows come first"


@pytest.mark.parametrize("text", ["[1]", '{"benchmarks": 3}', '{"rows": {}}', '{"benchmarks": [{}]}', "7", "x"])
def test_other_files_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(ScenarioError, match=r"^a\.json: is not [^\n]*$"):
        PageContent().and_file(text, "a.json")


def test_templates_are_in_one_folder() -> None:
    folder = Path(__file__).parents[3] / "harness/report/templates"
    assert {path.suffix for path in folder.iterdir()} == {".html", ".css", ".js"}
