"""Bugs of limits that looked safe: so many steps, tokens, heads or slots, and never a length of 0."""

from __future__ import annotations

import dataclasses

import torch

from nsa_oracle.harness import fields
from nsa_oracle.harness.bugs.bug import REVIEW, Bug, Group, by_wrapping, layer_bug
from nsa_oracle.harness.bugs.catalogue.targets import FORWARD
from nsa_oracle.harness.bugs.mutate import Mutation
from nsa_oracle.harness.bugs.wrappers import BackendWrapper, KeepsFields, Moment
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.protocol import SingleStepBackend, SparseAttention
from nsa_oracle.reference.types import (
    AttentionConfig,
    BackendConfig,
    ForwardBatch,
    ForwardMode,
    KVCacheDtype,
    SpecInfo,
)

MOST_DRAFTS = 8  # draft steps, and draft tokens
FOLDED = 32  # heads


class RefreshesEightSteps(KeepsFields):
    """Replays leave the ninth step and later ones as they were."""

    names = tuple(field.name for field in fields.FIELDS)

    def done(self, backend: SingleStepBackend, batch: ForwardBatch, moment: Moment, index: int) -> None:
        if moment is not Moment.REPLAY or index >= MOST_DRAFTS:
            super().done(backend, batch, moment, index)


class AcceptsEightTokens(BackendWrapper):
    """A request has at most eight accepted tokens."""

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        if batch.spec_info is None:
            return batch
        return dataclasses.replace(batch, spec_info=SpecInfo(batch.spec_info.accept_length.clamp(max=MOST_DRAFTS)))


class IdleIsEmpty(BackendWrapper):
    """An eager call of an idle rank has no request."""

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        if moment is not Moment.EAGER or batch.forward_mode is not ForwardMode.IDLE:
            return batch
        rows, lengths = batch.req_pool_indices[:0], batch.seq_lens[:0]
        return dataclasses.replace(batch, batch_size=0, req_pool_indices=rows, seq_lens=lengths)


class HasOneTokenAtLeast(BackendWrapper):
    """A length of 0 counts as 1."""

    def given(self, batch: ForwardBatch, moment: Moment, step: int | None) -> ForwardBatch:
        return dataclasses.replace(batch, seq_lens=batch.seq_lens.clamp(min=1))


def folding_heads(config: BackendConfig, attention: AttentionConfig) -> SparseAttention:
    """A layer that runs 32 heads over an FP8 cache as two rows of 16, the second with the next row's selection."""
    from nsa_oracle.optimized.layer import SparseAttention as Clean  # late: importing Triton fixes how kernels run

    class FoldingHeads(Clean):
        def sparse_mla(
            self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = super().sparse_mla(q, kv_cache, indices)
            if attention.num_heads == FOLDED and attention.kv_cache_dtype is KVCacheDtype.FP8:
                half = attention.num_heads // 2
                next_out, next_lse = super().sparse_mla(q, kv_cache, indices.roll(-1, 0))
                out = torch.cat((out[:, :half], next_out[:, half:]), 1)
                lse = torch.cat((lse[:, :half], next_lse[:, half:]), 1)
            return out, lse

    return FoldingHeads(config, attention)


BUGS = (
    Bug(
        name="ninth-step-not-refreshed",
        group=Group.BUFFERS,
        sentence="Replays refresh eight draft steps, however many there are.",
        reference=REVIEW,
        trigger="more than eight draft steps",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(RefreshesEightSteps),
    ),
    Bug(
        name="ninth-token-dropped",
        group=Group.ACCEPTS,
        sentence="Of the tokens that a request accepted, at most eight count.",
        reference=REVIEW,
        trigger="DRAFT_EXTEND in which a request accepted more than eight tokens",
        caught_by=frozenset({Check.METADATA, Check.SHAPE}),
        plant=by_wrapping(AcceptsEightTokens),
    ),
    Bug(
        name="length-0-counts-as-1",
        group=Group.PADDING,
        sentence="A request of length 0, which only pads the batch, counts as one of length 1.",
        reference=REVIEW,
        trigger="padding of length 0",
        caught_by=frozenset({Check.METADATA}),
        plant=by_wrapping(HasOneTokenAtLeast),
    ),
    Bug(
        name="idle-taken-for-empty",
        group=Group.PADDING,
        sentence="An eager call of an idle rank is prepared as an empty batch, although padding fills it.",
        reference=REVIEW,
        trigger="an eager call of IDLE with padding",
        caught_by=frozenset({Check.SHAPE}),
        plant=by_wrapping(IdleIsEmpty),
    ),
    Bug(
        "heads-folded-onto-the-next-row",
        Group.LAYER,
        "32 heads over an FP8 cache run as two rows of 16, of which the second has the next row's selection.",
        REVIEW,
        "32 heads, an FP8 cache, and rows with different selections",
        frozenset({Check.ATTENTION}),
        by_wrapping(layer=folding_heads),
        layer=True,
    ),
    layer_bug(
        "tokens-assumed-to-fit-the-cache",
        "A prefill asserts that the tokens of all requests fit the cache, which requests with a common prefix exceed.",
        REVIEW,
        "a prefill of long requests with a common prefix",
        Check.CRASH,
        Mutation(
            FORWARD,
            "lengths = metadata.seqlens_expanded",
            "lengths = metadata.seqlens_expanded\n"
            "    flattened = metadata.page_table_1_flattened\n"
            '    assert flattened is None or len(flattened) <= len(caches.kv), "out of KV cache"',
        ),
        group=Group.TABLES,
    ),
)
