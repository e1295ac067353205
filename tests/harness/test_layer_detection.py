"""The judge on planted layers, each named at the stage that is wrong, and on clean ones that must pass."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from itertools import dropwhile
from typing import Any

import planted_layers
import pytest
import torch
from planted import Clean as CleanBackend
from test_detection import DECODE, DRAFT_EXTEND, DRAFT_EXTEND_V2, EXTEND, VERIFY, factory_of, matches

from nsa_oracle.harness.checks.relations import Relation
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.judge import OracleFailure, Verdict, judge
from nsa_oracle.harness.scenarios.regime import Regime
from nsa_oracle.harness.scenarios.scales import SMALL_LAYER
from nsa_oracle.harness.scenarios.scenario import (
    GRAPH_MODES,
    Accept,
    Capture,
    Eager,
    Event,
    Finish,
    Join,
    Layer,
    Order,
    PageLayout,
    Replay,
    Scenario,
    Setup,
)
from nsa_oracle.harness.scenarios.strategies import scenarios
from nsa_oracle.harness.search.drawing import draw
from nsa_oracle.reference.types import ForwardMode, KVCacheDtype, StepSemantics

BACKEND = factory_of(CleanBackend)
BF16, FP8 = KVCacheDtype.BF16, KVCacheDtype.FP8
ISOLATED, CHAIN, GRAPH = "isolated stage", "eager chain", "captured chain"
FAR, FAR_FP8 = "slots far apart", "slots far apart, FP8"
MORE_THAN_K, FEWER_THAN_K, NO_TOKEN = (
    "verify, more keys than K",
    "verify, FP8, fewer keys than K",
    "rows without a token",
)
RANDOM, RELATIONS = "prefill, random", "verify and draft, random"


def case(*events: Event, layer: Mapping[str, Any] | None = None, seed: int = 0, **setup: Any) -> Scenario:
    """A scenario on a pool of 3 rows of 5 pages of 4 tokens, with a layer of 2 heads that keeps 8 keys."""
    sizes = {
        "page_size": 4,
        "max_context_len": 20,
        "index_topk": 8,
        "num_steps": 1,
        "num_draft_tokens": 2,
        "pool_size": 3,
    }
    return Scenario(setup=Setup(**{**sizes, **setup}, layer=Layer(**(layer or {}))), seed=seed, events=events)


def lattice(dtype: KVCacheDtype = BF16) -> dict[str, Any]:
    return {"regime": Regime.LATTICE, "kv_cache_dtype": dtype}


def random(dtype: KVCacheDtype = BF16, heads: int = 2) -> dict[str, Any]:
    return {"regime": Regime.RANDOM, "kv_cache_dtype": dtype, "num_heads": heads}


long_and_short = (Join(seq_len=11), Join(seq_len=3))
many_new = (Join(seq_len=27), Join(seq_len=20), Eager(mode=EXTEND, extend_lens=(8, 6)))


def far_slots(dtype: KVCacheDtype) -> Scenario:
    """Requests that join have the last pages, which are far enough on a GPU, too."""
    layer = {**lattice(dtype), "far_slots": True}
    layout = PageLayout.DESCENDING
    return case(Join(seq_len=9), Join(seq_len=6), Eager(mode=VERIFY), layer=layer, page_layout=layout)


# Between them every mode, regime and cache, rows of fewer, exactly and more keys than K, and of none.
CASES = {
    MORE_THAN_K: case(*long_and_short, Eager(mode=VERIFY), layer=lattice(), index_topk=4),
    FEWER_THAN_K: case(*long_and_short, Eager(mode=VERIFY), layer=lattice(FP8)),
    "prefill, FP8": case(Join(seq_len=9), Join(seq_len=6), Eager(mode=EXTEND, extend_lens=(3, 2)), layer=lattice(FP8)),
    NO_TOKEN: case(
        Join(seq_len=5), Join(seq_len=1), Eager(mode=DRAFT_EXTEND_V2), page_size=1, num_draft_tokens=3, index_topk=4
    ),
    "advancing drafts, FP8": case(
        *(Join(seq_len=9), Join(seq_len=6), Eager(mode=DECODE), Eager(mode=DECODE)),
        layer={"kv_cache_dtype": FP8},
        num_steps=3,
        step_semantics=StepSemantics.ADVANCING,
    ),
    "K keys and one more": case(
        Join(seq_len=4), Join(seq_len=5), Eager(mode=DECODE), layer=lattice(), index_topk=4, num_steps=2
    ),
    "equal keys, FP8": case(
        *long_and_short, Eager(mode=VERIFY), layer={"regime": Regime.EQUAL, "kv_cache_dtype": FP8}, index_topk=4
    ),
    "accepted drafts": case(
        Join(seq_len=7), Join(seq_len=4), Accept(accept_lengths=(2, 0)), Eager(mode=DRAFT_EXTEND), layer=lattice()
    ),
    RANDOM: case(*many_new, layer=random(), max_context_len=30),
    "prefill, FP8, random": case(*many_new, layer=random(FP8), max_context_len=30, index_topk=16, seed=1),
    **{
        f"{RELATIONS} {seed}": case(
            *(Join(seq_len=30), Join(seq_len=25), Eager(mode=VERIFY), Eager(mode=DECODE)),
            layer=random(heads=16),
            max_context_len=40,
            index_topk=24,
            seed=seed,  # not every sum shows in which order it was made
        )
        for seed in range(6)
    },
    FAR: far_slots(BF16),
    FAR_FP8: far_slots(FP8),
}


@dataclasses.dataclass(frozen=True)
class Plant:
    """A planted layer and what the judge must say first; ``place`` "~x" means: contains x.

    It is judged by one case after the other until one shows it. start: the first, where those before cannot.
    """

    layer: Any
    field: str
    kind: Kind = Kind.VALUE
    how: str = ISOLATED
    place: str = ""
    start: str = MORE_THAN_K
    reaches_beyond: bool = False  # 2^32 elements, or before the first: farther than memory is spread out on a GPU


PLANTS = (
    # Store
    Plant(planted_layers.WritesNextSlot, "kv_cache"),
    Plant(planted_layers.WritesTwoSlots, "kv_cache"),
    Plant(planted_layers.SkipsLastRow, "kv_cache"),
    Plant(planted_layers.WithoutStore, "kv_cache"),
    Plant(planted_layers.StoresInFirstStepOnly, "kv_cache"),
    Plant(planted_layers.RowsWithoutTokenWriteToSlotOne, "kv_cache", place="~slot 1 (running request 0, position 0)"),
    Plant(planted_layers.NeighbourTileScale, "kv_cache", place="~scale"),
    Plant(planted_layers.StoresReciprocalScale, "index_k_cache", place="~scale"),
    Plant(planted_layers.ScalesToTwoHundredForty, "index_k_cache", place="~key element"),
    Plant(planted_layers.ZeroScaleOfZeroTile, "index_k_cache", place="~scale"),
    Plant(planted_layers.UnscaledLatents, "kv_cache", place="~latent element"),
    Plant(planted_layers.OneScaleForAllTiles, "kv_cache", place="~latent element"),
    Plant(planted_layers.RoundsTowardsZero, "index_k_cache", place="~key element", start=RANDOM),
    Plant(planted_layers.NanStaysAlone, "index_k_cache", place="~(a made-up key: NaN)"),
    Plant(planted_layers.InfinityIsTheLargest, "index_k_cache", place="~(a made-up key: infinities)"),
    Plant(planted_layers.TiesAwayFromZero, "index_k_cache", place="~(a made-up key: half-way between codes)"),
    Plant(planted_layers.FlushesDenormalKeys, "index_k_cache", place="~(a made-up key: denormals)"),
    Plant(planted_layers.RopeBeforeScales, "kv_cache", place="~scale 0"),
    Plant(planted_layers.InterleavesIndexScales, "index_k_cache"),
    Plant(planted_layers.IndexKeyWithoutOffset, "index_k_cache", place="~key element 0"),
    Plant(planted_layers.IndexKeyToNextPage, "index_k_cache"),
    # Indexer
    Plant(planted_layers.LeavesOutRelu, "logits"),
    Plant(planted_layers.ReluAfterWeights, "logits"),
    Plant(planted_layers.ReluAfterSum, "logits"),
    Plant(planted_layers.DropsIndexScale, "logits"),
    Plant(planted_layers.NeighbourHeadWeight, "logits"),
    Plant(planted_layers.RoundsWeights, "logits", Kind.BOUND, start=RANDOM),
    Plant(planted_layers.DropsLastIndexHead, "logits"),
    Plant(planted_layers.LengthOneShort, "logits"),
    Plant(planted_layers.LengthOneLong, "logits"),
    Plant(planted_layers.SkipsPartialPage, "logits"),
    Plant(planted_layers.TableOfFirstRow, "logits", place="~request 1"),
    Plant(planted_layers.ZeroBeyondRow, "logits"),
    Plant(planted_layers.ZeroTimesUnreadKey, "logits"),
    # Top-k
    Plant(planted_layers.TiesToHigher, "topk_indices"),
    Plant(planted_layers.OneTooFew, "topk_indices"),
    Plant(planted_layers.BestFirst, "topk_indices"),
    Plant(planted_layers.Descending, "topk_indices"),
    Plant(planted_layers.LooksBeyondRow, "topk_indices"),
    Plant(planted_layers.LeavesGap, "topk_indices"),
    Plant(planted_layers.RepeatsLast, "topk_indices"),
    Plant(planted_layers.ChoosesOneTwice, "topk_indices"),
    Plant(planted_layers.ClipsThresholdBin, "topk_indices", start=RANDOM),
    Plant(planted_layers.ReversesNegatives, "topk_indices"),
    Plant(planted_layers.FastPathLosesLast, "topk_indices"),
    Plant(planted_layers.FastPathForOneMore, "topk_indices"),
    Plant(planted_layers.FirstOfEqual, "topk_indices"),
    Plant(planted_layers.OrdersNaNFirst, "topk_indices", place="~(made-up logits: NaN, "),
    Plant(planted_layers.OrdersNaNLast, "topk_indices", place="~(made-up logits: NaN, "),
    Plant(planted_layers.OrdersZerosBySign, "topk_indices", place="~(made-up logits: zeros of both signs, "),
    Plant(planted_layers.IgnoresLowBits, "topk_indices", place="~(made-up logits: neighbouring floats, "),
    Plant(planted_layers.FlushesDenormals, "topk_indices", place="~(made-up logits: denormals, "),
    Plant(planted_layers.TakesInfinityForNothing, "topk_indices", place="~(made-up logits: infinities, "),
    Plant(planted_layers.CompetesWithBeyond, "topk_indices", place="~(made-up logits: "),
    Plant(planted_layers.DropsNaNOfShortRows, "topk_indices", place="~(made-up logits: at most K tokens, "),
    # Transforms
    Plant(planted_layers.DoesNotMap, "indices"),
    Plant(planted_layers.MapsByFirstRow, "indices", place="~request 1"),
    Plant(planted_layers.MapsNothingToFirst, "indices"),
    Plant(planted_layers.ForgetsOffset, "topk_ragged", place="~request 1"),
    Plant(planted_layers.OffsetOfPreviousRow, "topk_ragged", place="~request 1"),
    Plant(planted_layers.OffsetsNothing, "topk_ragged", place="~request 1"),
    # Attention
    Plant(planted_layers.LeaksSlotZero, "out"),
    Plant(planted_layers.ZeroTimesSlotZero, "out"),
    Plant(planted_layers.LeavesOutScale, "out"),
    Plant(planted_layers.IgnoresRope, "out"),
    Plant(planted_layers.ValuesFromRope, "out"),
    Plant(planted_layers.TruncatesLatents, "out", place="~element 48"),
    Plant(planted_layers.NextHeadsQuery, "out"),
    Plant(planted_layers.IgnoresTileScales, "out"),
    Plant(planted_layers.LosesLastIndex, "out"),
    Plant(planted_layers.StopsAtFirstNothing, "out"),
    Plant(planted_layers.QueriesInFp8, "out", Kind.BOUND, start=RANDOM),
    Plant(planted_layers.RoughExponential, "out"),
    Plant(planted_layers.DropsRescale, "out", start=FEWER_THAN_K),
    Plant(planted_layers.LosesKeyAtBoundary, "out"),
    Plant(planted_layers.DoublesKeyAtBoundary, "out", start=FEWER_THAN_K),
    Plant(planted_layers.AccumulatesInBf16, "out"),
    Plant(planted_layers.RoundsBeforeDividing, "out"),
    Plant(planted_layers.StartsFromWorkspace, "out"),
    Plant(planted_layers.DividesNothingByNothing, "out"),
    Plant(planted_layers.ZeroLseOfNothing, "lse", Kind.BOUND),
    Plant(planted_layers.LseInBaseTwo, "lse", Kind.BOUND),
    Plant(planted_layers.LseWithoutMaximum, "lse", Kind.BOUND),
    Plant(planted_layers.SplitsByBatch, "", Kind.RELATION, Relation.ALONE, start=f"{RELATIONS} 0"),
    Plant(planted_layers.SumsInOrderOfSlots, "", Kind.RELATION, Relation.RELABELLED, start=f"{RELATIONS} 0"),
    # Inputs
    Plant(planted_layers.ScalesKeysInPlace, "k", Kind.INPUT),
    Plant(planted_layers.ClearsIndexKeys, "index_k_cache", Kind.INPUT),
    Plant(planted_layers.MasksLogitsInPlace, "logits", Kind.INPUT),
    Plant(planted_layers.MasksTableInPlace, "page_table_1", Kind.INPUT),
    Plant(planted_layers.ShiftsOffsetsInPlace, "topk_indices_offset", Kind.INPUT),
    Plant(planted_layers.ClampsIndicesInPlace, "indices", Kind.INPUT),
    Plant(planted_layers.ScalesQueriesInPlace, "q", Kind.INPUT),
    Plant(planted_layers.CleansCache, "kv_cache", Kind.INPUT),
    Plant(planted_layers.ZeroesIndexQueries, "index_weights", Kind.INPUT, how=CHAIN),
    Plant(planted_layers.ClipsMetadata, "seqlens_expanded", Kind.INPUT, how=CHAIN),
    Plant(planted_layers.ReplacesMetadata, "real_page_table", Kind.INPUT, how=CHAIN),
    Plant(planted_layers.NarrowsMetadata, "max_seq_len_k", Kind.INPUT, how=CHAIN),
    # Slots far apart
    Plant(planted_layers.StoresInInt32, "kv_cache", start=FAR),
    Plant(planted_layers.SlotsInInt32, "out", start=FAR),
    Plant(planted_layers.SlotsInInt32, "out", start=FAR_FP8),
    Plant(planted_layers.SlotsInUint32, "out", start=FAR, reaches_beyond=True),
    Plant(planted_layers.SlotsInUint32, "out", start=FAR_FP8, reaches_beyond=True),
    Plant(planted_layers.BytesInInt32, "out", start=FAR, reaches_beyond=True),
    Plant(planted_layers.IndexPagesInInt32, "logits", start=FAR),
    Plant(planted_layers.IndexPagesInUint32, "logits", start=FAR, reaches_beyond=True),
    # The layer as a whole
    Plant(planted_layers.StoresAfterwards, "logits", how=CHAIN),
    Plant(planted_layers.AttendsBesideStore, "out", how=CHAIN),
    Plant(planted_layers.LengthsOfRequests, "logits", how=CHAIN),
    Plant(planted_layers.AttendsToLastSelection, "out", how=CHAIN),
    Plant(planted_layers.OutInFloat32, "out", Kind.DTYPE),
    Plant(planted_layers.OneRowTooFew, "lse", Kind.SHAPE),
    Plant(planted_layers.Raises, "RuntimeError", Kind.CRASH, how="", place="~planted_layers.py"),
    Plant(planted_layers.WritesBeyondOutput, "~buffer of shape [4, 2]", Kind.GUARD, how=""),
)


def first_finding(layer: Any, cases: Iterable[Scenario], device: torch.device, graphs: bool = False) -> Finding:
    """Of the first of ``cases`` that shows a disagreement."""
    for scenario in cases:
        try:
            judge(scenario, BACKEND, device, layer_factory=layer, graphs=graphs)
        except OracleFailure as failure:
            return failure.finding
    pytest.fail(f"nothing is wrong with {layer.__name__}")


def assert_said(finding: Finding, plant: Plant) -> None:
    assert (finding.kind, finding.how) == (plant.kind, plant.how), finding.sentence()
    assert matches(finding.field, plant.field), finding.sentence()
    assert matches(finding.place, plant.place), finding.sentence()
    assert len(finding.sentence().splitlines()) == 1


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.layer.__name__)
def test_planted_layer_is_named_at_its_stage(plant: Plant, device: torch.device) -> None:
    if plant.reaches_beyond and device.type != "cpu":
        pytest.skip("on a GPU every used slot lies within 2^32 elements of the first")
    cases = dropwhile(lambda name: name != plant.start, CASES)
    assert_said(first_finding(plant.layer, (CASES[name] for name in cases), device), plant)


def test_every_planted_layer_is_judged() -> None:
    seams = {"Store", "Indexer", "Select", "Attention", "Chunked", "KeepsFirst"}
    refused = {"WithoutStages", "ForSevenHeads", "ForRedOnes"}
    defined = {
        name
        for name, value in vars(planted_layers).items()
        if inspect.isclass(value) and value.__module__ == planted_layers.__name__
    }
    judged = {thing.__name__ for thing in (*(plant.layer for plant in (*PLANTS, *GRAPH_PLANTS)), *FREEDOMS)}
    assert defined - seams - refused == judged - {planted_layers.Clean.__name__}


# Clean ones

FREEDOMS = (
    planted_layers.Clean,
    planted_layers.OtherNan,
    planted_layers.InFloat32,
    planted_layers.OnlineInFloat32,
    planted_layers.Bf16Weights,
    planted_layers.IndexerInFloat32,
    planted_layers.SharesOutputs,
)


@pytest.mark.parametrize("name", CASES)
def test_case_of_a_plant_passes_without_it(name: str, device: torch.device) -> None:
    """Otherwise the findings above would say nothing about the plants."""
    verdict = judge(CASES[name], BACKEND, device, layer_factory=planted_layers.Clean, graphs=False)
    assert verdict.cases == 1
    assert verdict.eager_calls == 2 * sum(isinstance(event, Eager) for event in CASES[name].events)


@pytest.mark.parametrize("layer", FREEDOMS[1:6], ids=lambda layer: layer.__name__)
def test_freedom_of_the_contract_passes(layer: Any, device: torch.device) -> None:
    for name in (MORE_THAN_K, FEWER_THAN_K, NO_TOKEN, f"{RELATIONS} 0"):
        judge(CASES[name], BACKEND, device, layer_factory=layer, graphs=False)


def every_mode(regime: Regime, dtype: KVCacheDtype) -> Scenario:
    """All modes, on requests that come, share a prefix, draft, go, and leave their pages to others."""
    calls: list[Event] = [Eager(mode=mode, extend_lens=(2, 1), order=Order.REVERSED) for mode in ForwardMode]
    return case(
        *(Join(seq_len=9), Eager(mode=DECODE), Join(seq_len=12, prefix_of=0, prefix_pages=2)),
        *(Finish(request=0), Join(seq_len=1), Accept(accept_lengths=(2, 0)), *calls),
        layer={"regime": regime, "kv_cache_dtype": dtype},
        num_steps=2,
        num_draft_tokens=3,
        index_topk=6,
        page_layout=PageLayout.INTERLEAVED,
        step_semantics=StepSemantics.ADVANCING,
    )


@pytest.mark.parametrize("dtype", KVCacheDtype)
@pytest.mark.parametrize("regime", Regime)
def test_reference_passes_every_mode(regime: Regime, dtype: KVCacheDtype, device: torch.device) -> None:
    scenario = every_mode(regime, dtype)
    verdict = judge(scenario, BACKEND, device, layer_factory=planted_layers.Clean, graphs=False)
    assert verdict.eager_calls == 2 * (1 + len(ForwardMode))
    stages = verdict.layers.stages
    assert set(stages) == {
        *("kv_cache", "index_k_cache", "logits", "topk_indices", "indices", "topk_ragged", "out", "lse")
    }
    bounded = {name for name, tally in stages.items() if tally.bounded}
    assert bounded == ({"lse"} if regime.is_exact else {"logits", "out", "lse"})
    assert all(tally.weaker == 0 and tally.worst < 1 for tally in stages.values())
    tried = set(verdict.layers.relations)
    own = set() if regime.is_exact else {Relation.RELABELLED, Relation.PERMUTED, Relation.ALONE}
    assert tried == {Relation.POISONED, *own}


def test_reference_passes_drawn_scenarios(device: torch.device) -> None:
    scale = dataclasses.replace(SMALL_LAYER, max_context_lens=(20, 33, 67), index_topks=(4, 8, 17))
    verdict = Verdict()

    def judge_one(scenario: Scenario) -> None:
        judge(scenario, BACKEND, device, verdict, planted_layers.Clean, graphs=False)

    draw(scenarios(scale), 8, 5, judge_one)
    assert verdict.cases == 8
    assert verdict.eager_calls > 0


# Graphs


def one_replay(*joins: Join, mode: ForwardMode = DECODE, bucket: int = 1, times: int = 1, **changes: Any) -> Scenario:
    """One batch through one graph, captured on padding."""
    return case(
        Capture(mode=mode, buckets=(bucket,)), *(joins or (Join(seq_len=6),)), Replay(mode=mode, times=times), **changes
    )


GRAPH_PLANTS = {
    Plant(planted_layers.FreezesPlan, "logits", how=GRAPH): one_replay(layer=lattice()),
    Plant(planted_layers.ReturnsWarmUp, "lse", Kind.BOUND, GRAPH): one_replay(layer=lattice()),
    Plant(planted_layers.ReadsOldCache, "logits", how=GRAPH): one_replay(layer=lattice()),
    Plant(planted_layers.AddsToWorkspace, "out", Kind.RELATION, Relation.REPEATED): one_replay(layer=lattice()),
    Plant(planted_layers.AttendsToLastReplay, "out", how=GRAPH): one_replay(layer=lattice()),
    Plant(planted_layers.ScalesByWholeBatch, "out", how=GRAPH): one_replay(layer=lattice(), bucket=2),
    Plant(
        planted_layers.PaddingWritesToSlotOne, "kv_cache", how=GRAPH, place="~slot 1 (running request 0, position 0)"
    ): one_replay(bucket=2, page_size=1),
    Plant(planted_layers.UsesQueriesAsWorkspace, "q", Kind.INPUT, ""): one_replay(),
    Plant(planted_layers.ClipsMetadataInGraph, "seqlens_expanded", Kind.INPUT, GRAPH): one_replay(
        Join(seq_len=11), mode=VERIFY
    ),
    Plant(planted_layers.FirstStepStoresZeros, "index_k_cache", how=GRAPH): one_replay(
        mode=VERIFY, num_steps=2, layer=lattice()
    ),
    Plant(planted_layers.LooksAtLengths, "torch.Tensor.__int__", Kind.CAPTURE, "", "~planted_layers.py"): one_replay(),
    Plant(planted_layers.LeavesUnusedRows, "lse", how=GRAPH, place="row 1 (unused tail)"): one_replay(
        mode=DRAFT_EXTEND
    ),
}


@pytest.mark.parametrize("plant", GRAPH_PLANTS, ids=lambda plant: plant.layer.__name__)
def test_layer_that_is_wrong_in_a_graph_is_named(plant: Plant, device: torch.device) -> None:
    assert_said(first_finding(plant.layer, [GRAPH_PLANTS[plant]], device, graphs=True), plant)


@pytest.mark.parametrize("plant", GRAPH_PLANTS, ids=lambda plant: plant.layer.__name__)
def test_scenario_of_a_graph_plant_passes_without_it(plant: Plant, device: torch.device) -> None:
    verdict = judge(GRAPH_PLANTS[plant], BACKEND, device)
    assert verdict.layers.replays == verdict.replays > 0


@pytest.mark.parametrize("mode", [DECODE, VERIFY])
def test_outputs_may_share_their_memory(mode: ForwardMode, device: torch.device) -> None:
    """Between steps, and between the calls of an eager chain or of single stages."""
    scenario = case(
        *(Capture(mode=mode, buckets=(2,)), Join(seq_len=6), Replay(mode=mode), Eager(mode=mode)),
        layer=lattice(),
        num_steps=2,
    )
    verdict = judge(scenario, BACKEND, device, layer_factory=planted_layers.SharesOutputs)
    assert verdict.layers.replays == 2


def test_graphs_of_all_modes_have_a_layer(device: torch.device) -> None:
    scenario = case(
        *(Capture(mode=mode, buckets=(2,)) for mode in GRAPH_MODES),
        *(Join(seq_len=6), *(Replay(mode=mode) for mode in GRAPH_MODES)),
    )
    verdict = judge(scenario, BACKEND, device)
    assert verdict.layers.replays == 2 * len(GRAPH_MODES)
