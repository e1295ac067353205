"""The oracle's run as a test module: ``pytest --pyargs nsa_oracle.harness.suite --oracle-backend MODULE:ATTRIBUTE``."""

from __future__ import annotations

from nsa_oracle.harness.decorator import SAVED_IF_ANY, judged


@judged(cases=[SAVED_IF_ANY])
def test_saved_case() -> None:
    """Every saved case, or those of --oracle-replay, holds."""


@judged(cases=["metadata"])
def test_scenarios() -> None:
    """No drawn scenario makes the backend differ from the reference in one live bit."""


@judged(cases=["layers"])
def test_layers() -> None:
    """No drawn scenario with an attention layer makes a stage of it differ, or depend on what must not matter."""
