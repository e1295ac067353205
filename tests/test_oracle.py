"""The main job: the oracle judges a backend, by default ``optimized/``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nsa_oracle.harness.plugin import Oracle
from nsa_oracle.harness.search.explore import Exploration

Conclude = Callable[[Exploration], None]


def test_saved_case(oracle: Oracle, verdict_of: Conclude, saved_case: Path) -> None:
    """Every case of the corpus, or those of --oracle-replay, holds."""
    verdict_of(oracle.judge_file(saved_case))


def test_scenarios(oracle: Oracle, verdict_of: Conclude, shard: int) -> None:
    """No scenario of this shard makes the backend differ from the reference in one live bit."""
    verdict_of(oracle.explore(shard))


def test_layers(oracle: Oracle, verdict_of: Conclude, shard: int) -> None:
    """No scenario with an attention layer makes a stage of it differ, or depend on what must not matter."""
    verdict_of(oracle.explore(shard, with_layer=True))
