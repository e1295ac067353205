"""What must not change a bit: each relation is tried on a clean layer, and caught where a layer depends on it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa_oracle.harness.checks.relations import Relation, Relations, differs
from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.engine.observations import Conditions, LayerObservation
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.judge import OracleFailure, judge, sentinels
from nsa_oracle.harness.memory.poison import POISON_BYTES
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Finish, Join, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import PageLayout, Regime
from nsa_oracle.optimized.layer import SparseAttention as Capturable
from nsa_oracle.reference.types import AttentionOutputs, ForwardMode, KVCacheDtype
from tests.support.layer_cases import BACKEND, BF16, FP8, IN_TURN, case, random, replay_of_two
from tests.support.layers.nudges import (
    NUDGE,
    AfterSomeCalls,
    AfterSomeReplays,
    InCompany,
    InFirstPlace,
    InGraphs,
    InLargerBuckets,
    OnFirstPages,
    OnPoison,
)
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND, DRAFT_EXTEND_V2, EXTEND, VERIFY


def served(
    layer: Any, scenario: Scenario, device: torch.device
) -> tuple[Engine, Callable[[Scenario], Engine], LayerObservation]:
    """An engine that has served ``scenario``, how it was built, and what its last call showed."""

    def build(scenario: Scenario) -> Engine:
        conditions = Conditions(sentinels(scenario.setup)[0], POISON_BYTES[0])
        return Engine(scenario, BACKEND, layer, device, conditions)

    engine = build(scenario)
    shown = [shown for event in scenario.events for shown in engine.run(event)]
    calls = [seen for seen in shown if isinstance(seen, LayerObservation) and not seen.again]
    return engine, build, calls[-1]


def outcomes(layer: Any, scenario: Scenario, device: torch.device) -> dict[Relation, Finding | None]:
    """Of all relations that fit the last call of ``scenario``."""
    engine, build, call = served(layer, scenario, device)
    return dict(Relations(scenario, build).check_all(engine, call))


# Clean


@pytest.mark.parametrize(
    ("mode", "dtype"), [(DECODE, FP8), (VERIFY, BF16), (DRAFT_EXTEND, FP8), (DRAFT_EXTEND_V2, BF16)]
)
def test_clean_layer_keeps_every_relation(mode: ForwardMode, dtype: KVCacheDtype, device: torch.device) -> None:
    """After a history of requests that came and went, on pages in no particular order."""
    history = (Finish(request=0), Join(seq_len=4), Accept(accept_lengths=(2, 1)))
    scenario = replay_of_two(*history, mode=mode, layer=random(dtype), page_layout=PageLayout.SHUFFLED)
    found = outcomes(Capturable, scenario, device)
    assert tuple(found) == IN_TURN
    assert set(found.values()) == {None}


def test_eager_call_has_fewer_relations(device: torch.device) -> None:
    scenario = case(Join(seq_len=9), Join(seq_len=6), Eager(mode=VERIFY), layer=random())
    found = outcomes(Capturable, scenario, device)
    assert found == {Relation.RELABELLED: None, Relation.PERMUTED: None, Relation.ALONE: None}


def test_one_request_has_no_order_and_no_company(device: torch.device) -> None:
    scenario = case(Capture(mode=DECODE, buckets=(2,)), Join(seq_len=6), Replay(mode=DECODE), layer=random())
    assert set(outcomes(Capturable, scenario, device)) == set(IN_TURN) - {Relation.PERMUTED, Relation.ALONE}


def test_empty_batch_has_none(device: torch.device) -> None:
    scenario = case(Capture(mode=DECODE, buckets=(2,)), Replay(mode=DECODE), layer=random())
    assert outcomes(Capturable, scenario, device) == {}


@pytest.mark.parametrize(("seed", "alone_fits"), [(0, True), (1, False)])
def test_request_that_reads_what_another_writes_is_not_judged_alone(
    seed: int, alone_fits: bool, device: torch.device
) -> None:
    """The first request writes all of its tokens anew, those of the shared page included; the second one reads them."""
    scenario = case(
        *(Join(seq_len=9), Join(seq_len=9, prefix_of=0, prefix_pages=1), Eager(mode=EXTEND, extend_lens=(9, 1))),
        layer=random(),
        seed=seed,  # whose turn it is, too
    )
    found = outcomes(Capturable, scenario, device)
    assert (Relation.ALONE in found) == alone_fits
    assert set(found.values()) == {None}


def test_relations_take_turns(device: torch.device) -> None:
    """From the one on that the seed says."""
    engine, build, call = served(Capturable, replay_of_two(), device)
    relations = Relations(replay_of_two(seed=3), build)
    tried = [relations.check(engine, call) for _ in range(len(IN_TURN) + 1)]
    assert tried == [(IN_TURN[turn % len(IN_TURN)], None) for turn in range(3, 11)]


# Broken, one at a time


# A layer that remembers differs from all that start anew.
BROKEN = {
    AfterSomeCalls: set(IN_TURN) - {Relation.TWICE},
    AfterSomeReplays: {Relation.TWICE},
    InGraphs: {Relation.EAGER},
    InLargerBuckets: {Relation.PADDED},
    InCompany: {Relation.ALONE},
    InFirstPlace: {Relation.PERMUTED},
    OnFirstPages: {Relation.RELABELLED},
    OnPoison: set(),
}


@pytest.mark.parametrize("layer", BROKEN, ids=lambda layer: layer.__name__)
def test_layer_breaks_just_the_relations_it_should(layer: Any, device: torch.device) -> None:
    found = outcomes(layer, replay_of_two(), device)
    assert tuple(found) == IN_TURN
    broken = {relation: finding for relation, finding in found.items() if finding is not None}
    assert set(broken) == BROKEN[layer]
    for relation, finding in broken.items():
        assert (finding.kind, finding.field, finding.step) == (Kind.RELATION, "lse", 0)
        assert finding.how == relation.value
        assert abs(float(finding.got) - float(finding.expected)) < 2 * NUDGE


@pytest.mark.parametrize(
    ("layer", "relation"),
    [
        (AfterSomeCalls, Relation.COLD),
        (AfterSomeReplays, Relation.TWICE),
        (InGraphs, Relation.EAGER),
        (InLargerBuckets, Relation.PADDED),
        (InCompany, Relation.ALONE),
        (InFirstPlace, Relation.PERMUTED),
        (OnFirstPages, Relation.RELABELLED),
        (OnPoison, Relation.POISONED),
    ],
)
def test_judge_names_the_relation(layer: Any, relation: Relation, device: torch.device) -> None:
    """The seed decides whose turn it is; content in one poison is compared with the other's whatever the turn."""
    seed = IN_TURN.index(relation) if relation in IN_TURN else 0
    with pytest.raises(OracleFailure) as caught:
        judge(replay_of_two(seed=seed), BACKEND, device, layer_factory=layer)
    finding = caught.value.finding
    assert (finding.kind, finding.field, finding.how) == (Kind.RELATION, "lse", relation.value), finding.sentence()
    assert finding.sentence().startswith("depends on what must not matter: lse at step 0, row ")
    assert f", element [0] ({relation.value}): got " in finding.sentence()
    assert caught.value.event == 3


def test_nudge_is_within_the_error_bound(device: torch.device) -> None:
    """Nothing but a relation can see it: another turn passes, all stages compared."""
    verdict = judge(replay_of_two(seed=IN_TURN.index(Relation.TWICE)), BACKEND, device, layer_factory=InFirstPlace)
    assert set(verdict.layers.relations) == {Relation.TWICE, Relation.POISONED, Relation.REPEATED}
    assert 0 < verdict.layers.stages["lse"].worst < 1


def test_relation_between_the_runs_needs_no_turn(device: torch.device) -> None:
    """Exact content is not tried against relations, but both poisons must give the same bits there as well."""
    verdict = judge(replay_of_two(layer={}), BACKEND, device)
    assert verdict.layers.relations == {Relation.POISONED: 1, Relation.REPEATED: 1}


@pytest.mark.parametrize("layer", [{}, {"regime": Regime.RANDOM}], ids=["exact", "random"])
def test_second_replay_without_a_preparation_needs_no_turn_either(layer: Any, device: torch.device) -> None:
    """The first run of a case makes one for each graph, whatever the content."""
    scenario = replay_of_two(seed=IN_TURN.index(Relation.COLD), layer=layer)
    with pytest.raises(OracleFailure) as caught:
        judge(scenario, BACKEND, device, layer_factory=AfterSomeReplays)
    finding = caught.value.finding
    assert (finding.kind, finding.field, finding.how) == (Kind.RELATION, "lse", Relation.REPEATED.value)


# The comparison itself


def step(**changes: torch.Tensor) -> AttentionOutputs:
    tensors = {
        "logits": torch.tensor([[1.0, 2.0, -torch.inf], [3.0, -torch.inf, -torch.inf]]),
        "indices": torch.tensor([[4, 5], [8, -1]], dtype=torch.int32),
        "out": torch.ones(2, 1, 4, dtype=torch.bfloat16),
        "lse": torch.tensor([[0.5], [torch.nan]]),
    }
    return AttentionOutputs(**{**tensors, **changes})


def test_same_bits_do_not_differ() -> None:
    assert differs(step(), step(), [0, 1]) is None
    assert differs(step(), step(lse=torch.tensor([[0.5]])), [0]) is None, "rows that are not asked for need not exist"


def test_zeros_of_different_sign_differ() -> None:
    one, other = step(lse=torch.tensor([[0.0], [0.0]])), step(lse=torch.tensor([[0.0], [-0.0]]))
    finding = differs(one, other, [0, 1])
    assert finding is not None
    assert (finding.field, finding.got, finding.expected) == ("lse", "-0.0", "0.0")
    assert (finding.place, finding.differing, finding.compared) == ("row 1, element [0]", 1, 2)


def test_rows_are_matched_by_place() -> None:
    """Row 1 alone is the first row of what served it alone; its place is reported as in the whole batch."""
    alone = step(
        logits=torch.tensor([[3.0, -torch.inf, -torch.inf]]),
        indices=torch.tensor([[8, -1]], dtype=torch.int32),
        out=torch.ones(1, 1, 4, dtype=torch.bfloat16),
        lse=torch.tensor([[torch.nan]]),
    )
    assert differs(step(), alone, [1]) is None
    finding = differs(step(), alone, [0])
    assert finding is not None
    assert (finding.field, finding.place) == ("logits", "row 0, element [0]")


def test_narrower_logits_are_compared_as_far_as_they_go() -> None:
    assert differs(step(), step(logits=step().logits[:, :2]), [0, 1]) is None
    other = torch.tensor([[1.0, 2.5], [3.0, -torch.inf]])
    finding = differs(step(), step(logits=other), [0, 1])
    assert finding is not None
    assert (finding.place, finding.got) == ("row 0, element [1]", "2.5")


def test_slots_are_compared_under_their_original_names() -> None:
    renamed = step(indices=torch.tensor([[5, 4], [9, -1]], dtype=torch.int32))
    names = {5: 4, 4: 5, 9: 8, -1: -1}

    def original(indices: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[names[int(slot)] for slot in row] for row in indices], dtype=torch.int32)

    assert differs(step(), renamed, [0, 1], original) is None
    finding = differs(step(), renamed, [0, 1])
    assert finding is not None
    assert finding.field == "indices"
