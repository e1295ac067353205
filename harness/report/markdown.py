"""What a run says in GitHub Actions: a summary in Markdown, and annotations at lines of the judged code."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from nsa_oracle.harness.errors import counted, one_line
from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.report.document import FoundReport, RunReport

SUMMARY = "GITHUB_STEP_SUMMARY"
"""The variable that names the file of the summary. Whoever sets it is shown annotations, too."""
NOT_WRITTEN = "NOT WRITTEN"
"""What a line begins with that says why a report was not written."""
MOST_SUMMARY_BYTES = 500_000  # GitHub shows no summary of a step beyond 1 MiB, and others may have written to it
MOST_CASE_BYTES = 60_000
MOST_STORY_LETTERS = 20_000
RAISED = (Kind.CRASH.value, Kind.LAYER_CRASH.value, Kind.TIMEOUT.value, Kind.CAPTURE.value)


def told_in_a_workflow(report: RunReport) -> list[str]:
    """Append a summary to that of the step, in a workflow of GitHub. Returns lines to print: annotations, or a refusal
    to write.
    """
    if not (summary := os.environ.get(SUMMARY)):
        return []
    lines = list(error_annotations(report, Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd())))
    try:
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(markdown_summary(report))
    except OSError as error:
        lines.append(f"{NOT_WRITTEN}: {SUMMARY} {one_line(summary)}: {error.strerror or error}")
    return lines


def markdown_summary(report: RunReport) -> str:
    """The verdict, the counts, and each finding folded, with its story, its replay line and its case.

    Findings that do not fit are told by their sentences.
    """
    totals = report.totals
    head = ["cases", "replays", "eager calls", "cells compared", "cases failed", "findings", "seconds"]
    numbers = (totals.cases, totals.replays, totals.eager_calls, totals.cells, totals.failing_cases, totals.findings)
    lines = [
        f"### Oracle: {report.verdict.value}",
        "",
        _row(head),
        _row(["---:"] * len(head)),
        _row([*(f"{number:,}" for number in numbers), f"{report.seconds:,.0f}"]),
        "",
    ]
    if report.bugs.planted:
        lines += [f"{report.bugs.killed} of {counted(report.bugs.planted, 'planted bug')} killed.", ""]
    lines += [f"- {html.escape(gap)}" for gap in report.gaps]
    lines += [f"- failed without a finding: `{one_line(test).replace('`', '')}`" for test in report.failed_otherwise]
    text = "\n".join([*lines, ""])
    for found in (found for subject in report.subjects for found in subject.found):
        folded = _folded(found)
        if len((text + folded).encode(errors="replace")) > MOST_SUMMARY_BYTES:
            folded = f"- {html.escape(found.sentence)}\n"
        if len((text + folded).encode(errors="replace")) > MOST_SUMMARY_BYTES:
            break
        text += folded
    return text.encode(errors="replace").decode()


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _folded(found: FoundReport) -> str:
    alike = f" ({counted(1 + len(found.equal), 'case')})" if found.equal else ""
    parts = [f"\n<details><summary>{html.escape(found.sentence)}{alike}</summary>\n"]
    if found.story:
        story = found.story
        parts.append(_fenced("text", story if len(story) <= MOST_STORY_LETTERS else story[:MOST_STORY_LETTERS] + "..."))
    if found.finding is not None and found.finding.stack:
        parts.append(_fenced("text", "\n".join(found.finding.stack)))
    if found.replay:
        parts.append(_fenced("sh", found.replay))
    if found.case is not None:
        case = _case(found)
        kept = f"The case is saved as `{one_line(found.saved).replace('`', '')}`.\n" if found.saved else ""
        parts.append(_fenced("json", case) if len(case) <= MOST_CASE_BYTES else kept)
    return "\n".join([*parts, "</details>\n"])


def _case(found: FoundReport) -> str:
    """The case as text, one event per line, as in its file."""
    assert found.case is not None
    events = found.case.get("events") or []
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in found.case.items() if name != "events"]
    body = ",\n".join(f"    {json.dumps(event)}" for event in events)
    lines.append(f'  "events": [\n{body}\n  ]' if events else '  "events": []')
    return "{\n" + ",\n".join(lines) + "\n}"


def _fenced(language: str, text: str) -> str:
    """A block of code that nothing in ``text`` can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}\n"


def error_annotations(report: RunReport, root: Path) -> Iterator[str]:
    """A workflow command for each finding whose exception came from a line of a file below ``root``, the checkout."""
    for found in (found for subject in report.subjects for found in subject.found):
        if found.finding is None or found.kind not in RAISED:
            continue
        places = [*found.finding.stack[-1:], found.finding.place]
        place = next((match for text in places if (match := re.match(r"(.+):(\d+) in ", text))), None)
        if place is None or not Path(place[1]).is_relative_to(root):
            continue
        file = str(Path(place[1]).relative_to(root))
        said = f"{found.sentence}\nreplay: {found.replay}"
        title = _escaped(f"oracle: {found.kind}", ":,")
        yield f"::error file={_escaped(file, ':,')},line={place[2]},title={title}::{_escaped(said)}"


def _escaped(text: str, also: str = "") -> str:
    """``text`` for a workflow command, which ends at a line's end. also: further letters that have a meaning there."""
    return "".join(f"%{ord(letter):02X}" if letter in f"%\r\n{also}" else letter for letter in text)
