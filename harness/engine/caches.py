"""Memory for the caches of a layer."""

from __future__ import annotations

import torch

from nsa_oracle.harness.memory.bits import as_bytes
from nsa_oracle.harness.scenarios.scenario import Setup
from nsa_oracle.reference.types import AttentionCaches, AttentionConfig, KVCacheDtype


def new_caches(
    setup: Setup, config: AttentionConfig, num_pages: int, device: torch.device, poison: int, band: int = 0
) -> AttentionCaches:
    """Dense caches full of poison: all slots of the setup, and ``num_pages`` pages of index keys.

    band: so many slots and pages more at either end of both.
    """
    slots = setup.num_pages * setup.page_size + 2 * band
    num_pages += 2 * band
    if config.kv_cache_dtype is KVCacheDtype.FP8:
        kv = torch.empty(slots, 1, config.kv_token_bytes, dtype=torch.uint8, device=device)
    else:
        kv = torch.empty(slots, 1, config.qk_head_dim, dtype=torch.bfloat16, device=device)
    index_k = torch.empty(num_pages, config.index_page_bytes(setup.page_size), dtype=torch.uint8, device=device)
    as_bytes(kv).fill_(poison)
    index_k.fill_(poison)
    return AttentionCaches(kv, index_k)
