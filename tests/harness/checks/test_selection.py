"""How a wrong selection is named, and what a layer may declare about the order of one."""

from __future__ import annotations

import pytest
import torch

from nsa_oracle.harness.checks.tally import LayerTally
from nsa_oracle.harness.engine.observations import Feed
from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.protocol import Strictness
from nsa_oracle.harness.scenarios.scenario import Eager
from nsa_oracle.harness.scenarios.setup import Regime
from tests.support.layer_cases import case
from tests.support.metadata_cases import EXTEND, VERIFY
from tests.support.seen_layers import MADE_UP, TWO, outputs, put, seen, verified


def test_position_is_reported_by_entry() -> None:
    clean = verified(feed=Feed.ISOLATED)
    positions = clean.layer.steps[0].positions
    assert positions is not None
    wrong = int(positions[3, 1]) + 20
    finding = clean.found(put("topk_indices", (3, 1), wrong))
    assert (finding.field, finding.place) == ("topk_indices", "row 3 (request 1, draft token 1), entry 1")
    assert (finding.got, finding.expected) == (str(wrong), str(int(positions[3, 1])))
    assert len(finding.neighbours) == 4


def test_slot_is_reported_with_its_owner() -> None:
    clean = verified()
    indices = clean.layer.steps[0].outputs.indices
    finding = clean.found(put("indices", (3, 2), 9))
    assert finding.field == "indices"
    assert finding.got == "slot 9 (running request 0, position 5)"
    assert finding.expected.startswith(f"slot {int(indices[3, 2])} (running request 1, position ")
    assert clean.found(put("indices", (3, 2), -1)).got == "-1"
    assert clean.found(put("indices", (3, 2), 71)).got == "slot 71 (no running request)"


def test_place_in_the_concatenated_keys_is_compared() -> None:
    clean = seen(case(*TWO, Eager(mode=EXTEND, extend_lens=(2,))), Feed.ISOLATED)
    ragged = clean.layer.steps[0].ragged
    assert ragged is not None
    assert ragged[2, 0] == 11, "the second request's keys begin behind the first's"
    finding = clean.found(put("topk_ragged", (2, 0), 0))
    assert (finding.field, finding.got, finding.expected) == ("topk_ragged", "0", "11")


SAME_SET = dict.fromkeys(("topk_indices", "indices", "topk_ragged"), Strictness.SAME_SET)


@pytest.mark.parametrize("name", SAME_SET)
def test_same_set_forgives_the_order(name: str) -> None:
    clean = seen(case(*TWO, Eager(mode=EXTEND, extend_lens=(2,)), index_topk=4), Feed.ISOLATED)
    reverse = outputs(name, lambda tensor: tensor.copy_(tensor.flip(1)))
    assert clean.found(reverse).field == name
    tally = LayerTally()
    assert clean.judged(reverse, weaker={name: Strictness.SAME_SET}, tally=tally) is None
    stage = tally.stages[name]
    assert (stage.exact, stage.weaker) == (0, (4 + (0 if name == "indices" else MADE_UP)) * 4)
    others = (other for other in SAME_SET if other != name)
    assert all(tally.stages[other].weaker == 0 for other in others), "what is not declared stays strict"


def test_same_set_forgives_ties_only() -> None:
    """EQUAL content ties all scores: any members do. LATTICE has a best one that must be there."""
    ties, lattice = verified(Regime.EQUAL, feed=Feed.ISOLATED), verified(Regime.LATTICE, feed=Feed.ISOLATED)
    positions = ties.layer.steps[0].positions
    assert positions is not None
    assert positions[0].tolist() == [0, 1, 2, 3]
    other = outputs("topk_indices", lambda tensor: tensor[0].copy_(torch.tensor([11, 3, 7, 5])))
    assert ties.found(other).field == "topk_indices"
    assert ties.judged(other, weaker=SAME_SET) is None

    logits = lattice.layer.steps[0].outputs.logits[0, :12]
    worst = int(logits.argmin())
    finding = lattice.found(put("topk_indices", (0, 3), worst), weaker=SAME_SET)
    assert (finding.kind, finding.field) == (Kind.VALUE, "topk_indices")
    assert finding.place.startswith("row 0 (request 0, draft token 0), ")


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param([0, 1, 2, 2], id="twice"),
        pytest.param([0, 1, 2, -1], id="one too few"),
        pytest.param([0, 1, 2, 12], id="beyond the row"),
        pytest.param([0, 1, 2, 1000], id="beyond everything"),
        pytest.param([0, 1, 2, -2], id="less than nothing"),
        pytest.param([-1, -1, -1, -1], id="nothing"),
    ],
)
def test_same_set_does_not_forgive(wrong: list[int]) -> None:
    ties = verified(Regime.EQUAL, feed=Feed.ISOLATED)
    change = outputs("topk_indices", lambda tensor: tensor[0].copy_(torch.tensor(wrong)))
    assert ties.found(change, weaker=SAME_SET).field == "topk_indices"


def test_same_set_does_not_forgive_another_requests_slot() -> None:
    ties = verified(Regime.EQUAL)
    assert ties.found(put("indices", (0, 0), 21), weaker=SAME_SET).got == "slot 21 (running request 1, position 1)"


def test_same_set_of_a_short_row_may_have_its_gaps_anywhere() -> None:
    short = seen(case(*TWO, Eager(mode=VERIFY), index_topk=8), Feed.ISOLATED)
    gaps = outputs("topk_indices", lambda tensor: tensor[2].copy_(torch.tensor([-1, 3, -1, 0, 2, 1, -1, -1])))
    assert short.found(gaps).field == "topk_indices"
    assert short.judged(gaps, weaker=SAME_SET) is None
