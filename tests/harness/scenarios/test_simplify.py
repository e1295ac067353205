"""Simplifying a finished record: what a failure does not need goes, what it needs stays."""

from __future__ import annotations

import pytest

from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Finish, Join, Remap, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Inputs, IntDtype, Layer, Mirror, Order, PageLayout, Regime, Setup
from nsa_oracle.harness.scenarios.simplify import MOST_TRIALS, SIMPLEST_SETUP, simplify
from nsa_oracle.reference.types import ForwardMode, KVCacheDtype

EVERYTHING = Scenario(
    setup=Setup(
        page_size=16,
        max_context_len=67,
        index_topk=8,
        num_steps=3,
        num_draft_tokens=4,
        paged_mqa_num_sms=3,
        flashmla_num_sm_parts=2,
        pool_size=4,
        page_layout=PageLayout.SHUFFLED,
    ),
    optimizations=("precompute", "batched_copy"),
    seed=7,
    events=(
        Capture(mode=ForwardMode.DECODE, buckets=(1, 2, 4)),
        Capture(mode=ForwardMode.TARGET_VERIFY, buckets=(2,)),
        Join(seq_len=5),
        Join(seq_len=9, prefix_of=0),
        Replay(mode=ForwardMode.TARGET_VERIFY, times=3),
        Accept(accept_lengths=(1, 2)),
        Remap(request=0, prefix_of=1),
        Replay(mode=ForwardMode.DECODE, bucket=4, mirror=Mirror.STALE, order=Order.REVERSED, times=2),
    ),
)


def test_only_what_the_failure_needs_is_left() -> None:
    """A failure that needs a DECODE bucket of 4, a second join and a stale mirror keeps just these."""

    def still_fails(scenario: Scenario) -> bool:
        captured = any(isinstance(e, Capture) and 4 in e.buckets for e in scenario.events)
        joins = sum(isinstance(e, Join) for e in scenario.events)
        stale = any(isinstance(e, Replay) and e.mirror is Mirror.STALE for e in scenario.events)
        return captured and joins == 2 and stale and "batched_copy" in scenario.optimizations

    smallest = simplify(EVERYTHING, still_fails)
    assert smallest.events == (
        Capture(mode=ForwardMode.DECODE, buckets=(4,)),
        Join(seq_len=5),
        Join(seq_len=9),
        Replay(mode=ForwardMode.DECODE, mirror=Mirror.STALE),
    )
    assert smallest.optimizations == ("batched_copy",)
    assert smallest.seed == 0
    assert {name: getattr(smallest.setup, name) for name in SIMPLEST_SETUP} == SIMPLEST_SETUP


def test_nothing_changes_when_everything_is_needed() -> None:
    assert simplify(EVERYTHING, lambda scenario: False) == EVERYTHING


def test_candidates_are_valid_and_few() -> None:
    """Every candidate is a scenario that could be saved, and a failure of any scenario ends in good time."""
    tried: list[Scenario] = []

    def still_fails(scenario: Scenario) -> bool:
        tried.append(scenario)
        return True

    assert simplify(EVERYTHING, still_fails).events == ()
    assert len(tried) <= MOST_TRIALS
    assert all(Scenario.model_validate(scenario.model_dump()) == scenario for scenario in tried)


LAYER = Layer(
    num_heads=64,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    index_n_heads=32,
    index_head_dim=128,
    kv_cache_dtype=KVCacheDtype.FP8,
    regime=Regime.RANDOM,
    far_slots=True,
)
WITH_LAYER = EVERYTHING.model_copy(update={"setup": EVERYTHING.setup.model_copy(update={"layer": LAYER})})


def smallest_layer(kept: dict[str, object]) -> Layer | None:
    """Of a failure that needs the layer to have these sizes, or at least these numbers."""

    def still_fails(scenario: Scenario) -> bool:
        layer = scenario.setup.layer
        sizes = {} if layer is None else dict(layer)
        return all(
            sizes.get(name, 0) >= value if type(value) is int else sizes.get(name) == value  # type: ignore[operator]
            for name, value in kept.items()
        )

    return simplify(WITH_LAYER, still_fails).setup.layer


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        ({}, None),
        ({"num_heads": 1}, Layer(num_heads=1, index_n_heads=1)),
        ({"num_heads": 2}, Layer(num_heads=2, index_n_heads=1)),
        ({"regime": Regime.RANDOM}, Layer(num_heads=1, index_n_heads=1, regime=Regime.RANDOM)),
        ({"kv_cache_dtype": KVCacheDtype.FP8}, Layer(num_heads=1, index_n_heads=1, kv_cache_dtype=KVCacheDtype.FP8)),
        ({"far_slots": True}, Layer(num_heads=1, index_n_heads=1, far_slots=True)),
        ({"index_n_heads": 2}, Layer(num_heads=1, index_n_heads=2)),
    ],
)
def test_layer_gets_as_small_as_the_failure_allows(kept: dict[str, object], left: Layer | None) -> None:
    assert smallest_layer(kept) == left


def test_layer_of_production_width_keeps_its_width_and_loses_its_heads() -> None:
    layer = smallest_layer({"kv_lora_rank": 512})
    assert layer is not None
    assert (layer.kv_lora_rank, layer.num_heads, layer.index_n_heads) == (512, 1, 1)
    assert (layer.kv_cache_dtype, layer.regime, layer.far_slots) == (KVCacheDtype.BF16, Regime.DOMINATING, False)


def test_as_few_finish_as_the_failure_allows() -> None:
    finish = Finish(request=5, count=7)
    drained = EVERYTHING.model_copy(update={"events": (finish,)})

    def finishing(scenario: Scenario) -> int:
        return sum(event.count for event in scenario.events if isinstance(event, Finish))

    for least, left in ((1, 1), (2, 2), (3, 4), (5, 7)):
        smallest = simplify(drained, lambda scenario, least=least: finishing(scenario) >= least)
        assert smallest.events == (Finish(request=0, count=left),)


def test_inputs_get_as_plain_as_the_failure_allows() -> None:
    inputs = Inputs(seq_lens=IntDtype.INT32, strided=True, wide_req_to_token=True, far_req_to_token=True)
    scenario = EVERYTHING.model_copy(update={"setup": EVERYTHING.setup.model_copy(update={"inputs": inputs})})
    assert simplify(scenario, lambda other: other.setup.inputs.strided).setup.inputs == Inputs(strided=True)
