"""One stage of a third-party sparse attention layer behind the oracle's protocol, and a twin of it with a bug.

The stage is attention over the selected slots. Stages that are not defined here are taken from ``optimized/``: to judge
one kernel, define one method. Replace the body of ``sparse_mla`` by a call of your kernel.

Judge both with:

    make check ARGS='-k test_layers --oracle-profile dev --oracle-layer docs.examples.my_layer:MyAttention'
    make check ARGS='-k test_layers --oracle-profile dev --oracle-layer docs.examples.my_layer:MyBrokenAttention'
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from nsa_oracle.harness.scenarios.limits import Sizes
from nsa_oracle.reference.types import AttentionConfig, BackendConfig, KVCacheDtype


class MyAttention:
    """Plain torch. ``--oracle-layer`` names this class; it is called with these two arguments."""

    sizes: ClassVar[Sizes] = {"kv_cache_dtype": (KVCacheDtype.BF16,)}  # it cannot read the FP8 cache

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        self.attention = attention
        # A float32, as kernels take it: exactly 1 in the exact regimes, where weights are powers of two.
        self.scale_log2 = torch.tensor(attention.sm_scale * math.log2(math.e), dtype=torch.float32).item()

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Q [R, heads, dim] and kv_cache [slots, 1, dim] bf16, indices [R, K] int32: see ``reference.attention``."""
        heads, rank = self.attention.num_heads, self.attention.kv_lora_rank
        out = torch.empty(len(q), heads, rank, dtype=torch.bfloat16, device=q.device)
        lse = torch.empty(len(q), heads, dtype=torch.float32, device=q.device)
        for row in range(len(q)):  # one by one, so that no row can depend on another
            self._attend(out[row], lse[row], q[row].double(), kv_cache, indices[row])
        return out, lse

    def _attend(
        self, out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> None:
        # 1. A capture cannot count the valid slots: read a slot for every index, and mask those read for -1.
        is_valid = indices >= 0  # [K]
        keys = kv_cache[indices.clamp(min=0).long(), 0].double()  # [K, dim]
        keys = keys.masked_fill(~is_valid[:, None], 0)  # slot 0 may hold NaN, and 0 * NaN is NaN

        # 2. Softmax to the base 2, not yet divided by its sum. Without a valid slot all weights are 0.
        scores = (q @ keys.T).masked_fill(~is_valid, -torch.inf)  # [heads, K]
        largest = scores.amax(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)  # [heads, 1]
        weights = torch.exp2((scores - largest) * self.scale_log2)
        total = weights.sum(dim=1, keepdim=True)

        # 3. Divide, round to float32, round to bf16.
        values = keys[:, : self.attention.kv_lora_rank]
        out.copy_((weights @ values / total.masked_fill(total == 0, 1)).float())
        lse.copy_((largest * self.attention.sm_scale + total.log()).squeeze(1))


class MyBrokenAttention(MyAttention):
    """The bug: assumes that every row of indices ends with a -1."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().sparse_mla(q, kv_cache, indices[:, :-1])
