"""The closing report of a run."""

from __future__ import annotations

import os
import re

import pytest
from rich.table import Table

from nsa_oracle.harness.checks.tally import LayerTally
from nsa_oracle.harness.judge import Verdict
from nsa_oracle.harness.protocol import Strictness
from nsa_oracle.harness.report import text
from nsa_oracle.harness.report.summary import summary
from nsa_oracle.harness.scenarios.switches import NO_SWITCHES


def test_what_is_declared_is_reported() -> None:
    layers = LayerTally()
    layers.stage("out").count_weaker(1024, Strictness.BOUND)
    layers.stage("out").worst = 0.5
    layers.stage("indices").count_weaker(8, Strictness.SAME_SET)
    reported = summary(Verdict(layers=layers), [], 0, NO_SWITCHES)
    assert re.search(r"│ out +│ 0 +│ 0 +│ 0.5 +│ 0 +│ 1,024 within the error bound +│", reported)
    assert re.search(r"│ indices +│ 0 +│ 0 +│ - +│ 0 +│ 8 the same tokens in any order, ties forgiven +│", reported)


def test_rows_of_a_table_are_broken_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("property", "first violation")
    table.add_row("one", "word " * 80)
    monkeypatch.setattr(os, "isatty", lambda descriptor: False)
    assert len(text.render(table).splitlines()) == 5
    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    broken = text.render(table).splitlines()
    assert len(broken) > 5
    assert max(map(len, broken)) <= text.text_width()
