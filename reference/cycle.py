"""A serving cycle with speculative decoding: the token that each row of a pass stands for, and the order of passes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsa_oracle.reference import lengths
from nsa_oracle.reference.layer import SparseAttention
from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.types import (
    AttentionCaches,
    AttentionInputs,
    AttentionOutputs,
    BackendConfig,
    ForwardBatch,
    ForwardMode,
    Metadata,
    SpecInfo,
)


def query_positions(config: BackendConfig, batch: ForwardBatch, step: int, metadata: Metadata) -> torch.Tensor:
    """Position in its request of each row's token: int64 [R]; -1 in a row of length 0.

    Draft step i is token seq_lens + i under both step semantics, but only under ADVANCING does it see itself and
    the drafts before it. In the other modes a token is the last one that it sees.
    """
    if batch.forward_mode.is_decode_or_idle:
        return batch.seq_lens.to(torch.int64) + step
    return metadata.seqlens_expanded.to(torch.int64) - 1


def request_of_row(config: BackendConfig, batch: ForwardBatch, metadata: Metadata) -> torch.Tensor:
    """Request of each row: int64 [R]; -1 in the tail of DRAFT_EXTEND in a graph, whose rows belong to no request."""
    requests = torch.arange(batch.batch_size, device=batch.seq_lens.device)  # [bs]
    of_live_rows = torch.repeat_interleave(requests, lengths.query_lens(config, batch))  # [sum(query_lens)]
    of_rows = torch.full_like(metadata.seqlens_expanded, -1, dtype=torch.int64)  # [R]
    of_rows[: of_live_rows.shape[0]] = of_live_rows
    return of_rows


def out_cache_loc(
    config: BackendConfig,
    req_to_token: torch.Tensor,
    batch: ForwardBatch,
    step: int,
    metadata: Metadata,
    raw_bs: int | None = None,
) -> torch.Tensor:
    """Slot that each row's key is written to: int64 [R].

    req_to_token[pool row of the request, position of the row]. Slot 0, on the dummy page, for rows without a token
    (position -1) and for rows of the requests from ``raw_bs`` on, which only pad the batch.
    """
    positions = query_positions(config, batch, step, metadata)  # [R]
    requests = request_of_row(config, batch, metadata)  # [R]
    is_token = positions >= 0  # [R]; tail rows have length 0, so position -1
    if raw_bs is not None:
        is_token &= requests < raw_bs
    pool_rows = batch.req_pool_indices.to(torch.int64)[requests[is_token]]  # [tokens]
    slots = torch.zeros_like(positions)  # [R]
    slots[is_token] = req_to_token[pool_rows, positions[is_token]].to(torch.int64)
    return slots


Model = Callable[[ForwardMode, int, torch.Tensor, torch.Tensor, torch.Tensor], AttentionInputs]
"""(mode, step, positions [R], requests [R], out_cache_loc [R]) -> inputs of the layer for these R rows."""

Pass = tuple[Metadata, AttentionOutputs]


class SpeculativeCycle:
    """One batch of requests through prefill, then cycles of draft, verify, accept, draft extend.

    Every pass writes the keys of its own rows. All passes share one layer and its caches here. In production the draft
    model and the target model have separate layers, and each sees only its own passes.

    req_to_token has a slot for every position that a pass reaches, drafts included. With ``in_graph``, the passes after
    prefill are laid out as in a captured graph, else as in eager calls.
    """

    def __init__(
        self,
        layer: SparseAttention,
        caches: AttentionCaches,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        model: Model,
        in_graph: bool = False,
    ) -> None:
        self.layer = layer
        self.caches = caches
        self.req_to_token = req_to_token
        self.req_pool_indices = req_pool_indices
        self.model = model
        self.in_graph = in_graph
        self.seq_lens = torch.zeros_like(req_pool_indices)  # [bs], committed tokens
        self.accept_length = torch.zeros_like(req_pool_indices)  # [bs], committed last

    def prefill(self, prefix_lens: torch.Tensor, new_lens: torch.Tensor) -> Pass:
        """``new_lens`` [bs] tokens of each request, after ``prefix_lens`` [bs] tokens that are already in the cache."""
        self.seq_lens = prefix_lens + new_lens
        batch = ForwardBatch(
            ForwardMode.EXTEND,
            self.req_pool_indices.shape[0],
            self.req_pool_indices,
            self.seq_lens,
            extend_seq_lens=new_lens,
            extend_prefix_lens=prefix_lens,
        )
        return self._forward(batch, step=0)

    def draft(self) -> list[Pass]:
        """N steps, each of which proposes one more token per request."""
        return [self.draft_step(step) for step in range(self.layer.config.speculative_num_steps)]

    def draft_step(self, step: int) -> Pass:
        return self._forward(self._batch(ForwardMode.DECODE), step)

    def verify(self) -> Pass:
        """The target model over the nd tokens after the committed ones."""
        return self._forward(self._batch(ForwardMode.TARGET_VERIFY), step=0)

    def accept(self, accept_length: torch.Tensor) -> None:
        """Commit ``accept_length`` [bs] of the verified tokens, the bonus token included: 0 to nd."""
        self.accept_length = accept_length
        self.seq_lens = self.seq_lens + accept_length

    def draft_extend(self, mode: ForwardMode = ForwardMode.DRAFT_EXTEND) -> Pass:
        """The draft model over the accepted tokens (DRAFT_EXTEND), or over the last nd tokens (DRAFT_EXTEND_V2)."""
        return self._forward(self._batch(mode), step=0)

    def _batch(self, mode: ForwardMode) -> ForwardBatch:
        spec_info = SpecInfo(self.accept_length)
        return ForwardBatch(
            mode, self.req_pool_indices.shape[0], self.req_pool_indices, self.seq_lens, spec_info=spec_info
        )

    def _forward(self, batch: ForwardBatch, step: int) -> Pass:
        """One pass: the tokens of its rows, the model's inputs for them, and the layer."""
        config, mode = self.layer.config, batch.forward_mode
        in_graph = self.in_graph and mode is not ForwardMode.EXTEND
        metadata = compute_metadata(config, self.req_to_token, batch, step, in_graph)
        positions = query_positions(config, batch, step, metadata)  # [R]
        requests = request_of_row(config, batch, metadata)  # [R]
        slots = out_cache_loc(config, self.req_to_token, batch, step, metadata)  # [R]
        inputs = self.model(mode, step, positions, requests, slots)
        return metadata, self.layer.forward(inputs, self.caches, metadata)
