"""FlashMLA's sparse kernels for Hopper as attention of a layer: those of ``sgl-flash-mla`` 1.0.0.

The wheel loads under torch 2.11, installed or unpacked into a folder on ``PYTHONPATH``:

    nsa-oracle survey --layer nsa_oracle.harness.subjects.adapters.flash_mla:Prefill --device cuda
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import ClassVar

import torch

from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.scenarios.limits import Sizes
from nsa_oracle.reference.types import AttentionConfig, BackendConfig, KVCacheDtype

PAGE_SIZE = 64
_PRODUCTION: Sizes = {
    "kv_lora_rank": (512,),
    "qk_rope_head_dim": (64,),
    "far_slots": (False,),
    "num_heads": (64, 128),
    "index_topk": (512, 2048),
}


def flash_mla() -> ModuleType:
    """The package. Raises BackendError, in one line, if it cannot be imported."""
    try:
        return importlib.import_module("flash_mla")
    except (ImportError, OSError) as error:
        raise BackendError(f"flash_mla cannot be imported: {error}; install sgl-flash-mla") from None


def _lse(lse: torch.Tensor) -> torch.Tensor:
    """``lse`` in the contract's convention: FlashMLA marks a row without a key by inf, the contract by -inf."""
    return torch.where(lse == math.inf, -math.inf, lse)


class _Attention:
    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        self.attention = attention

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = self.attention
        if not len(q):
            out = q.new_empty(0, sizes.num_heads, sizes.kv_lora_rank)
            return out, q.new_empty(0, sizes.num_heads, dtype=torch.float32)
        return self.attend(q.contiguous(), kv_cache, indices[:, None].contiguous())

    def attend(self, q: torch.Tensor, cache: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Out and lse of at least one row; indices are [R, 1, K]."""
        raise NotImplementedError


class Prefill(_Attention):
    """Sparse prefill over a bf16 cache: one pass over the keys, no splits."""

    sizes: ClassVar[Sizes] = {**_PRODUCTION, "kv_cache_dtype": (KVCacheDtype.BF16,)}

    def attend(self, q: torch.Tensor, cache: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, _, lse = flash_mla().flash_mla_sparse_fwd(
            q, cache, indices, self.attention.sm_scale, self.attention.kv_lora_rank, use_legacy=True
        )
        return out, _lse(lse)


class Decode(_Attention):
    """Sparse decode over an FP8 cache: it splits a row when the batch leaves multiprocessors idle."""

    sizes: ClassVar[Sizes] = {**_PRODUCTION, "kv_cache_dtype": (KVCacheDtype.FP8,), "page_size": (PAGE_SIZE,)}

    def attend(self, q: torch.Tensor, cache: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        package, sizes = flash_mla(), self.attention
        pages = cache.view(-1, PAGE_SIZE, 1, sizes.kv_token_bytes).view(torch.float8_e4m3fn)
        schedule, _ = package.get_mla_metadata()
        out, lse = package.flash_mla_with_kvcache(
            q[:, None], pages, None, None, sizes.kv_lora_rank, schedule, softmax_scale=sizes.sm_scale, indices=indices,
            use_legacy=True,
        )  # fmt: skip
        return out[:, 0], _lse(lse[:, :, 0])
