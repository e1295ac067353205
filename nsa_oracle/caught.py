"""Failures of ``nsa_oracle.harness.judge`` that tests have caught: told, because a test that catches one is green.

Imports nothing of the oracle, as the plugin's hooks do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

CAUGHT = "oracle_caught"  # property of a test report: how many its test has caught
_NAMED = 3  # tests, in the line


def failures_raised() -> int:
    """How often ``judge`` has raised OracleFailure in this process."""
    judge = sys.modules.get("nsa_oracle.harness.judge")
    return 0 if judge is None else int(judge.OracleFailure.raised)


def caught_line(reports: Iterable[Any], verbose: bool) -> str:
    """The line that names the tests which have caught failures; empty if none has. reports: of tests that passed."""
    found = {
        report.nodeid: int(value)
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == CAUGHT and getattr(report, "when", "") == "call"
    }
    if not found:
        return ""
    names = list(found) if verbose else list(found)[:_NAMED]
    more = f" and {len(found) - len(names)} more (-v names them)" if len(names) < len(found) else ""
    count = sum(found.values())
    failures = "1 failure of judge was" if count == 1 else f"{count:,} failures of judge were"
    return f"oracle: {failures} caught by tests that passed: {', '.join(names)}{more}"
