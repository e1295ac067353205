"""Bugs of padding, buckets, idle ranks and empty batches."""

from __future__ import annotations

import dataclasses

from nsa_oracle.harness.bugs.bug import REVIEW, Bug, Group, by_mutation, by_wrapping
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.bugs.wrappers import BackendWrapper, HostNumbers, KeepsFields, Moment, OwnInputs
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.reference.types import ForwardBatch, ForwardMode


class LeavesPadding(OwnInputs):
    """Replays write only the real requests to the static inputs."""

    def load(self, numbers: HostNumbers, batch: ForwardBatch, moment: Moment, step: int | None) -> HostNumbers:
        count = numbers.raw_bs if moment is Moment.REPLAY else len(numbers.seq_lens)
        return HostNumbers(numbers.seq_lens[:count], numbers.pool_rows[:count], numbers.accept_lengths[:count])


class PadsWithMinusOne(OwnInputs):
    """Padded requests have length -1."""

    def load(self, numbers: HostNumbers, batch: ForwardBatch, moment: Moment, step: int | None) -> HostNumbers:
        numbers.seq_lens[numbers.raw_bs :] = [-1] * (len(numbers.seq_lens) - numbers.raw_bs)
        return numbers


class PadsWithLastRow(OwnInputs):
    """Padded requests have the pool row that index -1 selects on the host, the last."""

    def load(self, numbers: HostNumbers, batch: ForwardBatch, moment: Moment, step: int | None) -> HostNumbers:
        last = self.pool.shape[0] - 1
        numbers.pool_rows[numbers.raw_bs :] = [last] * (len(numbers.pool_rows) - numbers.raw_bs)
        return numbers


class IdleKeepsSchedules(KeepsFields):
    """An IDLE replay prepares all but the schedules."""

    names = ("paged_mqa_schedule_metadata", "flashmla_metadata", "flashmla_num_splits")

    def keeps(self, batch: ForwardBatch) -> bool:
        return batch.forward_mode is ForwardMode.IDLE


class IdleKeepsBatch(OwnInputs):
    """An IDLE replay writes nothing to the static inputs."""

    def load(self, numbers: HostNumbers, batch: ForwardBatch, moment: Moment, step: int | None) -> HostNumbers:
        return HostNumbers([], [], []) if batch.forward_mode is ForwardMode.IDLE else numbers


class ReplaysRawSize(BackendWrapper):
    """The backend gets the batch without its padding, and prepares the bucket of the raw size."""

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        if moment is not Moment.REPLAY:
            return batch
        raw_bs = HostNumbers.of(batch).raw_bs or batch.batch_size  # an idle rank has nothing but padding
        return dataclasses.replace(
            batch, batch_size=raw_bs, req_pool_indices=batch.req_pool_indices[:raw_bs], seq_lens=batch.seq_lens[:raw_bs]
        )


BUGS = (
    Bug(
        name="padding-not-refilled",
        group=Group.PADDING,
        sentence="The runner writes only the real requests; behind them its inputs keep an earlier, larger batch.",
        reference="sglang#22958",
        trigger="a batch smaller than its bucket, after a batch that filled it",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(LeavesPadding),
    ),
    Bug(
        name="raw-size-taken-for-the-bucket",
        group=Group.PADDING,
        sentence="A replay prepares the bucket of the raw batch size, not the bucket whose graph is replayed.",
        reference="sglang#22958",
        trigger="a batch smaller than its bucket",
        caught_by=frozenset({Check.METADATA, Check.ADDRESS, Check.CRASH}),
        plant=by_wrapping(ReplaysRawSize),
    ),
    Bug(
        name="padded-length-below-draft-tokens",
        group=Group.PADDING,
        sentence="A padded request of length 1 has more draft tokens than KV, so some of its rows get lengths below 0.",
        reference="sglang#30378",
        trigger="DRAFT_EXTEND_V2 with padding or a short request, several draft tokens",
        caught_by=frozenset({Check.METADATA}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.kernels.lengths:write_lengths",
                "expanded = tl.maximum(position, 0)",
                "expanded = position",
            ),
            Mutation("nsa_oracle.optimized.lengths:seqlens_expanded", ".clamp_(min=0)", ""),
        ),
    ),
    Bug(
        name="pads-lengths-with-minus-one",
        group=Group.PADDING,
        sentence="Padding has length -1, which kernels read as the largest unsigned number.",
        reference="vllm#51593",
        trigger="a batch smaller than its bucket, or a capture",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(PadsWithMinusOne),
    ),
    Bug(
        name="pads-pool-rows-with-minus-one",
        group=Group.PADDING,
        sentence="Padding has pool row -1, which indexes the last row of the table.",
        reference="vllm#35969",
        trigger="a batch smaller than its bucket, a pool of several rows",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(PadsWithLastRow),
    ),
    Bug(
        name="fields-sized-for-requests",
        group=Group.PADDING,
        sentence="Fields with one entry per query token are allocated with one entry per request.",
        reference="vllm-ascend#16168",
        trigger="several draft tokens per request",
        caught_by=frozenset({Check.SHAPE, Check.CRASH}),
        plant=by_mutation(
            # A prefill of many tokens keeps the right size: otherwise the test would write far beyond the buffer.
            Mutation(
                "nsa_oracle.optimized.buffers:field_pitch",
                "max(bs, num_rows) + 1",
                "(bs if num_rows <= 8 * bs else num_rows) + 1",
            )
        ),
    ),
    Bug(
        name="schedule-search-beyond-the-last-row",
        group=Group.PADDING,
        sentence="When all lengths are 0, the search for a multiprocessor's row ends beyond the last row.",
        reference="vllm#51972",
        trigger="a replay in which no request accepted anything, with a paged MQA schedule",
        caught_by=frozenset({Check.METADATA}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.kernels.schedules:write_paged_mqa_schedule",
                "tl.where(idle, tl.max",
                "tl.where(idle & (total > 0), tl.max",
            )
        ),
    ),
    Bug(
        name="splits-aligned-unlike-queries",
        group=Group.PADDING,
        sentence="The schedule's splits are sized for an aligned number of rows, the queries for the exact number.",
        reference="sglang#34443",
        trigger="a FlashMLA schedule, a number of rows that is not aligned",
        caught_by=frozenset({Check.SHAPE}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.buffers:_view",
                "slots[fields.FLASHMLA_NUM_SPLITS.value][: rows + 1]",
                "slots[fields.FLASHMLA_NUM_SPLITS.value][: round_up(rows) + 1]",
            )
        ),
    ),
    Bug(
        name="idle-rank-keeps-its-batch",
        group=Group.PADDING,
        sentence="A rank without requests replays with the inputs of its last batch.",
        reference="sglang#15227",
        trigger="IDLE after a DECODE with requests",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(IdleKeepsBatch),
    ),
    Bug(
        name="maximum-of-no-lengths",
        group=Group.PADDING,
        sentence="The width of an eager page table is the maximum of the lengths, which an empty batch does not have.",
        reference="sglang#33892",
        trigger="an eager call without requests",
        caught_by=frozenset({Check.CRASH}),
        plant=by_mutation(
            Mutation("nsa_oracle.optimized.metadata:read_sizes", "max(seq_lens, default=-1)", "max(seq_lens)")
        ),
    ),
    Bug(
        name="idle-rank-keeps-its-schedules",
        group=Group.PADDING,
        sentence="A rank without requests replays with new lengths, but with the schedules of its last batch.",
        reference=REVIEW,
        trigger="IDLE in a graph that served a batch whose schedules differ from those of padding",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(IdleKeepsSchedules),
    ),
    Bug(
        name="ragged-batch-taken-for-uniform",
        group=Group.PADDING,
        sentence="A batch whose requests have different numbers of tokens is laid out as if all had the same number.",
        reference="vllm#52500",
        trigger="DRAFT_EXTEND with an accept length below the number of draft tokens",
        caught_by=frozenset({Check.METADATA, Check.SHAPE}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.lengths:row_layout",
                "fields.RAGGED if mode.is_ragged else fields.UNIFORM",
                "fields.UNIFORM",
            ),
            Mutation(
                "nsa_oracle.optimized.lengths:query_lens",
                "if batch.forward_mode is ForwardMode.DRAFT_EXTEND:",
                "if False:",
            ),
        ),
    ),
)
