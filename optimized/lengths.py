"""Length fields: how much KV each request and each query token sees."""

from __future__ import annotations

import torch

from nsa_oracle.optimized.buffers import StepBuffers, field_pitch
from nsa_oracle.optimized.kernels import fields
from nsa_oracle.optimized.kernels.lengths import expand_seqlens_kernel
from nsa_oracle.optimized.launch import Launcher
from nsa_oracle.optimized.library import register
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode

LENGTH_BLOCK = 256  # requests per scan; a larger batch takes several scans, which carry the totals over

_expand = Launcher(expand_seqlens_kernel, "step_stride")


def row_layout(mode: ForwardMode) -> int:
    """How the kernels find the rows of each request."""
    if mode is ForwardMode.EXTEND:
        return int(fields.EXTEND.value)
    return int((fields.RAGGED if mode.is_ragged else fields.UNIFORM).value)


def query_lens(batch: ForwardBatch) -> torch.Tensor | None:
    """The device tensor [>= bs] with the number of rows of each request; None where all have the same number."""
    if batch.forward_mode is ForwardMode.EXTEND:
        assert batch.extend_seq_lens is not None, "EXTEND needs extend_seq_lens"
        return batch.extend_seq_lens
    if batch.forward_mode is ForwardMode.DRAFT_EXTEND:
        assert batch.spec_info is not None, "DRAFT_EXTEND needs spec_info.accept_length"
        return batch.spec_info.accept_length
    return None


def extra_tokens(config: BackendConfig, mode: ForwardMode, step: int) -> int:
    """KV that draft step ``step`` sees beyond ``seq_lens``: unverified draft tokens, and the step's own advance."""
    unverified = config.speculative_num_draft_tokens if mode is ForwardMode.TARGET_VERIFY else 0
    return unverified + config.step_advance(mode, step)


def seqlens_expanded(cache_seqlens: torch.Tensor, query_lens: torch.Tensor) -> torch.Tensor:
    """KV length visible to each query token: int32 [sum(query_lens)], by the original loop over requests.

    Synchronises (``tolist``) and launches one ``arange`` per request: what ``vectorized_seqlens`` replaces.
    """
    device = cache_seqlens.device
    per_request = [
        torch.arange(kv_len - q_len + 1, kv_len + 1, dtype=torch.int32, device=device)
        for kv_len, q_len in zip(cache_seqlens.tolist(), query_lens.tolist(), strict=True)
    ]
    return torch.cat([torch.empty(0, dtype=torch.int32, device=device), *per_request]).clamp_(min=0)


def fill_lengths(config: BackendConfig, batch: ForwardBatch, step: int, out: StepBuffers) -> None:
    """All length fields of ``out``, steps ``step``, ``step + 1``, ..., with torch operators and the Python loop."""
    mode, bs, rows = batch.forward_mode, out.layout.bs, out.layout.num_rows
    device = batch.seq_lens.device
    seq_lens = batch.seq_lens[:bs]

    # 1. Requests.
    cache_seqlens = out.field(fields.CACHE_SEQLENS.value, bs)  # [S, bs]
    for index, row in enumerate(cache_seqlens):
        row.copy_(seq_lens + extra_tokens(config, mode, step + index))
    _cumulate(cache_seqlens, out.field(fields.CU_SEQLENS_K.value, bs + 1))

    # 2. Query tokens. In DECODE each request has one. In the other modes all steps are equal, so one is computed.
    expanded = out.field(fields.SEQLENS_EXPANDED.value, rows)  # [S, R]
    if mode.is_decode_or_idle:
        expanded.copy_(cache_seqlens)
    else:
        q_lens = query_lens(batch)
        if q_lens is None:
            q_lens = torch.full((bs,), config.rows_per_request(mode), dtype=torch.int32, device=device)
        live = seqlens_expanded(cache_seqlens[0], q_lens[:bs])  # [T]
        expanded[:, : live.shape[0]] = live
        expanded[:, live.shape[0] :] = 0
    nsa_cache_seqlens = out.field(fields.NSA_CACHE_SEQLENS.value, rows)  # [S, R]
    nsa_cache_seqlens.copy_(expanded).clamp_(max=config.index_topk)
    _cumulate(nsa_cache_seqlens, out.field(fields.NSA_CU_SEQLENS_K.value, rows + 1))

    # 3. Row numbers.
    row_numbers = torch.arange(rows + 1, dtype=torch.int32, device=device)  # [R + 1]
    out.field(fields.NSA_CU_SEQLENS_Q.value, rows + 1).copy_(row_numbers)
    if mode is not ForwardMode.EXTEND:
        out.field(fields.CU_SEQLENS_Q.value, rows + 1).copy_(row_numbers)
        return

    # 4. Prefill addresses the batch's KV as one concatenated run.
    assert batch.extend_seq_lens is not None
    q_lens = batch.extend_seq_lens[:bs].to(torch.int32)
    _cumulate(q_lens[None], out.field(fields.CU_SEQLENS_Q.value, bs + 1))
    k_begins = out.field(fields.CU_SEQLENS_K.value, bs)[0]  # [bs]
    k_start = torch.repeat_interleave(k_begins, q_lens, output_size=rows)  # [R]
    out.field(fields.TOPK_INDICES_OFFSET.value, rows).copy_(k_start)
    out.field(fields.INDEXER_K_START.value, rows).copy_(k_start)
    out.field(fields.INDEXER_K_END.value, rows).copy_(k_start + expanded)
    requests = torch.arange(bs, dtype=torch.int32, device=device)
    out.field(fields.TOKEN_TO_BATCH_IDX.value, rows).copy_(torch.repeat_interleave(requests, q_lens, output_size=rows))


def expand_seqlens(config: BackendConfig, batch: ForwardBatch, step: int, out: StepBuffers) -> None:
    """All length fields of ``out``, as ``fill_lengths``, in one launch: no loop over requests, no synchronisation."""
    mode = batch.forward_mode
    expand_seqlens_op(
        out.packed,
        batch.seq_lens,
        query_lens(batch),
        out.layout.bs,
        out.layout.num_rows,
        config.rows_per_request(mode),
        extra_tokens(config, mode, step),
        row_layout(mode),
        config.step_advance(mode, 0) > 0,
        config.index_topk,
    )


def _cumulate(lengths: torch.Tensor, out: torch.Tensor) -> None:
    """0, then the running sum of ``lengths`` [S, n], into ``out`` [S, n + 1]."""
    out[:, :1] = 0
    out[:, 1:] = torch.cumsum(lengths, dim=1, dtype=torch.int32)


def _launch(
    packed: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens: torch.Tensor | None,
    bs: int,
    num_rows: int,
    rows_per_request: int,
    extra: int,
    row_layout: int,
    advancing: bool,
    index_topk: int,
) -> None:
    """``packed`` [S, size] int32 (``kernels.fields``); seq_lens, query_lens [>= bs] int32 or int64, any stride."""
    num_steps = packed.shape[0]
    lens = seq_lens if query_lens is None else query_lens
    per_request = bs if row_layout == fields.EXTEND.value else 0
    _expand(
        (num_steps if advancing else 1) + per_request,
        (row_layout, advancing, seq_lens.dtype, lens.dtype),
        _expand.tensors(packed=packed, seq_lens=seq_lens, query_lens=lens),
        _expand.numbers(
            step_stride=packed.stride(0),
            pitch=field_pitch(bs, num_rows),
            num_steps=num_steps,
            seq_stride=seq_lens.stride(0),
            query_stride=lens.stride(0),
            bs=bs,
            num_rows=num_rows,
            rows_per_request=rows_per_request,
            extra=extra,
            index_topk=index_topk,
        ),
        _expand.constants(ROW_LAYOUT=row_layout, ADVANCING=advancing, BLOCK=LENGTH_BLOCK),
    )


expand_seqlens_op = register(
    "expand_seqlens(Tensor(a!) packed, Tensor seq_lens, Tensor? query_lens, int bs, int num_rows, "
    "int rows_per_request, int extra, int row_layout, bool advancing, int index_topk) -> ()",
    _launch,
)
