"""Buffers into buffers: all fields of one computation into the buffers of every step, in one launch."""

# mypy: disable-error-code="untyped-decorator"
# (Triton ships no types for its decorator)

from __future__ import annotations

import triton
import triton.language as tl

from nsa_oracle.optimized.kernels.page_table import write_table_rows

_RUNTIME = [
    "packed", "table", "pages", "flattened", "source_packed", "source_table", "source_flattened", "packed_stride",
    "table_step_stride", "table_row_stride", "pages_step_stride", "pages_row_stride", "flattened_stride",
    "source_packed_stride", "source_table_row_stride", "num_steps", "packed_size", "flattened_size", "lengths_offset",
    "num_source_steps", "num_table_rows", "width", "programs_per_row",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_RUNTIME)
def copy_steps_kernel(
    packed: tl.tensor,
    table: tl.tensor,
    pages: tl.tensor,
    flattened: tl.tensor,
    source_packed: tl.tensor,
    source_table: tl.tensor,
    source_flattened: tl.tensor,
    packed_stride: tl.tensor,
    table_step_stride: tl.tensor,
    table_row_stride: tl.tensor,
    pages_step_stride: tl.tensor,
    pages_row_stride: tl.tensor,
    flattened_stride: tl.tensor,
    source_packed_stride: tl.tensor,
    source_table_row_stride: tl.tensor,
    num_steps: tl.tensor,
    packed_size: tl.tensor,
    flattened_size: tl.tensor,
    lengths_offset: tl.tensor,
    num_source_steps: tl.tensor,
    num_table_rows: tl.tensor,
    width: tl.tensor,
    programs_per_row: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    HAS_FLATTENED: tl.constexpr,
    SOURCE_ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Programs by id: page-table rows (``programs_per_row`` each), chunks of packed fields, chunks of ``flattened``.

    ``source_packed_stride`` is 0 when one computation serves all steps. Only the live part of a row is copied: its
    length is read from the source's own fields (those of its last step, which is the longest).
    """
    pid = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    copy_programs = num_table_rows * programs_per_row
    packed_programs = tl.cdiv(packed_size, CHUNK)
    if pid < copy_programs:
        row = pid // programs_per_row
        last_source = source_packed + (num_source_steps - 1) * source_packed_stride.to(tl.int64)
        length = tl.minimum(tl.load(last_source + lengths_offset + row), width)
        source = source_table + row * source_table_row_stride.to(tl.int64)
        write_table_rows(
            source, length, table, table_step_stride.to(tl.int64), table_row_stride.to(tl.int64), pages,
            pages_step_stride.to(tl.int64), pages_row_stride.to(tl.int64), num_steps, row, row + 1,
            pid - row * programs_per_row, programs_per_row, PAGE_SIZE, PAGE_LANES, SOURCE_ALIGNED, CHUNK,
        )  # fmt: skip
    elif pid < copy_programs + packed_programs:
        cells = (pid - copy_programs) * CHUNK + lanes
        inside = cells < packed_size
        for step in range(num_steps):
            values = tl.load(source_packed + step * source_packed_stride.to(tl.int64) + cells, mask=inside, other=0)
            tl.store(packed + step * packed_stride.to(tl.int64) + cells, values, mask=inside)
    elif HAS_FLATTENED:
        cells = (pid - copy_programs - packed_programs) * CHUNK + lanes
        inside = cells < flattened_size
        values = tl.load(source_flattened + cells, mask=inside, other=0)
        for step in range(num_steps):
            tl.store(flattened + step * flattened_stride.to(tl.int64) + cells, values, mask=inside)
