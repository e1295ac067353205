"""Stages of production kernels behind the oracle's layer protocol: SGLang's builds of FlashMLA, and its fast top-k.

They are operators of two shared libraries in the wheel ``sglang-kernel`` (0.4.4 for torch 2.11), which load without the
rest of the package. Unpack the wheel and name its folder ``sgl_kernel``:

    ORACLE_SGL_KERNEL=/path/to/sgl_kernel nsa-oracle survey --layer docs.examples.peers:FlashMLAPrefill

Stages that a layer below does not define are taken from ``optimized/``. docs/peers.md has the results.
"""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from nsa_oracle.harness.protocol import Strictness
from nsa_oracle.harness.scenarios.limits import Sizes
from nsa_oracle.reference.types import AttentionConfig, BackendConfig, KVCacheDtype

FOLDER = "ORACLE_SGL_KERNEL"
PRODUCTION: Sizes = {"kv_lora_rank": (512,), "qk_rope_head_dim": (64,), "far_slots": (False,)}


@cache
def sgl_kernel() -> Any:
    """The operators of both libraries. Raises RuntimeError, in one line, if ORACLE_SGL_KERNEL is not set."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        raise RuntimeError(f"set {FOLDER} to the folder sgl_kernel of an unpacked sglang-kernel wheel")
    for name in ("flashmla_ops.abi3.so", "sm90/common_ops.abi3.so"):
        torch.ops.load_library(str(Path(folder) / name))
    return torch.ops.sgl_kernel


def _lse(lse: torch.Tensor) -> torch.Tensor:
    """``lse`` in the contract's convention: FlashMLA marks a row without a key by inf, the contract by -inf."""
    return torch.where(lse == math.inf, -math.inf, lse)


class FlashMLAPrefill:
    """FlashMLA's sparse prefill kernel over a bf16 cache: one pass over the keys, no splits."""

    sizes: ClassVar[Sizes] = {
        **PRODUCTION,
        "num_heads": (64, 128),
        "kv_cache_dtype": (KVCacheDtype.BF16,),
        "index_topk": (512, 2048),
    }

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        self.attention = attention

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.attention
        if not len(q):
            return q.new_empty(0, config.num_heads, config.kv_lora_rank), q.new_empty(
                0, config.num_heads, dtype=torch.float32
            )
        out, _, lse = sgl_kernel().sparse_prefill_fwd.default(
            q.contiguous(), kv_cache, indices[:, None].contiguous(), config.sm_scale, config.kv_lora_rank, None, None
        )
        return out, _lse(lse * math.log(2))  # the kernel's lse is to the base 2


class FlashMLADecode:
    """FlashMLA's sparse decode kernel over an FP8 cache: splits a row when the batch leaves multiprocessors idle."""

    sizes: ClassVar[Sizes] = {
        **PRODUCTION,
        "num_heads": (64, 128),
        "kv_cache_dtype": (KVCacheDtype.FP8,),
        "index_topk": (512, 2048),
        "page_size": (64,),
    }

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        self.attention = attention

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.attention
        if not len(q):
            return q.new_empty(0, config.num_heads, config.kv_lora_rank), q.new_empty(
                0, config.num_heads, dtype=torch.float32
            )
        pages = kv_cache.view(-1, 64, 1, config.kv_token_bytes).view(torch.float8_e4m3fn)
        out, lse, _, _ = sgl_kernel().sparse_decode_fwd.default(
            *(q[:, None].contiguous(), pages, indices[:, None].contiguous(), None, None, None, None, None, None, None),
            config.kv_lora_rank,
            config.sm_scale,
        )
        return out[:, 0], _lse(lse[:, :, 0])


class FastTopK:
    """SGLang's radix top-k, by itself and fused with the page table: the right tokens, in no fixed order."""

    sizes: ClassVar[Sizes] = {"index_topk": (2048,)}
    weaker: ClassVar[dict[str, Strictness]] = {"topk_indices": Strictness.SAME_SET, "indices": Strictness.SAME_SET}

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        self.index_topk = config.index_topk

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        positions = torch.empty(len(logits), self.index_topk, dtype=torch.int32, device=logits.device)
        if len(logits):
            sgl_kernel().fast_topk.default(logits.contiguous(), positions, seqlens_expanded, None)
        return positions

    def topk_transform_paged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor
    ) -> torch.Tensor:
        slots = torch.empty(len(logits), self.index_topk, dtype=torch.int32, device=logits.device)
        if len(logits):
            rows = torch.arange(len(logits) + 1, dtype=torch.int32, device=logits.device)
            sgl_kernel().fast_topk_transform_fused.default(
                logits.contiguous(), seqlens_expanded, slots, page_table_1.contiguous(), rows, None
            )
        return slots


class UnorderedFastTopK(FastTopK):
    """The same kernel, judged by the order that the contract requires."""

    weaker: ClassVar[dict[str, Strictness]] = {}
