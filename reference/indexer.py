"""The lightning indexer: how relevant each cached token is to each query token."""

from __future__ import annotations

import torch

from nsa_oracle.reference.kv_cache import load_index_k
from nsa_oracle.reference.types import AttentionConfig


def indexer_logits(
    config: AttentionConfig,
    index_q: torch.Tensor,
    index_weights: torch.Tensor,
    index_k_cache: torch.Tensor,
    real_page_table: torch.Tensor,
    seqlens_expanded: torch.Tensor,
    max_seq_len_k: int,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Score of every cached token for every query token: float32 [R, max_seq_len_k].

    logits[t, s] = k_scale[s] * sum_h weights[t, h] * relu(sum_d q[t, h, d] * k[s, d]), and -inf for
    s >= seqlens_expanded[t]. Computed in ``dtype``, rounded to float32 once.

    index_q [R, index_n_heads, index_head_dim] float8_e4m3fn, index_weights [R, index_n_heads] float32.
    index_k_cache [num_pages, index_page_bytes] uint8, see ``kv_cache``.
    real_page_table [R, ceil(max_seq_len_k / page_size)] int32, a row per query token; dead pages are not read, nor
        are the keys of a live page beyond the visible tokens.
    seqlens_expanded [R] int32.

    Source: DeepSeek V3.2, "Lightning Indexer"; DeepGEMM's ``fp8_paged_mqa_logits``.
    """
    page_size = index_k_cache.shape[1] // config.index_page_bytes(1)
    logits = torch.full((index_q.shape[0], max_seq_len_k), -torch.inf, dtype=torch.float32, device=index_q.device)
    for row, seq_len in enumerate(seqlens_expanded.tolist()):
        # 1. Slots of the visible tokens: token s is the (s % P)-th of the row's (s // P)-th page.
        tokens = torch.arange(seq_len, device=index_q.device)  # [S]
        pages = real_page_table[row, tokens // page_size].to(torch.int64)  # [S]
        slots = pages * page_size + tokens % page_size  # [S]

        # 2. Their keys times all heads' queries; all heads share the scale of a key.
        keys, scales = load_index_k(config, index_k_cache, slots)  # [S, D], [S]
        per_head = torch.relu(index_q[row].to(dtype) @ keys.to(dtype).T)  # [H, S]
        weighted = index_weights[row].to(dtype) @ per_head  # [S]
        logits[row, :seq_len] = (scales.to(dtype) * weighted).to(torch.float32)
    return logits
