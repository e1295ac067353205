"""Counts of a layer's stages add up."""

from __future__ import annotations

from nsa_oracle.harness.checks.tally import LayerTally


def test_tallies_add_up() -> None:
    one, other = LayerTally(), LayerTally()
    for tally, worst in ((one, 0.25), (other, 0.5)):
        stage = tally.stage("out")
        stage.exact, stage.bounded, stage.weaker, stage.worst = 1, 2, 3, worst
        tally.count("again")
        tally.replays = 4
    other.stage("lse").exact = 7
    one.add(other)
    assert vars(one.stages["out"]) == {"exact": 2, "bounded": 4, "weaker": 6, "worst": 0.5, "declared": ""}
    assert one.stages["lse"].exact == 7
    assert (one.relations, one.replays) == ({"again": 2}, 8)
