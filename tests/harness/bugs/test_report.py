"""The kill matrix: a line for each bug, whatever its case."""

from __future__ import annotations

from nsa_oracle.harness.bugs.kill import Kill
from nsa_oracle.harness.bugs.report import kills_table, one_line_story
from nsa_oracle.harness.bugs.zoo import ZOO
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.report.text import UNBROKEN, render
from nsa_oracle.harness.scenarios.files import to_json
from tests.support.metadata_cases import CROWDED

BUG = ZOO["workspace-cleared-by-the-mirror"]
THREE = [ZOO["limit-frozen-above-the-capture"], BUG, ZOO["maximum-of-no-lengths"]]


def test_a_bug_is_a_line_whatever_its_case() -> None:
    long = CROWDED.model_copy(update={"events": CROWDED.events * 40})
    kills = [
        Kill(BUG.name, Check.CAPTURE, True, 7, 3.6, case=to_json(long)),
        Kill(THREE[0].name, Check.METADATA, False, 2, 1.2, case=to_json(CROWDED)),
        Kill(THREE[2].name, None, False, 200, 9.0),
    ]
    head, *lines = render(kills_table(kills), UNBROKEN).splitlines()
    assert head.split() == ["bug", "check", "cases", "seconds", "smallest", "case"]
    assert [line.split()[0] for line in lines] == [BUG.name, THREE[0].name, THREE[2].name]
    assert one_line_story(long) in lines[0]
    assert lines[0].split()[1:4] == ["capture", "7", "4"]
    assert lines[1].split()[1:5] == ["metadata", "?", "2", "1"]  # not by the check that is meant to
    assert lines[2].split()[1:] == ["200", "9", "SURVIVED"]
