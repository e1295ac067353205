"""The vocabulary shared by ``reference/``, ``optimized/`` and ``harness/``: modes, configuration, batch, metadata.

This is the only module of ``reference/`` that ``optimized/`` imports. Names follow SGLang's NSA backend, so that an
engineer finds each field under the name it has in production.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch


class ForwardMode(enum.Enum):
    """What the engine is about to run; decides how many query tokens (rows) each request contributes."""

    EXTEND = "EXTEND"  # prefill, with or without a cached prefix; never in a graph
    DECODE = "DECODE"  # one draft step: one query token per request
    IDLE = "IDLE"  # this rank has no request; laid out like DECODE
    TARGET_VERIFY = "TARGET_VERIFY"  # num_draft_tokens query tokens per request, not yet in seq_lens
    DRAFT_EXTEND = "DRAFT_EXTEND"  # accept_length[i] query tokens for request i, already in seq_lens
    DRAFT_EXTEND_V2 = "DRAFT_EXTEND_V2"  # num_draft_tokens query tokens per request, already in seq_lens

    @property
    def is_decode_or_idle(self) -> bool:
        return self in (ForwardMode.DECODE, ForwardMode.IDLE)

    @property
    def is_ragged(self) -> bool:
        """Whether requests contribute different numbers of rows, known only from a device tensor."""
        return self in (ForwardMode.EXTEND, ForwardMode.DRAFT_EXTEND)


class StepSemantics(enum.Enum):
    """How the N draft steps of one multi-step backend relate.

    ``SHARED``: every step gets the same metadata (SGLang's NSA and DSA backends).
    ``ADVANCING``: in DECODE and IDLE, step i sees ``cache_seqlens = seq_lens + i + 1`` (SGLang's FlashAttention-3
    backend, vLLM). The other modes run once per cycle, not once per draft step, so their steps never advance.
    """

    SHARED = "shared"
    ADVANCING = "advancing"


@dataclass(frozen=True)
class BackendConfig:
    """Everything about a backend that does not change from batch to batch.

    page_size: tokens per physical KV page (P).
    max_context_len: width of the page tables held by a captured graph, in tokens (W).
    index_topk: keys kept per query token by the indexer (K).
    speculative_num_steps: draft steps, hence single-step backends (N).
    speculative_num_draft_tokens: query tokens per request in target verify (nd).
    paged_mqa_num_sms: multiprocessors the paged-MQA schedule is dealt over; 0 leaves the schedule out.
    flashmla_num_sm_parts: parts the FlashMLA decode schedule is dealt over; 0 leaves the schedule out.
    """

    page_size: int
    max_context_len: int
    index_topk: int
    speculative_num_steps: int
    speculative_num_draft_tokens: int
    step_semantics: StepSemantics = StepSemantics.SHARED
    paged_mqa_num_sms: int = 0
    flashmla_num_sm_parts: int = 0

    def rows_per_request(self, mode: ForwardMode) -> int:
        """Rows a graph reserves for each request of its bucket (the exact number, unless the mode is ragged)."""
        return 1 if mode.is_decode_or_idle else self.speculative_num_draft_tokens

    def step_advance(self, mode: ForwardMode, step: int) -> int:
        """Tokens by which step ``step`` sees a longer cache than ``seq_lens`` says."""
        advances = self.step_semantics is StepSemantics.ADVANCING and mode.is_decode_or_idle
        return step + 1 if advances else 0


@dataclass(frozen=True)
class SpecInfo:
    """Result of target verification. ``accept_length`` [bs] int32 or int64: tokens committed, the bonus included."""

    accept_length: torch.Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """One batch as the engine hands it over. Tensors may be strided views; integer tensors are int32 or int64.

    seq_lens [bs]: tokens in the cache, on the device; the truth. In the draft-extend modes it already counts the
        accepted tokens; in EXTEND it counts prefix and new tokens together.
    seq_lens_cpu [bs] or None: host mirror of ``seq_lens``, which may lag behind it.
    req_pool_indices [bs]: row of ``req_to_token`` of each request.
    spec_info: set in DRAFT_EXTEND (and DRAFT_EXTEND_V2, where it is not needed).
    extend_seq_lens, extend_prefix_lens [bs]: new and cached tokens of each request, EXTEND only;
    extend_seq_lens_cpu, extend_prefix_lens_cpu: the same numbers on the host, never stale.
    """

    forward_mode: ForwardMode
    batch_size: int
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None = None
    seq_lens_sum: int | None = None
    out_cache_loc: torch.Tensor | None = None
    encoder_lens: torch.Tensor | None = None
    spec_info: SpecInfo | None = None
    extend_seq_lens: torch.Tensor | None = None
    extend_prefix_lens: torch.Tensor | None = None
    extend_seq_lens_cpu: tuple[int, ...] | None = None
    extend_prefix_lens_cpu: tuple[int, ...] | None = None


@dataclass(eq=False)
class Metadata:
    """Metadata of one step. Tensors are int32; R rows, bs requests, P = page_size.

    In a graph R = bs * rows_per_request and W = max_context_len. Eagerly R is the number of query tokens and W the
    largest KV length, so that every field has exactly its live rows.

    A row's live columns are the first ``len`` of page_table_1 and the first ceil(len / P) of real_page_table, where
    ``len`` is the row's seqlens_expanded (EXTEND: the request's cache_seqlens_int32). The other cells are dead:
    unspecified, and no consumer may let them reach an output.

    ==============================  =======================  ==========================================================
    field                           shape                    value
    ==============================  =======================  ==========================================================
    cache_seqlens_int32             [bs]                     KV length of each request, this step's tokens included
    cu_seqlens_k                    [bs + 1]                 0, then cumsum of cache_seqlens_int32
    cu_seqlens_q                    [R + 1]                  arange; in EXTEND [bs + 1], 0 then cumsum(extend_seq_lens)
    seqlens_expanded                [R]                      KV length each query token sees, unclipped, never negative
    nsa_cache_seqlens_int32         [R]                      min(seqlens_expanded, index_topk)
    nsa_cu_seqlens_k                [R + 1]                  0, then cumsum of nsa_cache_seqlens_int32
    nsa_cu_seqlens_q                [R + 1]                  arange
    page_table_1                    [R, W]                   slot of each token (EXTEND: [bs, W])
    real_page_table                 [R, ceil(W / P)]         page of each P tokens (EXTEND: [bs, ceil(W / P)])
    paged_mqa_schedule_metadata     [num_sms + 1, 2]         see ``schedules.paged_mqa_schedule``; else None
    flashmla_metadata               [num_sm_parts, 8]        see ``schedules.flashmla_schedule``; else None
    flashmla_num_splits             [R + 1]                  cumulative splits; else None
    topk_indices_offset             [R]                      EXTEND: where the request starts in the concatenated KV
    indexer_k_start_end             ([R], [R])               EXTEND: range of the concatenated KV a query token sees
    token_to_batch_idx              [R]                      EXTEND: request of each query token
    page_table_1_flattened          [sum(seq_lens)]          EXTEND with a cached prefix: slots of all tokens
    ==============================  =======================  ==========================================================

    Schedules exist where the configuration asks for them, and never in EXTEND.
    """

    page_size: int
    max_seq_len_q: int  # 1, except in EXTEND: the largest number of new tokens
    max_seq_len_k: int  # W
    cache_seqlens_int32: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    seqlens_expanded: torch.Tensor
    nsa_cache_seqlens_int32: torch.Tensor
    nsa_cu_seqlens_q: torch.Tensor
    nsa_cu_seqlens_k: torch.Tensor
    page_table_1: torch.Tensor
    real_page_table: torch.Tensor
    paged_mqa_schedule_metadata: torch.Tensor | None = None
    flashmla_metadata: torch.Tensor | None = None
    flashmla_num_splits: torch.Tensor | None = None
    topk_indices_offset: torch.Tensor | None = None
    indexer_k_start_end: tuple[torch.Tensor, torch.Tensor] | None = None
    token_to_batch_idx: torch.Tensor | None = None
    page_table_1_flattened: torch.Tensor | None = None
