"""The vocabulary shared by ``reference/``, ``optimized/`` and ``harness/``: modes, sizes, batch, metadata, layer.

This is the only module of ``reference/`` that ``optimized/`` imports. Names follow SGLang's NSA backend, so that an
engineer finds each field under the name it has in production.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch


class ForwardMode(enum.Enum):
    """What the engine is about to run. The mode decides how many query tokens (rows) each request contributes."""

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
    """How the metadata of the N draft steps of one multi-step backend relate.

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
    paged_mqa_num_sms: multiprocessors that the paged-MQA schedule is made for; 0 leaves the schedule out.
    flashmla_num_sm_parts: parts that the FlashMLA decode schedule is made for; 0 leaves the schedule out.
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
        """Number of tokens beyond ``seq_lens`` that step ``step`` sees because of its own advance."""
        advances = self.step_semantics is StepSemantics.ADVANCING and mode.is_decode_or_idle
        return step + 1 if advances else 0


@dataclass(frozen=True)
class SpecInfo:
    """Result of target verification. ``accept_length`` [bs] int32 or int64: tokens committed, the bonus included."""

    accept_length: torch.Tensor

    @property
    def num_accept_tokens(self) -> torch.Tensor:
        """Today's name of ``accept_length``."""
        return self.accept_length


@dataclass(frozen=True)
class ForwardBatch:
    """One batch as the engine hands it over. Tensors may be strided views; integer tensors are int32 or int64.

    seq_lens [bs]: tokens in the cache, on the device; always current. In the draft-extend modes it already counts the
        accepted tokens; in EXTEND it counts prefix and new tokens together.
    seq_lens_cpu [bs] or None: host mirror of ``seq_lens``, which may lag behind it.
    req_pool_indices [bs]: row of ``req_to_token`` of each request.
    spec_info: set in DRAFT_EXTEND (and DRAFT_EXTEND_V2, where it is not needed).
    extend_seq_lens, extend_prefix_lens [bs]: new and cached tokens of each request, in every mode but DECODE and IDLE.
        The new ones are the rows of the request: num_draft_tokens in TARGET_VERIFY and DRAFT_EXTEND_V2, accept_length
        in DRAFT_EXTEND. The cached ones of TARGET_VERIFY are all of seq_lens. Never negative.
    extend_seq_lens_cpu, extend_prefix_lens_cpu: the same numbers on the host, never stale.
    extend_num_tokens: sum(extend_seq_lens), the number of rows; bs in DECODE and IDLE.
    positions [rows] int64: position in its request of each row's token; in DECODE, of draft step 0's: seq_lens. 0 in a
        row of padding that stands before the first token.
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
    extend_num_tokens: int | None = None
    positions: torch.Tensor | None = None


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


class KVCacheDtype(enum.Enum):
    """Layout of keys and values in the KV cache. Both layouts have the latent part first and the RoPE part last."""

    BF16 = "bf16"  # [num_slots, 1, kv_lora_rank + qk_rope_head_dim] bf16
    FP8 = "fp8"  # [num_slots, 1, kv_token_bytes] uint8: e4m3 latent, float32 scale of each tile, bf16 RoPE


NUM_QUANT_TILES = 4  # parts of the latent with a scale each: FlashMLA's 512 values in tiles of 128
FP8_MAX = 448.0  # largest finite e4m3 value


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes of one sparse MLA layer on one rank; the defaults are DeepSeek V3.2's.

    num_heads: query heads on this rank: 128, or 64, 32, 16 under tensor parallelism. They share one KV head.
    kv_lora_rank: width of the latent part of a key, which is the value as well.
    qk_rope_head_dim: width of the RoPE part of a key.
    index_n_heads, index_head_dim: heads of the lightning indexer and their width.
    sm_scale: factor of q.k before the (natural) softmax.
    """

    num_heads: int = 128
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    index_n_heads: int = 64
    index_head_dim: int = 128
    kv_cache_dtype: KVCacheDtype = KVCacheDtype.FP8
    sm_scale: float = 192**-0.5

    @property
    def qk_head_dim(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def quant_tile(self) -> int:
        """Latent values that share one scale in the FP8 cache."""
        return self.kv_lora_rank // NUM_QUANT_TILES

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one token in the FP8 cache: 656 in production."""
        return self.kv_lora_rank + 4 * NUM_QUANT_TILES + 2 * self.qk_rope_head_dim

    def index_page_bytes(self, page_size: int) -> int:
        """Bytes of one page of the index-K cache: all keys (e4m3), then all scales (float32). 8448 for 64 tokens."""
        return page_size * (self.index_head_dim + 4)


@dataclass(frozen=True)
class AttentionCaches:
    """The caches of one layer. The first stride, between slots or pages, may be large; each slot or page is dense.

    kv: [num_slots, 1, ...], see ``KVCacheDtype``.
    index_k: [num_pages, index_page_bytes] uint8; token t of a page has its key at t * index_head_dim, and its scale
        after the keys of all tokens of the page.
    """

    kv: torch.Tensor
    index_k: torch.Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """Outputs of the layer's projections for the R rows (query tokens) of one forward pass.

    Each tensor may have E further rows behind those R of the metadata, which stand for no token: R + E instead of R.

    q: [R, num_heads, qk_head_dim] bf16; first the part that is multiplied with the latent.
    k: [R, qk_head_dim] bf16, the row's own key: latent, then RoPE.
    index_q: [R, index_n_heads, index_head_dim] float8_e4m3fn. index_weights: [R, index_n_heads] float32.
    index_k: [R, index_head_dim] bf16, the row's own index key.
    out_cache_loc: [R] int64, slot that the row's own key is written to; rows without a token write to slot 0, or
        nowhere where the engine gives them slot -1. Rows with the same slot have the same keys, unless the slot lies in
        page 0, whose content is unspecified.
    """

    q: torch.Tensor
    k: torch.Tensor
    index_q: torch.Tensor
    index_weights: torch.Tensor
    index_k: torch.Tensor
    out_cache_loc: torch.Tensor


@dataclass(frozen=True)
class AttentionOutputs:
    """What one forward pass of the layer computes for its R rows, stage by stage.

    If the inputs have E further rows, so have indices, out and lse; the content of these is unspecified.

    logits: [R, max_seq_len_k] float32, -inf at and beyond the row's seqlens_expanded.
    indices: [R, index_topk] int32, slots of the selected tokens in ascending order of position, then -1.
    out: [R, num_heads, kv_lora_rank] bf16. lse: [R, num_heads] float32, natural log; -inf (and out 0) without a key.
    """

    logits: torch.Tensor
    indices: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
