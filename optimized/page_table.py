"""Page tables: where each token of each row lives in the KV cache. Used by the composed path only."""

from __future__ import annotations

import torch

from nsa_oracle.optimized import lengths
from nsa_oracle.optimized.optimizations import Optimizations
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode

# (device, page size, width) -> arange(0, width, page size); shared by all backend instances of the process.
_GLOBAL_STRIDED_INDICES: dict[tuple[torch.device, int, int], torch.Tensor] = {}


class StridedIndices:
    """The columns of ``page_table_1`` at which pages begin; one instance per backend.

    Without a cache they are rebuilt at every call. ``transform_table_cache`` keeps one tensor for each width this
    backend has met; ``strided_indices_cache`` slices one tensor, as wide as the context, that all backends share.
    """

    def __init__(self, config: BackendConfig, optimizations: Optimizations) -> None:
        self.config = config
        self.optimizations = optimizations
        self._by_width: dict[tuple[torch.device, int], torch.Tensor] = {}

    def columns(self, width: int, device: torch.device) -> torch.Tensor:
        """arange(0, width, page_size): int64 [ceil(width / page_size)]."""
        if not self.optimizations.transform_table_cache:
            return self._build(width, device)
        key = (device, width)
        if key not in self._by_width:
            self._by_width[key] = self._build(width, device)
        return self._by_width[key]

    def _build(self, width: int, device: torch.device) -> torch.Tensor:
        page_size, context = self.config.page_size, self.config.max_context_len
        if not self.optimizations.strided_indices_cache or width > context:
            return torch.arange(0, width, page_size, device=device)
        key = (device, page_size, context)
        if key not in _GLOBAL_STRIDED_INDICES:
            _GLOBAL_STRIDED_INDICES[key] = torch.arange(0, context, page_size, device=device)
        return _GLOBAL_STRIDED_INDICES[key][: -(-width // page_size)]


def page_table_1(
    config: BackendConfig,
    req_to_token: torch.Tensor,
    batch: ForwardBatch,
    num_rows: int,
    width: int,
    optimizations: Optimizations,
) -> torch.Tensor:
    """Slot of each token: int32 [num_rows, width], one row per query token (EXTEND: per request).

    Rows beyond the live ones are dead and repeat the last request's. ``width`` is cut to that of ``req_to_token``.
    """
    mode, bs = batch.forward_mode, batch.batch_size
    requests = batch.req_pool_indices[:bs].to(torch.int64)  # [bs]
    if mode is not ForwardMode.EXTEND:
        requests = _request_of_row(config, batch, requests, num_rows, optimizations)  # [R]
    return req_to_token[:, :width].index_select(0, requests)


def _request_of_row(
    config: BackendConfig, batch: ForwardBatch, requests: torch.Tensor, num_rows: int, optimizations: Optimizations
) -> torch.Tensor:
    """Each element of ``requests`` [bs] once for each row of that request: int64 [num_rows]."""
    bs = batch.batch_size
    query_lens = lengths.query_lens(batch)
    if query_lens is None:
        return requests.repeat_interleave(config.rows_per_request(batch.forward_mode), output_size=num_rows)
    if bs == 0 or num_rows == 0:
        return requests[:0]
    if optimizations.vectorized_seqlens:
        # Row r belongs to the request at which the running sum of lengths first exceeds r. The host reads no length.
        row_ends = torch.cumsum(query_lens[:bs], dim=0)  # [bs]
        rows = torch.arange(num_rows, device=requests.device)
        return requests[torch.searchsorted(row_ends, rows, right=True).clamp_(max=bs - 1)]
    live = requests.repeat_interleave(query_lens[:bs].to(torch.int64))  # [T]
    return torch.cat([live, requests[-1:].expand(num_rows - live.shape[0])])


def real_page_table(page_table_1: torch.Tensor, page_size: int, columns: torch.Tensor) -> torch.Tensor:
    """Page of each ``page_size`` tokens: int32 [rows, ceil(W / page_size)]; with P = 1, ``page_table_1`` itself."""
    return page_table_1 if page_size == 1 else page_table_1[:, columns] // page_size
