"""Sparse multi-head latent attention over the selected tokens."""

from __future__ import annotations

import math

import torch

from nsa_oracle.reference.kv_cache import load_kv
from nsa_oracle.reference.types import AttentionConfig


def sparse_mla(
    config: AttentionConfig,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each row over the slots ``indices`` names: out bf16 [R, H, kv_lora_rank], lse float32 [R, H].

    out = softmax(q.k * sm_scale) v, where v is the first kv_lora_rank of k; lse is the natural log of the sum of
    exp(q.k * sm_scale). A row without a valid slot: out 0, lse -inf.

    q [R, H, qk_head_dim] bf16. kv_cache: see ``KVCacheDtype``.
    indices [R, K] int32: slots; negative ones, anywhere in the row, are skipped. No other slot is read.
    dtype: of all computation before the final roundings.

    The contract is a float32 division, then one rounding to bf16. Where sums are exact, so is this: a float64 quotient
    of two float32 numbers, rounded to float32, is the correctly rounded float32 quotient, since 53 >= 2 * 24 + 2.
    Rounding it directly to bf16 would give other results in ties.

    Source: FlashMLA's sparse prefill and decode.
    """
    out, lse = unrounded(config, q, kv_cache, indices, dtype)
    return out.to(torch.float32).to(torch.bfloat16), lse.to(torch.float32)


def unrounded(
    config: AttentionConfig,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sparse_mla`` before its final roundings: out and lse in ``dtype``."""
    out = torch.zeros(*q.shape[:2], config.kv_lora_rank, dtype=dtype, device=q.device)  # [R, H, rank]
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)  # [R, H]
    sm_scale_log2 = _sm_scale_log2(config)
    for row in range(q.shape[0]):
        # 1. The keys this row may see.
        slots = indices[row][indices[row] >= 0]  # [S]
        if slots.shape[0] == 0:
            continue
        keys = load_kv(config, kv_cache, slots).to(dtype)  # [S, qk_head_dim]

        # 2. Softmax, not yet divided by its sum.
        scores = q[row].to(dtype) @ keys.T  # [H, S]
        max_score = scores.amax(dim=1, keepdim=True)  # [H, 1]
        weights = torch.exp2((scores - max_score) * sm_scale_log2)  # [H, S]
        weight_sum = weights.sum(dim=1, keepdim=True)  # [H, 1]

        # 3. Divide once, at the end.
        out[row] = weights @ keys[:, : config.kv_lora_rank] / weight_sum
        lse[row] = (max_score * config.sm_scale + weight_sum.log()).squeeze(1)
    return out, lse


def _sm_scale_log2(config: AttentionConfig) -> float:
    """sm_scale * log2(e), rounded to float32, as kernels take it.

    The rounding makes it exactly 1.0 for sm_scale = ln 2. Integer scores then give weights that are exact powers of
    two, and the whole softmax can be checked bit for bit.
    """
    return torch.tensor(config.sm_scale * math.log2(math.e), dtype=torch.float32).item()
