"""Allocates the caches of a layer."""

from __future__ import annotations

import torch

from nsa_oracle.harness.memory.bits import as_bytes
from nsa_oracle.harness.scenarios.setup import Setup
from nsa_oracle.reference.types import AttentionCaches, AttentionConfig, KVCacheDtype


def new_caches(
    setup: Setup, config: AttentionConfig, num_pages: int, device: torch.device, poison: int, band: int = 0
) -> AttentionCaches:
    """Returns dense caches filled with the byte ``poison``: all slots of the setup, and ``num_pages`` index-K pages.

    kv: [slots, 1, qk_head_dim] bf16, or [slots, 1, kv_token_bytes] uint8 for FP8. index_k: [pages, bytes of a page]
    uint8. band: number of extra slots and pages at either end.
    """
    slots = setup.num_slots + 2 * band
    num_pages += 2 * band
    if config.kv_cache_dtype is KVCacheDtype.FP8:
        kv = torch.empty(slots, 1, config.kv_token_bytes, dtype=torch.uint8, device=device)
    else:
        kv = torch.empty(slots, 1, config.qk_head_dim, dtype=torch.bfloat16, device=device)
    index_k = torch.empty(num_pages, config.index_page_bytes(setup.page_size), dtype=torch.uint8, device=device)
    as_bytes(kv).fill_(poison)
    index_k.fill_(poison)
    return AttentionCaches(kv, index_k)
