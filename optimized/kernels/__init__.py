"""Triton kernel bodies, and nothing else. The modules above this package decide grids, flags and arguments.

``fields`` (where each field lives in a step's packed buffer); ``lengths``, ``page_table``, ``schedules`` (the device
functions; lengths and schedules can also be launched alone); ``metadata`` (one launch that does all of it); ``copy``
(buffers into buffers).

Without a GPU the kernels run in Triton's interpreter. Triton reads the variable when it is imported, so it is set here,
before any module of this package imports it.
"""

from __future__ import annotations

import os

import torch

if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
