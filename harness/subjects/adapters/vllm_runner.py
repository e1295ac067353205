"""Plays vLLM's model runner (``v1/worker/gpu/model_runner.py``): it hands tensors of its own to the builders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nsa_oracle.harness.subjects.adapters.vllm_reference import Convention
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode

BLOCK_TABLE_ALIGNMENT = 128  # tokens; see ``get_block_table_width`` in vLLM's ``v1/worker/block_table.py``


@dataclass(frozen=True)
class RunnerOrder:
    """The order of the requests in vLLM's batch, and what makes places in it places in the batch that was asked for.

    requests: those of the batch, in vLLM's order. query_lens, seq_lens: of each, in that order.
    """

    requests: Sequence[int]
    query_lens: torch.Tensor
    seq_lens: torch.Tensor

    def batch_fields(self, indexer: Any, sparse: Any, columns: int) -> dict[str, Any]:
        """Numbers of an EXTEND by the contract's names and in the batch's order; -1 where no chunk has one.

        Places in the KV of a chunk become places in that of the batch. columns: of the block table, to show.
        """
        starts, kv = _bounds(self.query_lens), _bounds(self.seq_lens)  # of vLLM's requests, and their ends
        back = torch.tensor(self.requests).argsort()  # place in vLLM's order of each request of the batch
        ours = _bounds(self.seq_lens[back])[:-1][torch.tensor(self.requests)]  # where its KV starts in the batch's
        request = torch.arange(len(back)).repeat_interleave(self.query_lens)  # of each row
        k_start, k_end, offset = (torch.full_like(request, -1) for _ in range(3))
        owner = torch.full((int(kv[-1]),), -1)
        table = torch.full((len(back), columns), -1, dtype=torch.int32)

        def shift(first: int, rows: slice) -> torch.Tensor:
            return (ours - (kv[:-1] - kv[first]))[request[rows]]

        decode, decoded = indexer.decode, slice(0, indexer.num_decode_tokens)
        if decode is not None:
            is_flat = len(decode.block_table) == indexer.num_decode_tokens
            k_start[decoded] = ours[request[decoded]]
            k_end[decoded] = k_start[decoded] + decode.seq_lens.reshape(-1)
            entries = starts[: indexer.num_decodes] if is_flat else torch.arange(indexer.num_decodes)
            table[: indexer.num_decodes] = decode.block_table[entries, :columns]
        for chunk in indexer.prefill.chunks if indexer.prefill else ():
            rows, first = slice(chunk.token_start, chunk.token_end), int(request[chunk.token_start])
            k_start[rows] = chunk.cu_seqlen_ks + shift(first, rows)
            k_end[rows] = chunk.cu_seqlen_ke + shift(first, rows)
            table[first : first + chunk.num_reqs] = chunk.block_table[:, :columns]
            owner[kv[first] : kv[first + chunk.num_reqs]] = chunk.token_to_seq.long() + first
        separate = sparse.fp8_extra_metadata
        for chunk in separate.prefill.chunks if separate.prefill else ():
            local = separate.prefill.request_ids[chunk.tokens_slice] - chunk.req_start_idx
            first = separate.num_decodes + chunk.req_start_idx
            offset[chunk.tokens_slice] = chunk.workspace_starts[local] + shift(first, chunk.tokens_slice)
        names = torch.tensor([*self.requests, -1])

        def in_order(values: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
            parts = values.tensor_split(bounds[1:-1])
            return torch.cat([parts[i] for i in back.tolist()]).to(torch.int32)

        return {
            "cache_seqlens_int32": indexer.seq_lens[back],
            "seqlens_expanded": in_order(k_end - k_start, starts),
            "indexer_k_start_end": (in_order(k_start, starts), in_order(k_end, starts)),
            "real_page_table": table[back],
            "token_to_batch_idx": in_order(names[sparse.req_id_per_token.long()], starts),
            "topk_indices_offset": in_order(offset, starts),
            "kv_to_batch_idx": in_order(names[owner], kv),
        }


class Runner:
    """Tensors at fixed addresses, refreshed before each call. common: vLLM's ``CommonAttentionMetadata``."""

    def __init__(
        self,
        convention: Convention,
        config: BackendConfig,
        req_to_token: torch.Tensor,
        max_reqs: int,
        max_tokens: int,
        common: Callable[..., Any],
    ) -> None:
        self.convention = convention
        self.config = config
        self.pool = req_to_token
        self.common = common
        device, together = req_to_token.device, BLOCK_TABLE_ALIGNMENT // config.page_size
        self.blocks = -(-config.max_context_len // config.page_size)
        self.width = -(-self.blocks // together) * together
        self.seq_lens = torch.zeros(max_reqs, dtype=torch.int32, device=device)
        self.query_start_loc = torch.zeros(max_reqs + 1, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(max_reqs, self.width, dtype=torch.int32, device=device)
        self.slot_mapping = torch.full((max_tokens,), -1, dtype=torch.int64, device=device)

    def prepared(self, batch: ForwardBatch, in_graph: bool, in_capture: bool = False) -> tuple[Any, RunnerOrder]:
        """What the builders get for ``batch``, and in which order.

        Requests of length 0 pad the batch: they have no query token, length 0 and block 0. A capture has none of them.
        """
        bs, drafts = batch.batch_size, self.config.speculative_num_draft_tokens
        queries = [self.config.rows_per_request(batch.forward_mode)] * bs
        if batch.forward_mode is ForwardMode.EXTEND:
            assert batch.extend_seq_lens_cpu is not None
            queries = list(batch.extend_seq_lens_cpu)
        requests = self.convention.order(queries, drafts)
        assert batch.seq_lens_cpu is not None
        mirror = torch.ones(bs, dtype=torch.int64) if in_capture else batch.seq_lens_cpu[requests]
        lens = torch.tensor(queries)[requests] * (mirror > 0)
        more = lens * (batch.forward_mode is ForwardMode.TARGET_VERIFY)  # the drafts are not yet in seq_lens
        starts, upper = _bounds(lens).to(torch.int32), (mirror + more).to(torch.int32)

        device = self.pool.device
        blocks = self.pool[batch.req_pool_indices.long()[requests], :: self.config.page_size] // self.config.page_size
        self.block_table[:bs, : self.blocks] = blocks * (mirror > 0).to(device)[:, None]
        self.seq_lens[bs:] = 0
        self.seq_lens[:bs] = lens.to(device) if in_capture else batch.seq_lens[requests] + more.to(device)
        self.query_start_loc[: bs + 1] = starts.to(device)
        tokens = sum(queries) if in_graph else int(starts[-1])
        given = self.common(
            query_start_loc=self.query_start_loc[: bs + 1],
            query_start_loc_cpu=starts,
            seq_lens=self.seq_lens[:bs],
            num_reqs=bs,
            num_actual_tokens=tokens,
            max_query_len=int(lens.max()),
            max_seq_len=self.config.max_context_len if in_capture else int(upper.max()),
            block_table_tensor=self.block_table[:bs],
            slot_mapping=self.slot_mapping[:tokens],
            is_prefilling=torch.full((bs,), batch.forward_mode is ForwardMode.EXTEND),
            seq_lens_cpu_upper_bound=upper,
        )
        return given, RunnerOrder(requests, lens, upper.long())


def _bounds(lens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lens.cumsum(0), (1, 0))
