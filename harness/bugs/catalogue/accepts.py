"""Bugs of accept lengths, and of verify and the draft extends, which use them."""

from __future__ import annotations

import dataclasses

import torch

from nsa_oracle.harness.bugs.bug import REVIEW, Bug, Group, by_mutation, by_wrapping
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.bugs.wrappers import BackendWrapper, HostNumbers, KeepsFields, Moment
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.protocol import SingleStepBackend
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, SpecInfo


class IgnoresPadding(BackendWrapper):
    """Padded requests get KV length 0, although they have query tokens."""

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        if moment is Moment.REPLAY:
            raw_bs, metadata = HostNumbers.of(batch).raw_bs, backend.forward_metadata
            metadata.cache_seqlens_int32[raw_bs:] = 0
            metadata.cu_seqlens_k[raw_bs + 1 :] = metadata.cu_seqlens_k[raw_bs].clone()


class KeepsPlan(KeepsFields):
    """Replays of DECODE and IDLE with several steps keep the schedules of the previous replay."""

    names = ("paged_mqa_schedule_metadata", "flashmla_metadata", "flashmla_num_splits")

    def keeps(self, batch: ForwardBatch) -> bool:
        return len(self.attn_backends) > 1 and batch.forward_mode.is_decode_or_idle


class SelectsAtCapture(BackendWrapper):
    """Selects the accept lengths of a graph's requests when it is bound; the preparation in the graph reads these."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, optimizations: tuple[str, ...]) -> None:
        super().__init__(config, req_to_token, optimizations)
        self.selected: dict[int | None, torch.Tensor] = {}

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        if batch.spec_info is None:
            return batch
        accepted = batch.spec_info.accept_length
        if moment is Moment.CAPTURE:
            requests = torch.arange(len(accepted), device=accepted.device)
            self.selected[step] = accepted.index_select(0, requests)
        if moment is Moment.IN_GRAPH:
            return dataclasses.replace(batch, spec_info=SpecInfo(self.selected[step]))
        return batch


BUGS = (
    Bug(
        name="accepts-selected-at-capture",
        group=Group.ACCEPTS,
        sentence="A graph reads accept lengths that were selected into a tensor of their own when it was captured.",
        reference=REVIEW,
        trigger="a draft extend that is prepared in the graph, with other accept lengths than at the capture",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(SelectsAtCapture),
    ),
    Bug(
        name="no-accept-underflows-offset",
        group=Group.ACCEPTS,
        sentence="The rows of a request are located from its last row, which a request that accepted nothing lacks.",
        reference="tokenspeed#298",
        trigger="DRAFT_EXTEND in which a request accepted nothing",
        caught_by=frozenset({Check.METADATA, Check.CRASH}),  # two programs write one row: a race
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.kernels.lengths:write_lengths",
                "rows = row_ends - q_lens + j",
                "rows = row_ends - tl.maximum(q_lens, 1) + j",
            ),
            Mutation(
                "nsa_oracle.optimized.kernels.lengths:write_lengths", "(j < q_lens)", "(j < tl.maximum(q_lens, 1))"
            ),
        ),
    ),
    Bug(
        name="one-token-per-request",
        group=Group.ACCEPTS,
        sentence="Only one token of each request is prepared; the rows of its other tokens keep their old content.",
        reference="sglang#16310",
        trigger="several draft tokens per request",
        caught_by=frozenset({Check.METADATA}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.kernels.lengths:write_lengths",
                "for j in range(rows_per_request):",
                "for j in range(1):",
            )
        ),
    ),
    Bug(
        name="kv-lengths-ignore-padded-queries",
        group=Group.ACCEPTS,
        sentence="KV lengths and their bounds stop at the real requests, although the padded queries continue.",
        reference="sglang#12295",
        trigger="a batch smaller than its bucket",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(IgnoresPadding),
    ),
    Bug(
        name="verify-loses-its-drafts",
        group=Group.ACCEPTS,
        sentence="Verify sees only the committed tokens, not the drafts that it must verify.",
        reference="sglang#36430",
        trigger="TARGET_VERIFY",
        caught_by=frozenset({Check.METADATA, Check.SHAPE}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.lengths:extra_tokens",
                "config.speculative_num_draft_tokens if mode is ForwardMode.TARGET_VERIFY else 0",
                "0",
            )
        ),
    ),
    Bug(
        name="top-k-skipped-in-draft-extend",
        group=Group.ACCEPTS,
        sentence="A shortcut for short prefills, which select every key, is taken in the draft extend at any length.",
        reference="sglang#12816",
        trigger="DRAFT_EXTEND of a request longer than index_topk",
        caught_by=frozenset({Check.METADATA}),
        plant=by_mutation(
            Mutation(
                "nsa_oracle.optimized.kernels.lengths:write_lengths",
                "tl.minimum(expanded, index_topk)",
                "tl.minimum(expanded, index_topk if ROW_LAYOUT == UNIFORM else index_topk + expanded)",
            ),
            Mutation(
                "nsa_oracle.optimized.lengths:fill_lengths",
                "max=config.index_topk",
                "max=config.max_context_len if mode is ForwardMode.DRAFT_EXTEND else config.index_topk",
            ),
        ),
    ),
    Bug(
        name="plan-kept-across-draft-steps",
        group=Group.ACCEPTS,
        sentence="Draft replays keep the top-k plan and the schedules of the previous replay.",
        reference="sglang#30839",
        trigger="DECODE with several steps and schedules, lengths that change the splits",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(KeepsPlan),
    ),
)
