"""Bugs of page tables, of the pool that they are gathered from, of host mirrors, and of the order of operations."""

from __future__ import annotations

import dataclasses

import torch

from nsa_oracle.harness.bugs.bug import REVIEW, Bug, Group, by_mutation, by_wrapping
from nsa_oracle.harness.bugs.catalogue.targets import STEP
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.bugs.wrappers import DRAFT_EXTENDS, BackendWrapper, HostNumbers, Moment, OwnInputs, OwnPool
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.reference.types import BackendConfig, ForwardBatch


class NarrowPool(BackendWrapper):
    """The pool lacks its last ``speculative_num_draft_tokens`` columns, which drafts near the context limit need."""

    def pool_for(self, req_to_token: torch.Tensor) -> torch.Tensor:
        return req_to_token[:, : self.config.max_context_len - self.config.speculative_num_draft_tokens]


class TrustsMirror(OwnInputs):
    """Lengths come from the host mirror, if there is one."""

    def load(self, numbers: HostNumbers, batch: ForwardBatch, moment: Moment, step: int | None) -> HostNumbers:
        if batch.seq_lens_cpu is not None:
            numbers.seq_lens = batch.seq_lens_cpu.tolist()
        return numbers


class TrustsPlausibleMirror(OwnInputs):
    """Lengths come from the host mirror, if the sum, the longest and those at both ends are the device's."""

    def load(self, numbers: HostNumbers, batch: ForwardBatch, moment: Moment, step: int | None) -> HostNumbers:
        mirror = [] if batch.seq_lens_cpu is None else batch.seq_lens_cpu.tolist()
        real = numbers.seq_lens[: len(mirror)]
        if mirror and _checksum(mirror) == _checksum(real):
            numbers.seq_lens[: len(mirror)] = mirror
        return numbers


def _checksum(lengths: list[int]) -> tuple[int, ...]:
    return sum(lengths), max(lengths), lengths[0], lengths[-1]


class RecyclesRow(OwnPool):
    """The worst case of the race: the last request's row is reassigned before the draft extend reads it."""

    def mapped(self, mapping: torch.Tensor, batch: ForwardBatch, moment: Moment) -> None:
        if batch.forward_mode in DRAFT_EXTENDS and moment is Moment.REPLAY:
            raw_bs, rows = HostNumbers.of(batch).raw_bs, batch.req_pool_indices.tolist()
            if raw_bs:
                mapping[rows[raw_bs - 1]] = self.pool[(rows[raw_bs - 1] + 1) % len(mapping)]


class PlansTooEarly(BackendWrapper):
    """The worst case of a race of two streams: the plan reads the inputs before the batch is copied into them."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]) -> None:
        super().__init__(config, req_to_token, optimizations)
        self.before: dict[int | None, ForwardBatch] = {}

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        if moment is not Moment.REPLAY:
            return batch
        before = self.before.get(step, batch)
        self.before[step] = dataclasses.replace(
            batch, seq_lens=batch.seq_lens.clone(), req_pool_indices=batch.req_pool_indices.clone()
        )
        if (before.forward_mode, before.batch_size) != (batch.forward_mode, batch.batch_size):
            return batch
        return dataclasses.replace(batch, seq_lens=before.seq_lens, req_pool_indices=before.req_pool_indices)


class FiltersTable(OwnInputs):
    """Requests that accepted nothing are filtered out of the page table, but not out of the lengths."""

    def load(self, numbers: HostNumbers, batch: ForwardBatch, moment: Moment, step: int | None) -> HostNumbers:
        if numbers.accept_lengths:
            kept = [row for row, accepted in zip(numbers.pool_rows, numbers.accept_lengths, strict=True) if accepted]
            numbers.pool_rows = kept + [0] * (len(numbers.pool_rows) - len(kept))
        return numbers


class ReadsHalves(BackendWrapper):
    """Reads 64-bit pool rows 32 bits at a time."""

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        rows = batch.req_pool_indices
        if rows.stride(0) != 1:  # contiguous() would not copy a strided tensor of a single row
            rows = rows.clone(memory_format=torch.contiguous_format)
        return dataclasses.replace(batch, req_pool_indices=rows.view(torch.int32)[: batch.batch_size])


BUGS = (
    Bug(
        name="page-number-of-16-bits",
        group=Group.TABLES,
        sentence="A page number passes through 16 bits on its way to the page table: beyond 32,767 it is negative.",
        reference=REVIEW,
        trigger="a page whose number is beyond 32,767, which no pool that is drawn for a CPU has",
        caught_by=frozenset({Check.METADATA}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.kernels.page_table:write_table_rows",
                "mask=live_pages, other=0) // PAGE_SIZE",
                "mask=live_pages, other=0) // PAGE_SIZE\n            page_ids = page_ids.to(tl.int16)",
            )
        ),
        drawn=False,
    ),
    Bug(
        name="pool-narrower-than-overshoot",
        group=Group.TABLES,
        sentence="The pool has no columns for the drafts of a request near the context limit.",
        reference="sglang#19016",
        trigger="a length within num_draft_tokens of the context",
        caught_by=frozenset({Check.METADATA, Check.SHAPE}),
        plant=by_wrapping(NarrowPool),
    ),
    Bug(
        name="fill-stops-before-overshoot",
        group=Group.TABLES,
        sentence="A graph's page table is wide enough, but the columns that drafts overshoot into are not filled.",
        reference="sglang#29379",
        trigger="a replay with a length within num_draft_tokens of the context",
        caught_by=frozenset({Check.METADATA}),
        plant=by_mutation(
            Mutation(
                f"{STEP}.refresh",
                "self.req_to_token,",
                "self.req_to_token[:, : -self.config.speculative_num_draft_tokens],",
            ),
            Mutation(
                f"{STEP}.init_forward_metadata_in_graph",
                "self.req_to_token,",
                "self.req_to_token[:, : -self.config.speculative_num_draft_tokens],",
            ),
            Mutation(
                "nsa_oracle.optimized.metadata:compute_metadata",
                "sizes.num_rows, width, optimizations",
                "sizes.num_rows, width - in_graph * config.speculative_num_draft_tokens, optimizations",
            ),
        ),
    ),
    Bug(
        name="eager-needs-the-host-mirror",
        group=Group.TABLES,
        sentence="The eager fallback sizes its page table from the host mirror, which may be absent or stale.",
        reference="sglang#29798",
        trigger="an eager call without a mirror",
        caught_by=frozenset({Check.CRASH, Check.SHAPE}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.metadata:read_sizes",
                "max(seq_lens, default=-1)",
                "max(batch.seq_lens_cpu.tolist(), default=-1)",
            )
        ),
    ),
    Bug(
        name="host-mirror-trusted",
        group=Group.TABLES,
        sentence="Lengths are taken from the host mirror, which lags behind the device.",
        reference="TensorRT-LLM#14640",
        trigger="a replay with a stale mirror",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(TrustsMirror),
    ),
    Bug(
        name="plausible-mirror-trusted",
        group=Group.TABLES,
        sentence="Lengths are taken from the host mirror if its sum, its longest and those at both ends are right.",
        reference=REVIEW,
        trigger="a replay whose mirror has the lengths of two requests in each other's place",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(TrustsPlausibleMirror),
    ),
    Bug(
        name="row-recycled-while-read",
        group=Group.TABLES,
        sentence="A finished request's pool row is reassigned while the draft extend still reads it.",
        reference="sglang#18803",
        trigger="DRAFT_EXTEND or DRAFT_EXTEND_V2, a pool of several rows",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(RecyclesRow),
    ),
    Bug(
        name="plan-not-ordered-after-inputs",
        group=Group.TABLES,
        sentence="The stream that plans a replay does not wait for the stream that copies the batch into the inputs.",
        reference="sglang#28034",
        trigger="two replays of one graph with different batches",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(PlansTooEarly),
    ),
    Bug(
        name="place-in-batch-taken-for-pool-row",
        group=Group.TABLES,
        sentence="A request's index in the batch is used to index the pool.",
        reference="TensorRT-LLM#13124",
        trigger="a request whose pool row differs from its index in the batch",
        caught_by=frozenset({Check.METADATA}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.kernels.metadata:fill_metadata_kernel",
                "tl.load(req_pool_indices + request * pool_stride).to(tl.int64)",
                "request.to(tl.int64)",
            ),
            Mutation(
                "nsa_oracle.optimized.page_table:page_table_1",
                "batch.req_pool_indices[:bs].to(torch.int64)",
                "torch.arange(bs, device=batch.req_pool_indices.device)",
            ),
        ),
    ),
    Bug(
        name="width-hard-coded-2048",
        group=Group.TABLES,
        sentence="Page tables are filled only up to column 2048, whatever the context length.",
        reference="sglang#39431",
        trigger="a request longer than 2048 tokens",
        caught_by=frozenset({Check.METADATA, Check.SHAPE}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.kernels.metadata:fill_metadata_kernel",
                "tl.minimum(length, width)",
                "tl.minimum(tl.minimum(length, width), 2048)",
            ),
            Mutation(
                "nsa_oracle.optimized.page_table:page_table_1",
                "req_to_token[:, :width]",
                "req_to_token[:, : min(width, 2048)]",
            ),
        ),
    ),
    Bug(
        name="slice-taken-for-contiguous",
        group=Group.TABLES,
        sentence="Rows of the pool are addressed as if it were contiguous, although it is a slice of a wider tensor.",
        reference="vllm#42135",
        trigger="req_to_token as columns of a wider tensor",
        caught_by=frozenset({Check.METADATA}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.metadata:fill",
                "req_to_token,\n",
                "req_to_token.as_strided(req_to_token.shape, (req_to_token.shape[1], 1)),\n",
            ),
            Mutation(
                "nsa_oracle.optimized.page_table:page_table_1",
                "return req_to_token[",
                "return req_to_token.as_strided(req_to_token.shape, (req_to_token.shape[1], 1))[",
            ),
        ),
    ),
    Bug(
        name="table-filtered-lengths-not",
        group=Group.TABLES,
        sentence="Requests that accepted nothing are filtered out of the page table, but not out of the lengths.",
        reference="sglang#20531",
        trigger="a draft extend in which a request before the last accepted nothing",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(FiltersTable),
    ),
    Bug(
        name="wide-indices-read-as-narrow",
        group=Group.TABLES,
        sentence="64-bit pool rows are read as if they were 32-bit.",
        reference="sglang#12300",
        trigger="int64 indices, two requests or more",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(ReadsHalves),
    ),
    Bug(
        name="pool-offset-loses-high-bits",
        group=Group.TABLES,
        sentence="The offset of a pool row is truncated to 31 bits, so rows of a large pool are read elsewhere.",
        reference="sglang#34725",
        trigger="a pool whose rows are far apart, and its last row in use",
        caught_by=frozenset({Check.METADATA}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.kernels.metadata:fill_metadata_kernel",
                "source = req_to_token + pool_row * req_to_token_stride",
                "source = req_to_token + ((pool_row * req_to_token_stride) & 0x7FFFFFFF)",
            )
        ),
    ),
    Bug(
        name="accepts-read-by-the-stride-of-lengths",
        group=Group.TABLES,
        sentence="Accept lengths are addressed with the stride of the lengths, as if both views had the same stride.",
        reference="vllm#42135",
        trigger="a draft extend or a prefill of three requests or more, from strided inputs",
        caught_by=frozenset({Check.METADATA}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.kernels.lengths:load_lengths",
                "tl.load(query_lens + requests * query_stride, mask=valid, other=0)",
                "tl.minimum(tl.load(query_lens + requests * seq_stride, mask=valid, other=0), rows_per_request)",
            )
        ),
    ),
    Bug(
        name="new-lengths-taken-for-dense",
        group=Group.TABLES,
        sentence="The query bounds of a prefill are summed as if extend_seq_lens were contiguous.",
        reference="vllm#42135",
        trigger="a prefill of two requests or more, from strided inputs",
        caught_by=frozenset({Check.METADATA}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.lengths:fill_lengths",
                "_cumulate(q_lens[None], out",
                "_cumulate(batch.extend_seq_lens.as_strided((bs,), (1,))[None], out",
            )
        ),
    ),
    Bug(
        name="fused-launch-drops-a-fill",
        group=Group.TABLES,
        sentence="The fused launch omits one of the fills that it replaced: the running sum behind the last live row.",
        reference="sglang#31824",
        trigger="DRAFT_EXTEND that does not use all rows of its graph",
        caught_by=frozenset({Check.METADATA}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.kernels.lengths:write_lengths",
                "tl.store(base + pitch * NSA_CU_SEQLENS_K + 1, nsa_total, mask=tail)",
                "pass",
            )
        ),
    ),
)
