"""Clean layers that use a freedom the contract leaves them."""

from __future__ import annotations

import torch

from nsa_oracle.reference.layer import SparseAttention
from tests.support.layers.attention import Attention, Chunked
from tests.support.layers.in_graph import KeepsFirst
from tests.support.layers.indexer import Indexer
from tests.support.layers.store import Store

Clean = SparseAttention


class InFloat32(Attention):
    """Attention in float32 throughout."""

    dtype = torch.float32


class OnlineInFloat32(Chunked):
    """A running softmax in float32."""

    dtype = torch.float32


class Bf16Weights(Attention):
    """Weights are rounded to bf16 for the product with the values, as matrix units want them."""

    dtype = torch.float32

    def attend(self, q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        exponents = self.exponents(q, keys)
        largest = exponents.amax(1, keepdim=True)
        weights = torch.exp2(exponents - largest)
        acc = weights.bfloat16().float() @ self.values(keys)
        return self.finish(acc, weights.sum(1, keepdim=True), largest)


class IndexerInFloat32(Indexer):
    """Index scores in float32, scaled before the sum over heads."""

    def score(self, q: torch.Tensor, w: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return (w.float()[:, None] * torch.relu(q.float() @ keys.float().T) * scales.float()).sum(0)


class OtherNan(Store):
    """Clean. The NaN that it makes are negative, and full of ones."""

    def quantize(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = super().quantize(x, tile)
        codes = values.view(torch.uint8).masked_fill(values.float().isnan(), 0xFF)
        bits = scales.view(torch.int32).masked_fill(scales.isnan(), -1)
        return codes.view(torch.float8_e4m3fn), bits.view(torch.float32)


class SharesOutputs(KeepsFirst):
    """Clean: all calls of one size leave their results in the same buffers."""

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        positions = super().topk_indices(logits, seqlens_expanded)
        return self.keep("topk", positions).copy_(positions)

    def topk_transform_paged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor
    ) -> torch.Tensor:
        indices = super().topk_transform_paged(logits, seqlens_expanded, page_table_1)
        return self.keep("topk", indices).copy_(indices)

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        return self.keep("out", out).copy_(out), self.keep("lse", lse).copy_(lse)
