"""What stands behind the real requests of a batch: padding, buckets, idle ranks, empty batches."""

from __future__ import annotations

import dataclasses

from nsa_oracle.harness.bugs.bug import Bug, Group, by_mutation, by_wrapping
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.bugs.wrappers import BackendWrapper, HostNumbers, Moment, OwnInputs
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.reference.types import ForwardBatch, ForwardMode


class LeavesPadding(OwnInputs):
    def load(self, numbers: HostNumbers, batch: ForwardBatch, moment: Moment, step: int | None) -> HostNumbers:
        count = numbers.raw_bs if moment is Moment.REPLAY else len(numbers.seq_lens)
        return HostNumbers(numbers.seq_lens[:count], numbers.pool_rows[:count], numbers.accept_lengths[:count])


class PadsWithMinusOne(OwnInputs):
    def load(self, numbers: HostNumbers, batch: ForwardBatch, moment: Moment, step: int | None) -> HostNumbers:
        numbers.seq_lens[numbers.raw_bs :] = [-1] * (len(numbers.seq_lens) - numbers.raw_bs)
        return numbers


class PadsWithLastRow(OwnInputs):
    """Row -1, which a host that indexes with it takes for the last."""

    def load(self, numbers: HostNumbers, batch: ForwardBatch, moment: Moment, step: int | None) -> HostNumbers:
        last = self.pool.shape[0] - 1
        numbers.pool_rows[numbers.raw_bs :] = [last] * (len(numbers.pool_rows) - numbers.raw_bs)
        return numbers


class IdleKeepsBatch(OwnInputs):
    def load(self, numbers: HostNumbers, batch: ForwardBatch, moment: Moment, step: int | None) -> HostNumbers:
        return HostNumbers([], [], []) if batch.forward_mode is ForwardMode.IDLE else numbers


class ReplaysRawSize(BackendWrapper):
    """Without the padding of the engine, the backend is asked for the bucket of the raw size."""

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        if moment is not Moment.REPLAY:
            return batch
        raw_bs = HostNumbers.of(batch).raw_bs or batch.batch_size  # of an idle rank the padding is all there is
        return dataclasses.replace(
            batch, batch_size=raw_bs, req_pool_indices=batch.req_pool_indices[:raw_bs], seq_lens=batch.seq_lens[:raw_bs]
        )


BUGS = (
    Bug(
        name="padding-not-refilled",
        group=Group.PADDING,
        sentence="The runner fills in the real requests alone; behind them its inputs keep a larger batch of before.",
        reference="sglang#22958",
        trigger="a batch smaller than its bucket, after one that filled it",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(LeavesPadding),
    ),
    Bug(
        name="raw-size-taken-for-the-bucket",
        group=Group.PADDING,
        sentence="Replay prepares the bucket of the raw batch size, not the one whose graph is replayed.",
        reference="sglang#22958",
        trigger="a batch smaller than its bucket",
        caught_by=frozenset({Check.ADDRESS, Check.CRASH}),
        plant=by_wrapping(ReplaysRawSize),
    ),
    Bug(
        name="padded-length-below-draft-tokens",
        group=Group.PADDING,
        sentence="A padded request of length 1 has more draft tokens than KV; lengths below 0 are handed out.",
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
        sentence="Fields with an entry per query token are given room for one per request.",
        reference="vllm-ascend#16168",
        trigger="several draft tokens a request",
        caught_by=frozenset({Check.SHAPE, Check.CRASH}),
        plant=by_mutation(
            # A prefill of many tokens keeps its room: in place of it, the test would write far into foreign memory.
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
        sentence="When all lengths are 0 the search for a multiprocessor's row ends behind the last.",
        reference="vllm#51972",
        trigger="a replay in which nobody accepted anything, with a paged MQA schedule",
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
        sentence="The schedule's splits are sized for rows rounded up, the queries are not.",
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
        sentence="The width of an eager page table is the maximum of the lengths, of which an empty batch has none.",
        reference="sglang#33892",
        trigger="an eager call without requests",
        caught_by=frozenset({Check.CRASH}),
        plant=by_mutation(
            Mutation("nsa_oracle.optimized.metadata:read_sizes", "max(seq_lens, default=-1)", "max(seq_lens)")
        ),
    ),
    Bug(
        name="ragged-batch-taken-for-uniform",
        group=Group.PADDING,
        sentence="A batch whose requests have different numbers of tokens is laid out as if all had the same.",
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
