"""The judge on planted layers, each named at the stage that is wrong, and on clean ones that must pass."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from itertools import dropwhile
from typing import Any

import pytest
import torch

from nsa_oracle.harness.checks.relations import Relation
from nsa_oracle.harness.engine.isolated import MANY_ROWS
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.judge import OracleFailure, Verdict, judge, judge_subject
from nsa_oracle.harness.scenarios.scales import SMALL_LAYER
from nsa_oracle.harness.scenarios.scenario import (
    GRAPH_MODES,
    Accept,
    Capture,
    Eager,
    Event,
    Finish,
    Join,
    Replay,
    Scenario,
)
from nsa_oracle.harness.scenarios.setup import Order, PageLayout, Regime
from nsa_oracle.harness.scenarios.strategies import scenarios
from nsa_oracle.harness.search.drawing import draw
from nsa_oracle.harness.subjects.subject import Subject
from nsa_oracle.reference.types import ForwardMode, KVCacheDtype, StepSemantics
from tests.support import layers
from tests.support.layer_cases import BACKEND, BF16, FP8, case, lattice, random
from tests.support.layers import (
    attention,
    clean,
    edge_logits,
    extra_rows,
    far,
    in_graph,
    indexer,
    inputs,
    store,
    topk,
    whole,
)
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND, DRAFT_EXTEND_V2, EXTEND, VERIFY, matches

ISOLATED, CHAIN, GRAPH = "isolated stage", "eager chain", "captured chain"
FAR, FAR_FP8 = "slots far apart", "slots far apart, FP8"
MORE_THAN_K, FEWER_THAN_K, NO_TOKEN = (
    "verify, more keys than K",
    "verify, FP8, fewer keys than K",
    "rows without a token",
)
EXTRA_ROWS = "rows behind those of the metadata"
RANDOM, RELATIONS = "prefill, random", "verify and draft, random"


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
    EXTRA_ROWS: case(
        *long_and_short, Eager(mode=VERIFY), layer={**lattice(), "extra_rows": 2, "padding_slot": -1}, index_topk=4
    ),
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
    Plant(store.WritesNextSlot, "kv_cache"),
    Plant(store.WritesTwoSlots, "kv_cache"),
    Plant(store.SkipsLastRow, "kv_cache"),
    Plant(whole.WithoutStore, "kv_cache"),
    Plant(store.StoresInFirstStepOnly, "kv_cache"),
    Plant(store.RowsWithoutTokenWriteToSlotOne, "kv_cache", place="~slot 1 (running request 0, position 0)"),
    Plant(store.NeighbourTileScale, "kv_cache", place="~scale"),
    Plant(store.StoresReciprocalScale, "index_k_cache", place="~scale"),
    Plant(store.ScalesToTwoHundredForty, "index_k_cache", place="~key element"),
    Plant(store.ZeroScaleOfZeroTile, "index_k_cache", place="~scale"),
    Plant(store.UnscaledLatents, "kv_cache", place="~latent element"),
    Plant(store.OneScaleForAllTiles, "kv_cache", place="~latent element"),
    Plant(store.RoundsTowardsZero, "index_k_cache", place="~key element", start=RANDOM),
    Plant(store.NanStaysAlone, "index_k_cache", place="~(a made-up key: NaN)"),
    Plant(store.InfinityIsTheLargest, "index_k_cache", place="~(a made-up key: infinities)"),
    Plant(store.TiesAwayFromZero, "index_k_cache", place="~(a made-up key: half-way between codes)"),
    Plant(store.FlushesDenormalKeys, "index_k_cache", place="~(a made-up key: denormals)"),
    Plant(store.RopeBeforeScales, "kv_cache", place="~scale 0"),
    Plant(store.InterleavesIndexScales, "index_k_cache"),
    Plant(store.IndexKeyWithoutOffset, "index_k_cache", place="~key element 0"),
    Plant(store.IndexKeyToNextPage, "index_k_cache"),
    # Indexer
    Plant(indexer.LeavesOutRelu, "logits"),
    Plant(indexer.ReluAfterWeights, "logits"),
    Plant(indexer.ReluAfterSum, "logits"),
    Plant(indexer.DropsIndexScale, "logits"),
    Plant(indexer.NeighbourHeadWeight, "logits"),
    Plant(indexer.RoundsWeights, "logits", Kind.BOUND, start=RANDOM),
    Plant(indexer.DropsLastIndexHead, "logits"),
    Plant(indexer.LengthOneShort, "logits"),
    Plant(indexer.LengthOneLong, "logits"),
    Plant(indexer.SkipsPartialPage, "logits"),
    Plant(indexer.TableOfFirstRow, "logits", place="~request 1"),
    Plant(indexer.ZeroBeyondRow, "logits"),
    Plant(indexer.ZeroTimesUnreadKey, "logits"),
    Plant(indexer.ScoresNaNAsZero, "logits", Kind.BOUND, place="~(a made-up index key: "),
    Plant(indexer.InfiniteKeysCount, "logits", Kind.BOUND, place="~(a made-up index key: infinities)"),
    Plant(indexer.LimitsScale, "logits", Kind.BOUND, place="~(a made-up index key: "),
    # Top-k
    Plant(topk.TiesToHigher, "topk_indices"),
    Plant(topk.OneTooFew, "topk_indices"),
    Plant(topk.BestFirst, "topk_indices"),
    Plant(topk.Descending, "topk_indices"),
    Plant(topk.LooksBeyondRow, "topk_indices"),
    Plant(topk.LeavesGap, "topk_indices"),
    Plant(topk.RepeatsLast, "topk_indices"),
    Plant(topk.ChoosesOneTwice, "topk_indices"),
    Plant(topk.ClipsThresholdBin, "topk_indices", start=RANDOM),
    Plant(topk.ReversesNegatives, "topk_indices"),
    Plant(topk.FastPathLosesLast, "topk_indices"),
    Plant(topk.FastPathForOneMore, "topk_indices"),
    Plant(topk.FirstOfEqual, "topk_indices"),
    Plant(edge_logits.OrdersNaNFirst, "topk_indices", place="~(made-up logits: NaN, "),
    Plant(edge_logits.OrdersNaNLast, "topk_indices", place="~(made-up logits: NaN, "),
    Plant(edge_logits.OrdersZerosBySign, "topk_indices", place="~(made-up logits: zeros of both signs, "),
    Plant(edge_logits.IgnoresLowBits, "topk_indices", place="~(made-up logits: neighbouring floats, "),
    Plant(edge_logits.FlushesDenormals, "topk_indices", place="~(made-up logits: denormals, "),
    Plant(edge_logits.TakesInfinityForNothing, "topk_indices", place="~(made-up logits: infinities, "),
    Plant(edge_logits.CompetesWithBeyond, "topk_indices", place="~(made-up logits: "),
    Plant(edge_logits.DropsNaNOfShortRows, "topk_indices", place="~(made-up logits: at most K tokens, "),
    # Transforms
    Plant(topk.DoesNotMap, "indices"),
    Plant(topk.MapsByFirstRow, "indices", place="~request 1"),
    Plant(topk.MapsNothingToFirst, "indices"),
    Plant(topk.ForgetsOffset, "topk_ragged", place="~request 1"),
    Plant(topk.OffsetOfPreviousRow, "topk_ragged", place="~request 1"),
    Plant(topk.OffsetsNothing, "topk_ragged", place="~request 1"),
    # Attention
    Plant(attention.LeaksSlotZero, "out"),
    Plant(attention.ZeroTimesSlotZero, "out"),
    Plant(attention.LeavesOutScale, "out"),
    Plant(attention.IgnoresRope, "out"),
    Plant(attention.ValuesFromRope, "out"),
    Plant(attention.TruncatesLatents, "out", place="~element 48"),
    Plant(attention.NextHeadsQuery, "out"),
    Plant(attention.IgnoresTileScales, "out"),
    Plant(attention.LosesLastIndex, "out"),
    Plant(attention.StopsAtFirstNothing, "out"),
    Plant(attention.QueriesInFp8, "out", Kind.BOUND, start=RANDOM),
    Plant(attention.RoughExponential, "out"),
    Plant(attention.DropsRescale, "out", start=FEWER_THAN_K),
    Plant(attention.LosesKeyAtBoundary, "out"),
    Plant(attention.DoublesKeyAtBoundary, "out", start=FEWER_THAN_K),
    Plant(attention.AccumulatesInBf16, "out"),
    Plant(attention.RoundsBeforeDividing, "out"),
    Plant(attention.StartsFromWorkspace, "out"),
    Plant(attention.DividesNothingByNothing, "out"),
    Plant(attention.ZeroLseOfNothing, "lse", Kind.BOUND),
    Plant(attention.LseInBaseTwo, "lse", Kind.BOUND),
    Plant(attention.LseWithoutMaximum, "lse", Kind.BOUND),
    Plant(
        attention.SplitsByBatch,
        "",
        Kind.RELATION,
        f"{Relation.MANY.value}: {MANY_ROWS} rows, of which 4 differ",
        start=f"{RELATIONS} 0",
    ),
    Plant(attention.SumsInOrderOfSlots, "", Kind.RELATION, Relation.RELABELLED, start=f"{RELATIONS} 0"),
    # Inputs
    Plant(inputs.ScalesKeysInPlace, "k", Kind.INPUT),
    Plant(inputs.ClearsIndexKeys, "index_k_cache", Kind.INPUT),
    Plant(inputs.MasksLogitsInPlace, "logits", Kind.INPUT),
    Plant(inputs.MasksTableInPlace, "page_table_1", Kind.INPUT),
    Plant(inputs.ShiftsOffsetsInPlace, "topk_indices_offset", Kind.INPUT),
    Plant(inputs.ClampsIndicesInPlace, "indices", Kind.INPUT),
    Plant(inputs.ScalesQueriesInPlace, "q", Kind.INPUT),
    Plant(inputs.CleansCache, "kv_cache", Kind.INPUT),
    Plant(inputs.ZeroesIndexQueries, "index_weights", Kind.INPUT, how=CHAIN),
    Plant(inputs.ClipsMetadata, "seqlens_expanded", Kind.INPUT, how=CHAIN),
    Plant(inputs.ReplacesMetadata, "real_page_table", Kind.INPUT, how=CHAIN),
    Plant(inputs.NarrowsMetadata, "max_seq_len_k", Kind.INPUT, how=CHAIN),
    # Slots far apart
    Plant(far.StoresInInt32, "kv_cache", start=FAR),
    Plant(far.SlotsInInt32, "out", start=FAR),
    Plant(far.SlotsInInt32, "out", start=FAR_FP8),
    Plant(far.SlotsInUint32, "out", start=FAR, reaches_beyond=True),
    Plant(far.SlotsInUint32, "out", start=FAR_FP8, reaches_beyond=True),
    Plant(far.BytesInInt32, "out", start=FAR, reaches_beyond=True),
    Plant(far.IndexPagesInInt32, "logits", start=FAR),
    Plant(far.IndexPagesInUint32, "logits", start=FAR, reaches_beyond=True),
    # The layer as a whole
    Plant(whole.StoresAfterwards, "logits", how=CHAIN),
    Plant(whole.AttendsBesideStore, "out", how=CHAIN),
    Plant(whole.LengthsOfRequests, "logits", how=CHAIN),
    Plant(whole.AttendsToLastSelection, "out", how=CHAIN),
    Plant(whole.OutInFloat32, "out", Kind.DTYPE),
    Plant(whole.OneRowTooFew, "lse", Kind.SHAPE),
    Plant(whole.Raises, "RuntimeError", Kind.LAYER_CRASH, how="", place="~whole.py"),
    Plant(whole.WritesBeyondOutput, "~buffer of shape [4, 2]", Kind.GUARD, how=""),
    # Rows behind those of the metadata
    Plant(extra_rows.LeavesOutExtraRows, "indices", Kind.SHAPE, CHAIN, start=EXTRA_ROWS),
    Plant(extra_rows.AddsNothingOfAllQueries, "out", how=CHAIN, start=EXTRA_ROWS),
    Plant(extra_rows.AddsTheLargestExtraKey, "out", how=CHAIN, start=EXTRA_ROWS),
    Plant(extra_rows.StoresFromTheEnd, "~_cache", start=EXTRA_ROWS),
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
    defined = {
        name
        for module in pkgutil.iter_modules(layers.__path__)
        # Judged elsewhere: with the relations that they break, and with the method that they bring alone.
        if module.name not in ("refused", "nudges", "topk_alone")
        for name, value in vars(importlib.import_module(f"{layers.__name__}.{module.name}")).items()
        if inspect.isclass(value) and value.__module__ == f"{layers.__name__}.{module.name}"
    }
    judged = {thing.__name__ for thing in (*(plant.layer for plant in (*PLANTS, *GRAPH_PLANTS)), *FREEDOMS)}
    assert defined - seams == judged - {clean.Clean.__name__}


# Clean ones

FREEDOMS = (
    clean.Clean,
    clean.OtherNan,
    clean.InFloat32,
    clean.OnlineInFloat32,
    clean.Bf16Weights,
    clean.IndexerInFloat32,
    clean.SharesOutputs,
)


@pytest.mark.parametrize("name", CASES)
def test_case_of_a_plant_passes_without_it(name: str, device: torch.device) -> None:
    """Otherwise the findings above would say nothing about the plants."""
    verdict = judge(CASES[name], BACKEND, device, layer_factory=clean.Clean, graphs=False)
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
    verdict = judge(scenario, BACKEND, device, layer_factory=clean.Clean, graphs=False)
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
        judge_subject(Subject(BACKEND, clean.Clean), scenario, device, verdict, graphs=False)  # some make no call

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
    Plant(in_graph.FreezesPlan, "logits", how=GRAPH): one_replay(layer=lattice()),
    Plant(in_graph.ReturnsWarmUp, "lse", Kind.BOUND, GRAPH): one_replay(layer=lattice()),
    Plant(in_graph.ReadsOldCache, "logits", how=GRAPH): one_replay(layer=lattice()),
    Plant(in_graph.AddsToWorkspace, "out", Kind.RELATION, Relation.REPEATED): one_replay(layer=lattice()),
    Plant(in_graph.AttendsToLastReplay, "out", how=GRAPH): one_replay(layer=lattice()),
    Plant(in_graph.ScalesByWholeBatch, "out", how=GRAPH): one_replay(layer=lattice(), bucket=2),
    Plant(
        in_graph.PaddingWritesToSlotOne, "kv_cache", how=GRAPH, place="~slot 1 (running request 0, position 0)"
    ): one_replay(bucket=2, page_size=1),
    Plant(in_graph.UsesQueriesAsWorkspace, "q", Kind.INPUT, ""): one_replay(),
    Plant(in_graph.ClipsMetadataInGraph, "seqlens_expanded", Kind.INPUT, GRAPH): one_replay(
        Join(seq_len=11), mode=VERIFY
    ),
    Plant(in_graph.FirstStepStoresZeros, "index_k_cache", how=GRAPH): one_replay(
        mode=VERIFY, num_steps=2, layer=lattice()
    ),
    Plant(in_graph.LooksAtLengths, "torch.Tensor.__int__", Kind.CAPTURE, "", "~in_graph.py"): one_replay(),
    Plant(in_graph.LeavesUnusedRows, "lse", how=GRAPH, place="row 1 (unused tail)"): one_replay(mode=DRAFT_EXTEND),
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
    verdict = judge(scenario, BACKEND, device, layer_factory=clean.SharesOutputs)
    assert verdict.layers.replays == 2


def test_graphs_of_all_modes_have_a_layer(device: torch.device) -> None:
    scenario = case(
        *(Capture(mode=mode, buckets=(2,)) for mode in GRAPH_MODES),
        *(Join(seq_len=6), *(Replay(mode=mode) for mode in GRAPH_MODES)),
    )
    verdict = judge(scenario, BACKEND, device)
    assert verdict.layers.replays == 2 * len(GRAPH_MODES)
