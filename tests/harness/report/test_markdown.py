"""What a run says in a workflow of GitHub."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.judge import OracleFailure
from nsa_oracle.harness.report.markdown import MOST_SUMMARY_BYTES, error_annotations, markdown_summary
from nsa_oracle.harness.report.records import FailureRecord
from nsa_oracle.harness.scenarios.files import from_json
from nsa_oracle.harness.scenarios.scenario import Accept, Join
from tests.support.metadata_cases import case
from tests.support.reports import HISTORY, failed, reported, subject

ROOT = Path("/checkout")


def crashed(file: str = "/checkout/kernels/my.py", kind: Kind = Kind.CRASH, got: str = "boom") -> FailureRecord:
    """The record of an exception that line 12 of ``file`` raised."""
    place = f"{file}:12 in prepare"
    finding = Finding(
        kind, "ValueError", got, "no exception", place=place, stack=("/x.py:1 in f: f()", f"{place}: g()")
    )
    return FailureRecord.of(OracleFailure(HISTORY, finding, 3), "nsa-oracle replay c.json", "")


def test_summary_has_verdict_counts_and_each_finding_folded() -> None:
    text = markdown_summary(reported(subject(failed(), failed(scenario=case()), failed("out"))))
    assert text.startswith("### Oracle: failed\n")
    assert "| 2 | 6 | 2 | 200 | 3 | 2 | 2 |" in text
    assert text.count("<details>") == text.count("</details>") == 2
    assert "live cells differ (2 cases)</summary>" in text
    assert "```sh\nnsa-oracle replay out.json\n```" in text
    assert "lengths 7, pool rows 1.  <- fails here" in text


def test_case_in_the_summary_can_be_replayed() -> None:
    (written,) = re.findall(r"^```json\n(.*?)^```", markdown_summary(reported(subject(failed()))), re.M | re.S)
    assert from_json(written) == HISTORY
    assert len(written.splitlines()) == 6 + len(HISTORY.events), "one event per line"


def test_gaps_and_other_failures_are_listed() -> None:
    lacking = subject().model_copy(update={"gaps": ("NOT JUDGED: <it>",)})
    text = markdown_summary(reported(lacking, failed_otherwise=["test_a.py::test_b"]))
    assert "- NOT JUDGED: &lt;it&gt;" in text
    assert "- failed without a finding: `test_a.py::test_b`" in text


def test_text_of_judged_code_ends_no_block() -> None:
    odd = dataclasses.replace(failed(), command="x ```` y", sentence="</summary><script>")
    text = markdown_summary(reported(subject(odd)))
    assert "`````sh\nx ```` y\n`````" in text
    assert "<script>" not in text


def test_summary_is_below_its_limit() -> None:
    long = case(Join(seq_len=1), *[Accept(accept_lengths=(0,))] * 1500)
    text = markdown_summary(reported(subject(*(failed(f"field_{n}", scenario=long) for n in range(60)))))
    assert len(text.encode()) <= MOST_SUMMARY_BYTES
    assert "field_59" in text
    assert text.count("<details>") == text.count("</details>") > 0


def test_crash_is_annotated_at_the_line_of_the_judged_code() -> None:
    (line,) = error_annotations(reported(subject(crashed())), ROOT)
    assert line == (
        "::error file=kernels/my.py,line=12,title=oracle%3A backend raised::backend raised: ValueError at "
        "/checkout/kernels/my.py:12 in prepare: got boom, expected no exception%0Areplay: nsa-oracle replay c.json"
    )


def test_annotation_is_one_line_whatever_was_raised() -> None:
    (line,) = error_annotations(reported(subject(crashed("/checkout/a,b:c.py", got="100%\r\n::warning::x"))), ROOT)
    assert line.startswith("::error file=a%2Cb%3Ac.py,line=12,")
    assert "got 100%25%0D%0A::warning::x" in line
    assert len(line.splitlines()) == 1


def test_only_lines_of_the_checkout_are_annotated() -> None:
    others = [crashed("/elsewhere/my.py"), failed(), crashed(kind=Kind.VALUE)]
    died = FailureRecord("died", "process", "killed", "", "")
    for record in (*others, died):
        assert list(error_annotations(reported(subject(record)), ROOT)) == []
