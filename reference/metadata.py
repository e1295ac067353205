"""All metadata of one step of one batch, as a pure function of the inputs on the device."""

from __future__ import annotations

import torch

from nsa_oracle.reference import lengths, page_table, schedules
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata


def compute_metadata(
    config: BackendConfig, req_to_token: torch.Tensor, batch: ForwardBatch, step: int, in_graph: bool
) -> Metadata:
    """Metadata for draft step ``step`` of ``batch``.

    req_to_token [pool_size, >= max_context_len] int32: slot of each token of each pooled request.
    in_graph: lay the fields out as in a captured graph (bs * rows_per_request rows, tables max_context_len wide, rows
        beyond the live ones of length 0), instead of exactly as long as the batch needs. EXTEND has no graph.

    Only device tensors are read: ``seq_lens_cpu`` may be stale.
    """
    mode = batch.forward_mode
    assert not (in_graph and mode is ForwardMode.EXTEND), "EXTEND runs eagerly only"

    # 1. How much KV each request and each query token sees.
    cache_seqlens = lengths.cache_seqlens_int32(config, batch, step)  # [bs]
    query_lens = lengths.query_lens(config, batch)  # [bs]
    expanded = lengths.seqlens_expanded(cache_seqlens, query_lens)  # [sum(query_lens)]
    if in_graph:
        expanded = lengths.pad_rows(expanded, batch.batch_size * config.rows_per_request(mode))  # [R]
    num_rows = expanded.shape[0]
    nsa_cache_seqlens = expanded.clamp(max=config.index_topk)  # [R]

    # 2. Where the KV lives. EXTEND has one row per request, which token_to_batch_idx finds.
    largest = max(cache_seqlens.tolist(), default=0)
    width = config.max_context_len if in_graph else largest
    table = page_table.page_table_1(req_to_token, batch.req_pool_indices, width)  # [bs, W]
    if mode is not ForwardMode.EXTEND:
        table = page_table.repeat_rows(table, query_lens, num_rows)  # [R, W]

    # 3. Fields of every mode.
    device = batch.seq_lens.device
    cu_seqlens_k = lengths.cu_seqlens(cache_seqlens)  # [bs + 1]
    row_numbers = torch.arange(num_rows + 1, dtype=torch.int32, device=device)  # [R + 1]
    metadata = Metadata(
        page_size=config.page_size,
        max_seq_len_q=max(query_lens.tolist(), default=0) if mode is ForwardMode.EXTEND else 1,
        max_seq_len_k=width,
        cache_seqlens_int32=cache_seqlens,
        cu_seqlens_q=lengths.cu_seqlens(query_lens) if mode is ForwardMode.EXTEND else row_numbers,
        cu_seqlens_k=cu_seqlens_k,
        seqlens_expanded=expanded,
        nsa_cache_seqlens_int32=nsa_cache_seqlens,
        nsa_cu_seqlens_q=row_numbers.clone(),
        nsa_cu_seqlens_k=lengths.cu_seqlens(nsa_cache_seqlens),
        page_table_1=table,
        real_page_table=page_table.real_page_table(table, config.page_size),
    )

    # 4. Prefill addresses the batch's KV as one concatenated run instead of through a schedule.
    if mode is ForwardMode.EXTEND:
        assert batch.extend_prefix_lens is not None, "EXTEND needs extend_prefix_lens"
        k_start = torch.repeat_interleave(cu_seqlens_k[:-1], query_lens)  # [R]
        metadata.topk_indices_offset = k_start
        metadata.indexer_k_start_end = (k_start.clone(), k_start + expanded)
        requests = torch.arange(batch.batch_size, dtype=torch.int32, device=device)
        metadata.token_to_batch_idx = torch.repeat_interleave(requests, query_lens)
        if bool((batch.extend_prefix_lens > 0).any()):
            metadata.page_table_1_flattened = page_table.flatten(table, cache_seqlens)
        return metadata

    # 5. Schedules of the decode kernels, one request per row.
    if config.paged_mqa_num_sms:
        metadata.paged_mqa_schedule_metadata = schedules.paged_mqa_schedule(expanded, config.paged_mqa_num_sms)
    if config.flashmla_num_sm_parts:
        metadata.flashmla_metadata, metadata.flashmla_num_splits = schedules.flashmla_schedule(
            nsa_cache_seqlens, config.flashmla_num_sm_parts
        )
    return metadata
