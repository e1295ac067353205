"""The judge on planted bugs, each with the smallest scenario that shows it, and on clean backends that must pass."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch

from nsa_oracle.harness.checks.metadata import AS_CAPTURED
from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.memory.poison import SENTINELS
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
from nsa_oracle.harness.scenarios.setup import Drive, Inputs, Mirror, PageLayout
from nsa_oracle.reference.multi_step import MultiStepBackend
from nsa_oracle.reference.types import BackendConfig, ForwardMode, StepSemantics
from tests.support.backends import clean, crashes, eager, form, in_graph, lengths, memory, replays, seams, tables
from tests.support.metadata_cases import (
    ACCEPT_NONE_AND_TWO,
    ACCEPT_TWO_THEN_ONE,
    DECODE,
    DRAFT_EXTEND_V2,
    EXTEND,
    TWO_LENGTHS,
    VERIFY,
    case,
    factory_of,
    matches,
    mirror_case,
    one_replay,
)

POISON = f"{SENTINELS[0]} (no slot that exists)"
POISON_PAGE = f"{SENTINELS[0] // 4} (no page that exists)"


@dataclasses.dataclass(frozen=True)
class Plant:
    """A planted bug, the scenario that shows it, and what the judge must say; ``place`` "~x" means: contains x."""

    backend: Any
    scenario: Scenario
    kind: Kind
    field: str
    place: str = ""
    got: str = ""
    expected: str = ""
    step: int | None = 0
    event: int | None = 2
    counts: tuple[int, int] | None = None
    id: str = ""


ROW_0 = "row 0 (request 0, draft token 0)"

PLANTS = (
    # Replay buffers. Joining in an empty pool gives row 0 and pages 1, 2, ...: slots 4, 5, ...
    Plant(
        replays.KeepsPageTable, one_replay(DECODE), Kind.VALUE, "page_table_1",
        f"{ROW_0}, column 0", POISON, "4", counts=(3, 3), id="page table not refilled",
    ),
    Plant(
        replays.KeepsRealPageTable, one_replay(DECODE), Kind.VALUE, "real_page_table",
        f"{ROW_0}, page column 0", POISON_PAGE, "1", counts=(1, 1), id="real page table not refilled",
    ),
    Plant(
        replays.LeavesLastBound, one_replay(DECODE), Kind.VALUE, "nsa_cu_seqlens_k",
        "bound before row 1", str(SENTINELS[0]), "3", counts=(1, 2), id="fresh memory left unwritten",
    ),
    Plant(
        replays.RebuildsMetadata, one_replay(DECODE), Kind.ADDRESS, "cache_seqlens_int32", id="replay rebuilds all",
    ),
    Plant(
        replays.RebuildsOneField, one_replay(DECODE), Kind.ADDRESS, "nsa_cu_seqlens_k", id="replay rebuilds one field",
    ),
    Plant(
        replays.DropsFieldAtReplay, one_replay(DECODE), Kind.ADDRESS, "nsa_cu_seqlens_k", id="replay drops one field",
    ),
    Plant(
        replays.UpdatesTwin, one_replay(DECODE), Kind.VALUE, "cache_seqlens_int32",
        "request 0", "1", "3", counts=(1, 1), id="only the twin updated",
    ),
    Plant(
        replays.UpdatesTwin, one_replay(DECODE, drive=Drive.SINGLE_STEP), Kind.VALUE, "cache_seqlens_int32",
        "request 0", "1", "3", counts=(1, 1), id="only the twin updated, single-step drive",
    ),
    Plant(
        replays.MixesBuckets,
        case(Capture(mode=DECODE, buckets=(1, 2)), Join(seq_len=3), Replay(mode=DECODE)),
        Kind.VALUE, "cache_seqlens_int32", "request 0", "1", "3", id="another bucket's buffers updated",
    ),
    Plant(
        replays.KeepsPagedMqaSchedule, one_replay(DECODE, 257, max_context_len=300, paged_mqa_num_sms=2),
        Kind.VALUE, "paged_mqa_schedule_metadata", "multiprocessor 1, entry 1", "0", "1", counts=(1, 6),
        id="paged MQA schedule kept",
    ),
    Plant(
        replays.KeepsFlashMlaSchedule,
        one_replay(DECODE, 65, max_context_len=300, index_topk=200, flashmla_num_sm_parts=1),
        Kind.VALUE, "flashmla_metadata", "part 0, entry 3", "1", "2", counts=(1, 7), id="FlashMLA schedule kept",
    ),
    Plant(
        replays.KeepsCuSeqlensK, one_replay(VERIFY), Kind.VALUE, "nsa_cu_seqlens_k",
        # Captured at length 1: tokens see 2 and 3 of 3. Replayed at 3: 4 and 5.
        "bound before row 1", "2", "4", counts=(2, 3), id="cumulative lengths kept",
    ),
    # Steps
    Plant(
        replays.SkipsLastStep, one_replay(DECODE, num_steps=3), Kind.VALUE, "cache_seqlens_int32",
        "request 0", "1", "3", step=2, id="last step skipped",
    ),
    Plant(
        replays.LastStepForAll,
        one_replay(DECODE, num_steps=3, step_semantics=StepSemantics.ADVANCING),
        Kind.VALUE, "cache_seqlens_int32", "request 0", "6", "4", id="all steps get the last step's lengths",
    ),
    Plant(
        replays.OneStepTooFew, one_replay(DECODE, num_steps=3), Kind.SHAPE, "attn_backends",
        "", "2 steps", "3 steps", step=None, event=None, id="one step too few",
    ),
    # Lengths
    Plant(
        lengths.ReadsMirror, mirror_case(Mirror.STALE), Kind.VALUE, "cache_seqlens_int32",
        "request 0", "3", "5", event=3, id="stale mirror read",
    ),
    Plant(
        lengths.ReadsMirror, mirror_case(Mirror.ABSENT), Kind.CRASH, "AssertionError",
        "~lengths.py", "no host mirror to read", "no exception", step=None, event=3, id="absent mirror read",
    ),
    Plant(
        lengths.VerifyForgetsDrafts, one_replay(VERIFY), Kind.VALUE, "cache_seqlens_int32",
        "request 0", "3", "5", id="verify loses the drafts",
    ),
    Plant(
        lengths.WindowOffByOne, ACCEPT_NONE_AND_TWO, Kind.VALUE, "seqlens_expanded",
        "row 0 (request 1, draft token 0)", "6", "7", event=4, counts=(2, 4), id="draft-extend window off by one",
    ),
    Plant(
        lengths.IgnoresAccept, ACCEPT_NONE_AND_TWO, Kind.VALUE, "seqlens_expanded",
        "row 0 (request 1, draft token 0)", "2", "7", event=4, counts=(4, 4), id="accept lengths ignored",
    ),
    Plant(
        lengths.ReusesLastAccept, ACCEPT_TWO_THEN_ONE, Kind.VALUE, "seqlens_expanded",
        ROW_0, "5", "6", event=5, counts=(2, 2), id="last accept reused",
    ),
    Plant(
        lengths.SkipsPaddingRows, TWO_LENGTHS, Kind.VALUE, "cache_seqlens_int32",
        "padding request 1", "6", "1", event=5, counts=(1, 2), id="padding not written",
    ),
    Plant(
        lengths.NegativeLengths,
        case(Capture(mode=DRAFT_EXTEND_V2, buckets=(1,)), Replay(mode=DRAFT_EXTEND_V2), num_draft_tokens=4),
        Kind.VALUE, "seqlens_expanded", "row 0 (padding request 0, draft token 0)", "-2 (a length below 0)", "0",
        event=1, counts=(2, 4), id="negative length",
    ),
    Plant(
        lengths.KeepsTail, ACCEPT_TWO_THEN_ONE, Kind.VALUE, "seqlens_expanded",
        "row 1 (unused tail)", "5", "0", event=5, counts=(1, 2), id="tail keeps old lengths",
    ),
    Plant(
        lengths.TailFallsToZero, ACCEPT_TWO_THEN_ONE, Kind.VALUE, "nsa_cu_seqlens_k",
        "bound before row 2", "0 (below the one before it, in a running sum)", "6", event=5, counts=(1, 3),
        id="tail of the cumulative lengths falls to 0",
    ),
    Plant(
        lengths.ForgetsTopK, one_replay(DECODE, 9), Kind.VALUE, "nsa_cache_seqlens_int32",
        ROW_0, "9", "8", id="top-k limit forgotten",
    ),
    Plant(
        lengths.CuSeqlensAreLengths, TWO_LENGTHS, Kind.VALUE, "cu_seqlens_k",
        "bound before request 2", "6", "9", event=3, counts=(1, 3), id="lengths for cumulative lengths",
    ),
    # Page tables
    Plant(
        tables.NarrowTable, one_replay(DECODE), Kind.SHAPE, "page_table_1",
        "", "[1, 14]", "[1, 16]", id="table narrower than the graph's",
    ),
    Plant(
        tables.NarrowFill, one_replay(VERIFY, 14), Kind.VALUE, "page_table_1",
        # 14 tokens and 2 drafts: the first draft sees 15 columns, of which 14 were written.
        f"{ROW_0}, column 14", POISON, "18", counts=(3, 31), id="overshoot columns not written",
    ),
    Plant(
        tables.SortsPages, one_replay(DECODE, 5, page_layout=PageLayout.DESCENDING),
        # 12 pages, the request has 12, 11.
        Kind.VALUE, "real_page_table", f"{ROW_0}, page column 0", "11", "12", counts=(2, 2), id="pages sorted",
    ),
    Plant(
        tables.ReadsRawPoolRow,
        case(
            Capture(mode=DECODE, buckets=(1,)),
            Join(seq_len=3),
            Join(seq_len=5),
            Finish(request=0),
            Replay(mode=DECODE),
        ),
        # The request left has pool row 1, whose pages are those after the two of the first.
        Kind.VALUE, "page_table_1", f"{ROW_0}, column 0", POISON, "12", event=4, counts=(5, 5), id="raw pool row",
    ),
    # Form of the output
    Plant(
        form.Int64Lengths, one_replay(DECODE), Kind.DTYPE, "cache_seqlens_int32",
        "", "torch.int64", "torch.int32", id="int64 output",
    ),
    Plant(form.OneRowTooMany, one_replay(DECODE), Kind.SHAPE, "seqlens_expanded", "", "[2]", "[1]", id="spare row"),
    Plant(
        form.LacksQueryBounds, one_replay(DECODE), Kind.MISSING, "nsa_cu_seqlens_q",
        "", "None", "a tensor of shape [2]", id="field missing",
    ),
    Plant(
        form.LacksPageTable, one_replay(DECODE), Kind.MISSING, "page_table_1",
        "", "None", "a tensor of shape [1, 16]", id="page table missing",
    ),
    Plant(
        form.LacksExpandedLengths, one_replay(DECODE), Kind.MISSING, "seqlens_expanded",
        "", "None", "a tensor of shape [1]", id="expanded lengths missing",
    ),
    Plant(
        form.LacksExpandedLengths, case(Join(seq_len=3), Eager(mode=DECODE)), Kind.MISSING, "seqlens_expanded",
        "", "None", "a tensor of shape [1]", event=1, id="expanded lengths missing, eager",
    ),
    Plant(
        form.OffersPrefillField, one_replay(DECODE), Kind.UNEXPECTED, "topk_indices_offset",
        "", "a tensor of shape [1]", "None", id="field of another mode",
    ),
    Plant(
        form.WrongHostScalar, one_replay(DECODE), Kind.HOST_SCALAR, "max_seq_len_q",
        "", "2", "1", id="wrong host scalar",
    ),
    # Eager calls
    Plant(
        eager.EagerReadsPadding, case(Join(seq_len=3), Eager(mode=DECODE)), Kind.SHAPE, "page_table_1",
        "", "[1, 16]", "[1, 3]", event=1, id="eager table as wide as a graph's",
    ),
    Plant(
        eager.EagerReadsPadding,
        case(Capture(mode=DECODE, buckets=(1,)), Join(seq_len=3), Join(seq_len=5), Replay(mode=DECODE)),
        Kind.SHAPE, "page_table_1", "", "[2, 16]", "[2, 5]", event=3, id="batch outgrows its bucket",
    ),
    Plant(
        eager.PrefillForgetsPrefix,
        case(Join(seq_len=10), Join(seq_len=4), Eager(mode=EXTEND, extend_lens=(3, 2))),
        Kind.VALUE, "seqlens_expanded", ROW_0, "1", "8", counts=(5, 5), id="prefill forgets the prefix",
    ),
    Plant(
        eager.PrefillSwapsTables,
        case(Join(seq_len=10), Join(seq_len=4), Eager(mode=EXTEND, extend_lens=(3, 2))),
        # One row a request: the second request's pages begin behind the 3 of the first.
        Kind.VALUE, "page_table_1", "~request 1", "4", "16", counts=(4, 14), id="prefill table of another request",
    ),
    # Memory that is not the backend's to write
    Plant(
        memory.WritesOneRowBeyond, one_replay(DECODE), Kind.GUARD, "~page_table_1, a buffer of shape [1, 16]",
        "", "a written guard band", "no write around it", step=None, id="one row beyond",
    ),
    Plant(
        memory.WritesBesideAFieldEagerly, case(Join(seq_len=3), Eager(mode=DECODE)), Kind.GUARD,
        "~cu_seqlens_k, a buffer of shape [2]", "", "a written guard band", "no write around it", step=None, event=1,
        id="beyond a field of an eager call",
    ),
    Plant(
        memory.WritesBesideItsScratch, case(Join(seq_len=3), Eager(mode=DECODE)), Kind.GUARD,
        "~WritesBesideItsScratch.scratch[...][0], a buffer of shape [8]", "", "a written guard band",
        "no write around it", step=None, event=1, id="beyond a tensor that is no field",
    ),
    Plant(
        memory.WritesReqToToken, one_replay(DECODE), Kind.INPUT, "req_to_token", step=None, id="writes the pool",
    ),
    Plant(
        memory.WritesBesideReqToToken, one_replay(DECODE, inputs=Inputs(wide_req_to_token=True)),
        Kind.INPUT, "req_to_token", step=None, id="writes beside the pool",
    ),
    Plant(
        memory.WritesTheMirror, one_replay(DECODE), Kind.INPUT, "seq_lens_cpu", step=None,
        id="writes the host's lengths",
    ),
    Plant(
        memory.WritesReqToTokenWhenBuilt, one_replay(DECODE), Kind.INPUT, "req_to_token", step=None, event=None,
        id="writes the pool when it is built",
    ),
    Plant(memory.WritesSeqLens, one_replay(DECODE), Kind.INPUT, "seq_lens", step=None, id="writes the lengths"),
    # Captured graphs
    Plant(
        in_graph.SyncsInCapture, one_replay(DECODE), Kind.CAPTURE, "torch.Tensor.item",
        "~in_graph.py", "", "a capturable operation", step=None, event=0, id="host sync in capture",
    ),
    Plant(
        in_graph.FreezesLength, one_replay(DECODE), Kind.VALUE, "cache_seqlens_int32",
        "request 0", "1", "3", id="length frozen into the graph",
    ),
    Plant(
        in_graph.FreezesLimit, one_replay(DECODE), Kind.FROZEN, "max", "~aten.clamp",
        "114 when captured at lengths 14", "101, as when captured on padding", step=None,
        id="limit frozen into the graph, which only long requests reach",
    ),
    Plant(
        in_graph.ClearsByTheMirror, one_replay(DECODE), Kind.FROZEN, "",  # of a slice, or of what fills it
        "~of the DECODE graph of bucket 1", "~13", "~as when captured on padding", step=None,
        id="size of the host's frozen, which no replay shows",
    ),
    Plant(
        in_graph.AccumulatesInGraph, one_replay(DECODE), Kind.VALUE, "cache_seqlens_int32",
        "request 0", "6", "3", id="graph adds to itself",
    ),
    Plant(
        in_graph.DropsScratch,
        case(Capture(mode=DECODE, buckets=(1, 2)), Join(seq_len=3), Replay(mode=DECODE, bucket=1)),
        Kind.CAPTURE, "capture", "~DECODE, bucket 1", "", "a capturable operation", step=None,
        id="scratch of a capture dropped",
    ),
    # Exceptions
    Plant(
        crashes.RaisesWhenBuilt, one_replay(DECODE), Kind.CRASH, "RuntimeError",
        "~crashes.py", "no such device", "no exception", step=None, event=None, id="raises when built",
    ),
    Plant(
        crashes.RaisesAtReplay, one_replay(DECODE), Kind.CRASH, "IndexError",
        "~in refresh", "row 3 of 2", "no exception", step=None, id="raises at replay",
    ),
)  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.id)
def test_planted_bug_is_named(plant: Plant, device: torch.device) -> None:
    with pytest.raises(OracleFailure) as caught:
        judge(plant.scenario, factory_of(plant.backend), device)
    finding, event = caught.value.finding, caught.value.event
    assert (finding.kind, finding.step, event) == (plant.kind, plant.step, plant.event), finding.sentence()
    assert matches(finding.field, plant.field), finding.sentence()
    assert matches(finding.place, plant.place), finding.sentence()
    assert matches(finding.got, plant.got), finding.sentence()
    assert matches(finding.expected, plant.expected), finding.sentence()
    if plant.counts is not None:
        assert (finding.differing, finding.compared) == plant.counts, finding.sentence()
    assert caught.value.scenario == plant.scenario
    assert str(caught.value) == finding.sentence()
    assert len(finding.sentence().splitlines()) == 1


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.id)
def test_scenario_of_a_plant_passes_without_it(plant: Plant, device: torch.device) -> None:
    """Otherwise the finding above would say nothing about the plant."""
    verdict = judge(plant.scenario, factory_of(clean.Clean), device)
    runs = [e for e in plant.scenario.events if isinstance(e, Replay | Eager)]
    assert verdict.cases == 1
    assert verdict.replays + verdict.eager_calls == 2 * len(runs)


@pytest.mark.parametrize(
    ("backend", "how"),
    [(in_graph.AccumulatesInGraph, "replayed again without a preparation"), (in_graph.FreezesLength, AS_CAPTURED)],
)
def test_it_is_told_if_only_a_second_replay_is_wrong(backend: Any, how: str, device: torch.device) -> None:
    with pytest.raises(OracleFailure) as caught:
        judge(one_replay(DECODE), factory_of(backend), device)
    assert caught.value.finding.how == how


FREEDOMS = (
    clean.Clean,
    clean.FillsDeadCells,
    clean.LeavesScheduleColumn,
    clean.WritesArangeAtCapture,
    clean.AliasesFields,
    clean.RecomputesTwice,
    clean.InInferenceMode,
    in_graph.PreparesInGraph,
    in_graph.ChoosesByBucket,
)


def every_mode(page_size: int, **setup: Any) -> Scenario:
    """All modes in graphs and eagerly, padded and full, small after large, with a host that lags behind."""
    round_of_replays: list[Event] = [
        *(Replay(mode=mode, mirror=Mirror.STALE, times=2) for mode in GRAPH_MODES),
        *(Eager(mode=mode, extend_lens=(2, 1)) for mode in ForwardMode),
    ]
    sizes = {"page_size": page_size, "max_context_len": 21, "paged_mqa_num_sms": 3, "flashmla_num_sm_parts": 2}
    return case(
        *(Capture(mode=mode, buckets=(1, 3)) for mode in GRAPH_MODES),
        Join(seq_len=9),
        *round_of_replays,
        Join(seq_len=4, prefix_of=0),
        Accept(accept_lengths=(2, 0)),
        *round_of_replays,
        Finish(request=0),
        *round_of_replays,
        **{**sizes, **setup},
    )


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("backend", FREEDOMS, ids=lambda backend: backend.__name__)
def test_freedom_of_the_contract_passes(backend: Any, page_size: int, device: torch.device) -> None:
    verdict = judge(every_mode(page_size, num_steps=2), factory_of(backend), device)
    assert verdict.replays == 2 * 3 * 2 * len(GRAPH_MODES)  # two poisons, three rounds, each replay twice
    assert verdict.eager_calls == 2 * 3 * len(ForwardMode)


class CorruptsItsConfig(MultiStepBackend):
    """Changes the configuration that it is given."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        object.__setattr__(config, "index_topk", 1)
        super().__init__(config, req_to_token)


def test_a_changed_configuration_changes_no_expected_value(device: torch.device) -> None:
    with pytest.raises(OracleFailure, match="nsa_cache_seqlens_int32"):
        judge(every_mode(4, num_steps=1), factory_of(CorruptsItsConfig), device)


@pytest.mark.parametrize("drive", Drive)
@pytest.mark.parametrize("semantics", StepSemantics)
def test_reference_passes(drive: Drive, semantics: StepSemantics, device: torch.device) -> None:
    inputs = Inputs(strided=True, wide_req_to_token=True)
    scenario = every_mode(4, num_steps=3, drive=drive, step_semantics=semantics, inputs=inputs)
    assert judge(scenario, factory_of(clean.Clean), device).tally.cells > 0


def test_only_passed_scenarios_are_counted(device: torch.device) -> None:
    """A verdict says what was covered by scenarios that passed, both runs of each."""
    verdict = judge(TWO_LENGTHS, factory_of(clean.Clean), device)
    before = dataclasses.replace(verdict, tally=dataclasses.replace(verdict.tally))
    with pytest.raises(OracleFailure):
        judge(TWO_LENGTHS, factory_of(lengths.SkipsPaddingRows), device, verdict)
    assert verdict == before


def test_backend_that_cannot_be_judged_is_not_a_failure(device: torch.device) -> None:
    with pytest.raises(BackendError, match=r"lacks LacksMethod\.init_forward_metadata; "):
        judge(one_replay(DECODE), factory_of(crashes.LacksMethod), device)


def test_second_poison_catches_what_happens_to_equal_the_first(device: torch.device) -> None:
    """A value that is right only because of what lay in an unwritten cell is wrong under the other sentinel."""

    class GuessesPoison(seams.Step):
        def refresh(self, buffers: Any, batch: Any) -> None:
            super().refresh(buffers, batch)
            # The last cell of the row is dead: with the first sentinel the sum is as if nothing had been added.
            buffers.cache_seqlens_int32.add_(self.req_to_token[0, -1] - SENTINELS[0])

    with pytest.raises(OracleFailure) as caught:
        judge(one_replay(DECODE), factory_of(seams.backend_of(GuessesPoison)), device)
    finding: Finding = caught.value.finding
    assert (finding.kind, finding.field) == (Kind.VALUE, "cache_seqlens_int32")
    assert finding.got == f"{3 + SENTINELS[1] - SENTINELS[0]} (a length below 0)"


def test_failure_that_is_kept_keeps_no_engine(device: torch.device) -> None:
    """Shrinking keeps several; each engine may hold a large part of a GPU."""
    made = []

    class Remembered(replays.KeepsPageTable):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    with pytest.raises(OracleFailure) as caught:
        judge(one_replay(DECODE), factory_of(Remembered), device)
    gc.collect()
    assert made
    assert all(backend() is None for backend in made)
    assert "_judge_event" in [entry.name for entry in caught.traceback], "it still tells where it came from"


def test_failure_whose_causes_name_each_other_is_reported(device: torch.device) -> None:
    class CausesInARing(clean.Clean):
        def init_forward_metadata_replay_cuda_graph(self, *_: Any) -> None:
            first, second = ValueError("first"), ValueError("second")
            first.__cause__, second.__cause__ = second, first
            raise first

    with pytest.raises(OracleFailure, match=r"^backend raised: ValueError .*got first"):
        judge(one_replay(DECODE), factory_of(CausesInARing), device)
