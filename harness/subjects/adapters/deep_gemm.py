"""DeepGEMM's paged MQA logits as the indexer of a layer, on a Hopper GPU.

``sgl-deep-gemm`` 0.1.4, the last version that loads beside torch 2.11, with ``apache-tvm-ffi`` 0.1.11; it builds its
kernels with nvcc on first use:

    nsa-oracle survey --layer nsa_oracle.harness.subjects.adapters.deep_gemm:PagedLogits --device cuda
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import ClassVar

import torch

from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.scenarios.limits import Sizes
from nsa_oracle.reference.types import AttentionConfig, BackendConfig

BLOCK_KV = 64  # tokens of a page: the only number that its kernel for Hopper takes


def deep_gemm() -> ModuleType:
    """The package. Raises BackendError, in one line, if it cannot be imported."""
    try:
        return importlib.import_module("deep_gemm")
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(f"deep_gemm cannot be imported: {error}; install sgl-deep-gemm and apache-tvm-ffi") from None


class PagedLogits:
    """Every row is a request of its own, as SGLang calls it in decode.

    DeepGEMM does not clean cells behind a row's length if lengths have two dimensions, as SGLang's do: top-k does not
    read them. The adapter does, because the contract asks for it.
    """

    sizes: ClassVar[Sizes] = {
        "index_n_heads": (64,),
        "index_head_dim": (128,),
        "page_size": (BLOCK_KV,),
        "far_slots": (False,),
    }

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        self.page_bytes = attention.index_page_bytes(BLOCK_KV)

    def indexer_logits(
        self,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        index_k_cache: torch.Tensor,
        real_page_table: torch.Tensor,
        seqlens_expanded: torch.Tensor,
        max_seq_len_k: int,
    ) -> torch.Tensor:
        package, rows = deep_gemm(), len(index_q)
        if not rows or not max_seq_len_k:
            return torch.full((rows, max_seq_len_k), -torch.inf, device=index_q.device)
        lengths = seqlens_expanded[:, None].contiguous()  # [R, 1]: of each request, for each of its query tokens
        multiprocessors = torch.cuda.get_device_properties(index_q.device).multi_processor_count
        found: torch.Tensor = package.fp8_paged_mqa_logits(
            index_q[:, None].contiguous(),
            index_k_cache.view(-1, BLOCK_KV, 1, self.page_bytes // BLOCK_KV),
            index_weights.contiguous(),
            lengths,
            real_page_table.contiguous(),
            package.get_paged_mqa_logits_metadata(lengths, BLOCK_KV, multiprocessors),
            max_seq_len_k,
            clean_logits=False,
        )
        return found.masked_fill(torch.arange(max_seq_len_k, device=found.device) >= lengths, -torch.inf)
