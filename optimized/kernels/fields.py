"""Where each field of one step lives: the table that kernels and ``optimized.buffers`` share.

All small fields of a step share one int32 buffer of ``pitch``-spaced slots, so a kernel finds every field from one
pointer and one stride instead of a pointer per field (each pointer costs launch time), and copying a step's small
fields is copying one run of memory. ``pitch`` is a multiple of 4 elements, which keeps every field 16-byte aligned.

The schedules follow the slots: paged MQA, then FlashMLA (``optimized.buffers.Layout``).
"""

from __future__ import annotations

import triton.language as tl

CACHE_SEQLENS = tl.constexpr(0)
CU_SEQLENS_K = tl.constexpr(1)
SEQLENS_EXPANDED = tl.constexpr(2)
NSA_CACHE_SEQLENS = tl.constexpr(3)
NSA_CU_SEQLENS_K = tl.constexpr(4)
CU_SEQLENS_Q = tl.constexpr(5)
NSA_CU_SEQLENS_Q = tl.constexpr(6)
FLASHMLA_NUM_SPLITS = tl.constexpr(7)
NUM_GRAPH_FIELDS = tl.constexpr(8)  # what a captured graph needs; the rest exists in EXTEND only
TOPK_INDICES_OFFSET = tl.constexpr(8)
INDEXER_K_START = tl.constexpr(9)
INDEXER_K_END = tl.constexpr(10)
TOKEN_TO_BATCH_IDX = tl.constexpr(11)
NUM_EXTEND_FIELDS = tl.constexpr(12)

# Number of rows (query tokens) of a request: the same for all, read from a tensor, or read and laid out as in prefill.
UNIFORM = tl.constexpr(0)
RAGGED = tl.constexpr(1)
EXTEND = tl.constexpr(2)
