"""The commands report and merge: what they write, and what they refuse in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nsa_oracle.harness.__main__ import app
from nsa_oracle.harness.report.document import RunReport, report_as_json, report_from_json, report_schema
from tests.support.command_line import assert_one_line_error, harness
from tests.support.reports import failed, reported, subject


def written(folder: Path, report: RunReport, name: str) -> str:
    (folder / name).write_text(report_as_json(report), encoding="utf-8")
    return str(folder / name)


@pytest.fixture(autouse=True)
def _outside_of_a_workflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


def test_page_is_written_of_each_file(tmp_path: Path) -> None:
    files = [written(tmp_path, reported(subject(failed())), "a.json"), written(tmp_path, reported(subject()), "b.json")]
    done = CliRunner().invoke(app, ["report", *files, "--html", str(tmp_path / "deep" / "page.html")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert "a.json" in text
    assert "b.json" in text
    assert "page.html: 2 reports, " in done.output


def test_schema_is_printed() -> None:
    assert CliRunner().invoke(app, ["report", "--schema"]).output == report_schema()


def test_merged_report_tells_what_failed(tmp_path: Path) -> None:
    files = [
        written(tmp_path, reported(subject(failed()), shard="1/2"), "1.json"),
        written(tmp_path, reported(subject(failed()), shard="2/2"), "2.json"),
    ]
    done = CliRunner().invoke(app, ["merge", *files, "-o", str(tmp_path / "whole.json")])
    assert done.exit_code == 1
    first, replay, last = done.output.splitlines()
    assert first.startswith("FAILED (2 cases): wrong value: real_page_table")
    assert replay == "  nsa-oracle replay real_page_table.json"
    assert last == "oracle: 2 reports merged: 4 cases passed, 12 replays, failed"
    whole = report_from_json((tmp_path / "whole.json").read_text(), "whole")
    assert whole.totals.failing_cases == 2


def test_merged_report_is_told_in_a_workflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    file = written(tmp_path, reported(subject()), "1.json")
    assert CliRunner().invoke(app, ["merge", file, "-o", str(tmp_path / "whole.json")]).exit_code == 0
    assert (tmp_path / "summary.md").read_text().startswith("### Oracle: passed")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["report"], ["name at least one JSON file, and the page with --html"]),
        (["report", "a.json"], ["name at least one JSON file, and the page with --html"]),
        (["report", "absent.json", "--html", "x.html"], ["absent.json: cannot be read"]),
        (["report", "a.json", "--html", "."], ["--html .: cannot be written: it is a folder"]),
        (["report", "a.json", "--html", "a.json/page.html"], ["--html a.json/page.html: cannot be written"]),
        (["merge", "a.json", "b.json", "-o", "x.json"], ["shard 1/2 is given twice"]),
        (["merge", "kills.json", "-o", "x.json"], ["kills.json: is not a report of a run"]),
        (["report", "a.json", "--html", "pipe"], ["--html pipe: cannot be written: it is a pipe; name a file"]),
        (["merge", "a.json", "-o", "pipe"], ["--output pipe: cannot be written: it is a pipe; name a file"]),
        (["merge", "a.json", "-o", "."], ["--output .: cannot be written"]),
    ],
)
def test_wrong_use_is_refused_in_one_line(words: list[str], parts: list[str], tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        written(tmp_path, reported(subject(), shard="1/2"), name)
    (tmp_path / "kills.json").write_text("[]")
    os.mkfifo(tmp_path / "pipe")
    assert_one_line_error(harness(*words, cwd=tmp_path), *parts)
