"""The saved cases at corners that are never drawn without a GPU, each on backends and layers that are wrong there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa_oracle.harness.bugs.bug import by_mutation
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.judge import OracleFailure, judge, judge_subject
from nsa_oracle.harness.scenarios.files import load
from nsa_oracle.reference.multi_step import copy_into
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata
from tests.support.backends import seams
from tests.support.backends.clean import Clean
from tests.support.layers.clean import Clean as CleanLayer
from tests.support.metadata_cases import factory_of
from tests.support.project import PROJECT

CPU = torch.device("cpu")
DECODE, VERIFY = ForwardMode.DECODE, ForwardMode.TARGET_VERIFY


class Step(seams.Step):
    """A step that remembers what it likes."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, speculative_step_id: int = 0) -> None:
        super().__init__(config, req_to_token, speculative_step_id)
        self.known: dict[Any, Any] = {}
        self.replays = 0
        self.last_mode: ForwardMode | None = None


class SameBatchIsSkipped(Step):
    """Nothing is refreshed if rows, lengths and accepts, first and last slots are those of the replay before."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        rows, lengths = batch.req_pool_indices.long(), batch.seq_lens.long()
        accepts = [] if batch.spec_info is None else batch.spec_info.accept_length.tolist()
        ends = self.req_to_token[rows, 0].tolist(), self.req_to_token[rows, lengths - 1].tolist()
        now = rows.tolist(), lengths.tolist(), accepts, ends
        if self.known.get(id(buffers)) != now:
            super().refresh(buffers, batch)
        self.known[id(buffers)] = now


class RepeatedBatchIsSkipped(SameBatchIsSkipped):
    """The same, but only if no other graph was refreshed in between, as where all graphs share page tables."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        self.known = {key: known for key, known in self.known.items() if key == id(buffers)}
        super().refresh(buffers, batch)


class VerifiedTablesAreReused(Step):
    """A draft extend of the rows that were verified last gets the page tables of the verification."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        rows, verified = batch.req_pool_indices.tolist(), self.known.pop("verified", None)
        super().refresh(buffers, batch)
        if batch.forward_mode is VERIFY:
            self.known["verified"] = rows, buffers.page_table_1.clone()
        elif batch.forward_mode is ForwardMode.DRAFT_EXTEND_V2 and verified is not None and verified[0] == rows:
            buffers.page_table_1.copy_(verified[1])


class NewTokensAreAppended(Step):
    """Where a row shows a request that has not shrunk, what it showed before is kept."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        fresh = self._compute_in_graph(batch)
        now = list(zip(batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True))
        if batch.forward_mode is DECODE:
            for row, ((was, before), (pool_row, length)) in enumerate(zip(self.known.get(0, now), now, strict=True)):
                if was == pool_row and before <= length and 0 in self.known:
                    fresh.page_table_1[row, :before] = buffers.page_table_1[row, :before]
            self.known[0] = now
        copy_into(buffers, fresh)


class CounterWraps(Step):
    """A stamp of 8 bits says that a graph is up to date, every 256 replays."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        self.replays += 1
        if self.replays % 256:
            super().refresh(buffers, batch)


class SixteenGraphsAreKept(Step):
    """What was captured before the last sixteen graphs is forgotten."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        if any(buffers is kept for kept in list(self._captured.values())[-16:]):
            super().refresh(buffers, batch)


class StepsByFours(Step):
    """Of more steps than four, those behind the last whole four are left out."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        steps = self.config.speculative_num_steps
        if steps <= 4 or self.speculative_step_id < steps // 4 * 4:
            super().refresh(buffers, batch)


class DraftsByFours(Step):
    """The same for draft tokens."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        fresh, drafts = self._compute_in_graph(batch), self.config.speculative_num_draft_tokens
        if drafts > 4 and not batch.forward_mode.is_decode_or_idle:
            for draft in range(drafts // 4 * 4, drafts):
                fresh.page_table_1[draft::drafts] = buffers.page_table_1[draft::drafts]
        copy_into(buffers, fresh)


class BlockOfASum(Step):
    """A running sum starts anew behind a block of 256 requests, in one mode."""

    mode: ForwardMode

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if batch.forward_mode is self.mode and batch.batch_size > 256:
            metadata.cu_seqlens_k[257:] -= metadata.cu_seqlens_k[256].clone()


class SumsInFloat32(Step):
    """Running sums go through float32."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.nsa_cu_seqlens_k.copy_(metadata.nsa_cu_seqlens_k.float())


class PagesOfSixteenBits(Step):
    """Page numbers go through 16 bits."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.real_page_table.copy_(metadata.real_page_table.to(torch.int16))


class NothingAcceptedIsSkipped(Step):
    """A batch of several that accepted nothing has no rows to prepare."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        if batch.forward_mode is ForwardMode.DRAFT_EXTEND and batch.batch_size > 2:
            assert batch.spec_info is not None
            if not batch.spec_info.accept_length.any():
                return
        super().refresh(buffers, batch)


class IdleIsSkipped(Step):
    """A rank that idles after a verification is not prepared."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        before, self.last_mode = self.last_mode, batch.forward_mode
        if batch.forward_mode is not ForwardMode.IDLE or before is not VERIFY:
            super().refresh(buffers, batch)


def sums_of(mode: ForwardMode) -> type[Step]:
    return type(f"BlockOfASum{mode.value}", (BlockOfASum,), {"mode": mode})


@pytest.mark.parametrize(
    ("case", "step", "field"),
    [
        ("same-batch-on-other-pages", SameBatchIsSkipped, "page_table_1"),
        ("same-ends-in-replays-behind-each-other", RepeatedBatchIsSkipped, "page_table_1"),
        ("same-ends-in-replays-behind-each-other", NewTokensAreAppended, "page_table_1"),
        ("draft-extend-on-other-pages-than-its-verification", VerifiedTablesAreReused, "page_table_1"),
        ("same-batch-on-other-pages", NewTokensAreAppended, "page_table_1"),
        ("hundreds-of-replays", CounterWraps, "cache_seqlens_int32"),
        ("dozens-of-buckets", SixteenGraphsAreKept, "cache_seqlens_int32"),
        ("seven-steps-of-six-drafts", StepsByFours, "cache_seqlens_int32"),
        ("seven-steps-of-six-drafts", DraftsByFours, "page_table_1"),
        *(("hundreds-of-requests-in-other-modes-one-launch", sums_of(mode), "cu_seqlens_k") for mode in ForwardMode
          if mode is not ForwardMode.IDLE),
        ("running-sums-beyond-24-bits", SumsInFloat32, "nsa_cu_seqlens_k"),
        ("page-numbers-beyond-16-bits", PagesOfSixteenBits, "real_page_table"),
        ("nothing-left-after-verification", NothingAcceptedIsSkipped, "seqlens_expanded"),
        ("nothing-left-after-verification", IdleIsSkipped, "cache_seqlens_int32"),
    ],
)  # fmt: skip
def test_a_corner_of_metadata_shows_its_bugs(case: str, step: type[Step], field: str) -> None:
    with pytest.raises(OracleFailure) as failure:
        judge(load(PROJECT / f"tests/cases/{case}.json"), factory_of(seams.backend_of(step)), CPU)
    assert failure.value.finding.field == field


class FewIndexHeads(CleanLayer):
    """Index heads beyond a tile of the matrix units are not summed."""

    def indexer_logits(self, index_q: torch.Tensor, index_weights: torch.Tensor, *rest: Any) -> torch.Tensor:
        summed = torch.arange(index_weights.shape[1]) < 16
        return super().indexer_logits(index_q, torch.where(summed, index_weights, 0.0), *rest)


class HeadsRepeat(CleanLayer):
    """The second block of 64 heads is the first."""

    def sparse_mla(self, q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return super().sparse_mla(q[:, torch.arange(q.shape[1]) % 64], *rest)


class KeysEnd(CleanLayer):
    """Indices beyond the first 2,048 are not looked at."""

    def sparse_mla(self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor) -> Any:
        return super().sparse_mla(q, kv_cache, indices[:, :2048])


class PrefillIsAnotherKernel(CleanLayer):
    """Many rows go to a kernel that sums in another order."""

    def sparse_mla(self, q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, *rest)
        return out, torch.nextafter(lse, lse + 1) if len(q) >= 64 else lse


class SlotsOf16Bits(CleanLayer):
    """Slots to attend to are kept in 16 bits."""

    def sparse_mla(self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor) -> Any:
        return super().sparse_mla(q, kv_cache, torch.where(indices < 0, indices, indices & 0xFFFF))


class PagesOf16Bits(CleanLayer):
    """Pages to score are kept in 16 bits."""

    def indexer_logits(self, *arguments: Any) -> torch.Tensor:
        index_q, weights, cache, pages, *rest = arguments
        return super().indexer_logits(index_q, weights, cache, pages & 0xFFFF, *rest)


class StoresFewRows(CleanLayer):
    """Keys of rows beyond the first 256 are not stored."""

    def store_cache(self, caches: Any, inputs: Any) -> None:
        super().store_cache(caches, dataclasses.replace(inputs, **{n: t[:256] for n, t in vars(inputs).items()}))


class NoBlockThatWide(CleanLayer):
    """A width of exactly the largest block has none."""

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        assert min(block for block in (1024, 8192, 1 << 20) if block > logits.shape[1]) < 1 << 20
        return super().topk_indices(logits, seqlens_expanded)


@pytest.mark.parametrize(
    ("case", "layer", "what"),
    [
        ("layer-of-production-sizes", FewIndexHeads, "logits"),
        ("layer-of-production-sizes", HeadsRepeat, "out"),
        ("layer-rows-of-five-chunks", KeysEnd, "out"),
        ("layer-prefill-of-many-rows", PrefillIsAnotherKernel, "lse"),
        ("layer-width-of-exactly-a-block", NoBlockThatWide, "AssertionError"),
        ("layer-slots-beyond-16-bits", SlotsOf16Bits, "out"),
        ("layer-slots-beyond-16-bits", PagesOf16Bits, "logits"),
        ("layer-prefill-of-hundreds-of-rows", StoresFewRows, "kv_cache"),
    ],
)
def test_a_corner_of_the_layer_shows_its_bugs(case: str, layer: Callable[..., Any], what: str) -> None:
    scenario = load(PROJECT / f"tests/cases/{case}.json")
    with pytest.raises(OracleFailure) as failure:
        judge(scenario, factory_of(Clean), CPU, layer_factory=layer, graphs=False)
    assert failure.value.finding.field == what


def test_a_write_far_outside_a_buffer_is_reported(device: torch.device) -> None:
    """1.6 kB behind it, where a process without wide bands would have been ended by what it had overwritten."""
    kernel = "nsa_oracle.optimized.kernels.topk:topk_filter_kernel"
    twice_the_room = by_mutation(Mutation(kernel, "if count + total <= CAPACITY", "if count + total <= 2 * CAPACITY"))
    with twice_the_room() as subject, pytest.raises(OracleFailure) as failure:
        judge_subject(subject, load(PROJECT / "tests/cases/layer-last-row-fills-its-only-share.json"), device)
    finding = failure.value.finding
    if device.type == "cuda":
        assert finding.kind is Kind.GUARD
        assert "[133, 1, 8192]" in finding.sentence()
    else:
        assert (finding.kind, finding.field) == (Kind.LAYER_CRASH, "OutOfBounds")
        assert finding.got.startswith("a store of 8 bytes that begins 0 bytes behind the end of likely")


@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        ("batch-wider-than-two-scans", "kv_total += tl.sum(kv_lens, 0)", "kv_total = tl.sum(kv_lens, 0)"),
        (
            "sixteen-steps-of-sixteen-drafts",
            "for j in range(rows_per_request):",
            "for j in range(tl.minimum(rows_per_request, 15)):",
        ),
    ],
)
def test_sizes_beyond_those_drawn_are_prepared(case: str, old: str, new: str, device: torch.device) -> None:
    fewer = by_mutation(Mutation("nsa_oracle.optimized.kernels.lengths:write_lengths", old, new))
    with fewer() as subject, pytest.raises(OracleFailure) as failure:
        judge_subject(subject, load(PROJECT / f"tests/cases/{case}.json"), device)
    assert failure.value.finding.kind is Kind.VALUE


def test_a_line_more_than_there_is_room_for_is_reported(device: torch.device) -> None:
    """Whatever is lost at the end of a row was among its best once."""
    kernel = "nsa_oracle.optimized.kernels.topk:topk_kernel"
    one_line_more = by_mutation(Mutation(kernel, "num_lines <= BLOCK // LINE", "num_lines <= BLOCK // LINE + 1"))
    with one_line_more() as subject, pytest.raises(OracleFailure) as failure:
        judge_subject(subject, load(PROJECT / "tests/cases/layer-one-token-wider-than-a-block.json"), device)
    assert failure.value.finding.field == "topk_indices"
