"""Kernels of planted bugs. They are launched without torch seeing it, as a backend launches its own kernels.

Compiled code only. The module is imported late, because importing Triton fixes how kernels run. Without a bug around
them, the kernels leave all content unchanged.
"""

# mypy: disable-error-code="untyped-decorator"
# (Triton ships no types for its decorator)

from __future__ import annotations

import triton
import triton.language as tl

TURN_LANES = 256  # one lane per thread of 8 warps


@triton.jit
def mark_kernel(scratch: tl.tensor) -> None:
    """Writes 1 to the first int32 of ``scratch``."""
    tl.store(scratch, 1)


@triton.jit
def add_listed_kernel(addresses: tl.tensor, target: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Adds to ``target`` [n] int32 the n int32 values at the address stored in ``addresses`` [1] int64."""
    offsets = tl.load(addresses).to(tl.pointer_type(tl.int32))
    for begin in range(0, n, BLOCK):
        cells = begin + tl.arange(0, BLOCK)
        inside = cells < n
        added = tl.load(offsets + cells, mask=inside, other=0)
        tl.store(target + cells, tl.load(target + cells, mask=inside, other=0) + added, mask=inside)


@triton.jit
def copy_rows_kernel(table: tl.tensor, row_stride: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Copies each row of ``table`` [rows, WIDTH] int32 onto itself, one program per row. Compiled for each WIDTH."""
    row = table + tl.program_id(0) * row_stride
    for begin in range(0, WIDTH, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        tl.store(row + columns, tl.load(row + columns, mask=columns < WIDTH, other=0), mask=columns < WIDTH)


@triton.jit
def turn_kernel(
    field: tl.tensor,
    scratch: tl.tensor,
    n: tl.tensor,
    spread: tl.tensor,
    WAITS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Copies ``field`` [n] int32 to ``scratch`` [n] and back: one thread stores an entry, one of another warp loads it.

    The warps of the upper half sleep before they store, so that a missing barrier shows every time. spread: distance in
    lanes between neighbouring entries. WAITS: whether there is a barrier.
    """
    lanes = tl.arange(0, LANES)
    entries = lanes // spread
    live = (lanes % spread == 0) & (entries < n)
    values = tl.load(field + entries, mask=live, other=0)
    values = tl.inline_asm_elementwise(
        "{ .reg .pred slow; setp.ge.s32 slow, $2, 128; @slow nanosleep.u32 500000; mov.b32 $0, $1; }",
        "=r,r,r",
        [values, lanes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(scratch + entries, values, mask=live)
    if WAITS:
        tl.debug_barrier()
    opposite = n - 1 - entries
    tl.store(field + opposite, tl.load(scratch + opposite, mask=live, other=0), mask=live)
