"""Triton kernel bodies, and nothing else. The modules above this package decide grids, flags and arguments.

``fields`` (where each field lives in a step's packed buffer); ``lengths``, ``page_table``, ``schedules`` (the device
functions; lengths and schedules can also be launched alone); ``metadata`` (one launch that does all of it); ``copy``
(buffers into buffers). Of the layer: ``fp8`` (e4m3 conversion), ``kv_cache``, ``indexer``, ``topk``, ``attention`` and
``attention_hopper``.

Without a GPU the kernels run in Triton's interpreter. Triton reads ``TRITON_INTERPRET`` when it is imported, so this
module sets the variable: it runs before any other module of the package, and these are the only ones of ``optimized/``
that import Triton at their head. The modules above import it inside functions. It is not set in ``optimized/__init__``,
because asking torch for a GPU initialises CUDA, which must not happen yet where only ``optimized.optimizations`` is
imported: the process may still have to choose its GPU, or to fork.
"""

from __future__ import annotations

import os

import torch

if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
