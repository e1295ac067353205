"""Length fields: how much KV each request and each query token sees."""

from __future__ import annotations

import torch

from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode


def cache_seqlens_int32(config: BackendConfig, batch: ForwardBatch, step: int) -> torch.Tensor:
    """KV length of each request at draft step ``step``: int32 [bs].

    seq_lens, plus the unverified draft tokens in TARGET_VERIFY, plus the step's own advance (``StepSemantics``).
    """
    mode = batch.forward_mode
    unverified = config.speculative_num_draft_tokens if mode is ForwardMode.TARGET_VERIFY else 0
    return (batch.seq_lens + unverified + config.step_advance(mode, step)).to(torch.int32)


def query_lens(config: BackendConfig, batch: ForwardBatch) -> torch.Tensor:
    """Query tokens (live rows) of each request: int64 [bs]."""
    mode = batch.forward_mode
    if mode is ForwardMode.EXTEND:
        assert batch.extend_seq_lens is not None, "EXTEND needs extend_seq_lens"
        return batch.extend_seq_lens.to(torch.int64)
    if mode is ForwardMode.DRAFT_EXTEND:
        assert batch.spec_info is not None, "DRAFT_EXTEND needs spec_info.accept_length"
        return batch.spec_info.accept_length[: batch.batch_size].to(torch.int64)
    return torch.full_like(batch.seq_lens, config.rows_per_request(mode), dtype=torch.int64)


def seqlens_expanded(cache_seqlens: torch.Tensor, query_lens: torch.Tensor) -> torch.Tensor:
    """KV length visible to each query token: int32 [sum(query_lens)].

    A request's query tokens are the last ones in its cache. Each sees itself and all tokens before it:
    kv_len - q_len + 1, ..., kv_len. A padded request may have more query tokens than KV. Consumers read lengths as
    unsigned, so they are clamped at 0.
    """
    per_request = [
        torch.arange(kv_len - q_len + 1, kv_len + 1, dtype=torch.int32)
        for kv_len, q_len in zip(cache_seqlens.tolist(), query_lens.tolist(), strict=True)
    ]
    expanded = torch.cat([torch.empty(0, dtype=torch.int32), *per_request])
    return expanded.clamp(min=0).to(cache_seqlens.device)


def pad_rows(lengths: torch.Tensor, num_rows: int) -> torch.Tensor:
    """``lengths`` with zeros appended up to ``num_rows``, for rows that a graph reserves and a batch does not use."""
    padded = torch.zeros(num_rows, dtype=torch.int32, device=lengths.device)
    padded[: lengths.shape[0]] = lengths
    return padded


def cu_seqlens(lengths: torch.Tensor) -> torch.Tensor:
    """0, then the running sum of ``lengths`` [n]: int32 [n + 1]."""
    cumulative = torch.zeros(lengths.shape[0] + 1, dtype=torch.int32, device=lengths.device)
    cumulative[1:] = torch.cumsum(lengths, dim=0)
    return cumulative
