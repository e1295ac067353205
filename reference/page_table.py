"""Page tables: where each token of each row lives in the KV cache."""

from __future__ import annotations

import torch


def page_table_1(req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, width: int) -> torch.Tensor:
    """Slot of each token, one row per request: int32 [bs, width]. Columns beyond a request's KV length are dead."""
    return req_to_token[req_pool_indices.to(torch.int64), :width]


def repeat_rows(table: torch.Tensor, query_lens: torch.Tensor, num_rows: int) -> torch.Tensor:
    """One row per query token: that of request i ``query_lens[i]`` times. The remaining rows are dead, and 0 here."""
    repeated = torch.zeros(num_rows, table.shape[1], dtype=table.dtype, device=table.device)
    per_token = torch.repeat_interleave(table, query_lens, dim=0)  # [sum(query_lens), W]
    repeated[: per_token.shape[0]] = per_token
    return repeated


def real_page_table(page_table_1: torch.Tensor, page_size: int) -> torch.Tensor:
    """Page of each ``page_size`` tokens: int32 [rows, ceil(W / page_size)]. Slots are page-aligned."""
    return page_table_1[:, ::page_size] // page_size


def flatten(page_table_1: torch.Tensor, cache_seqlens: torch.Tensor) -> torch.Tensor:
    """The live slots of all requests one after another: int32 [sum(cache_seqlens)]."""
    live = [row[:kv_len] for row, kv_len in zip(page_table_1, cache_seqlens.tolist(), strict=True)]
    return torch.cat([page_table_1.new_empty(0), *live])
