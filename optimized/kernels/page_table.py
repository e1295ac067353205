"""Page tables: read a chunk of a request's slots once, store it to all of the request's rows in all steps."""

# mypy: disable-error-code="untyped-decorator"
# (Triton ships no types for its decorator)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_table_rows(
    source: tl.tensor,
    length: tl.tensor,
    table: tl.tensor,
    table_step_stride: tl.tensor,
    table_row_stride: tl.tensor,
    pages: tl.tensor,
    pages_step_stride: tl.tensor,
    pages_row_stride: tl.tensor,
    num_steps: tl.tensor,
    row_begin: tl.tensor,
    row_end: tl.tensor,
    first: tl.tensor,
    stride: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    PAGE_LANES: tl.constexpr,
    SOURCE_ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Copies ``source[:length]`` to rows ``row_begin .. row_end - 1`` of all steps, and every PAGE_SIZE-th slot's page.

    Handles chunks ``first``, ``first + stride``, ... Destination rows start on 16 bytes (``optimized.buffers`` pads
    them); strides are int64. Full chunks have no mask, so they move as 16-byte vectors; the last one is masked exactly:
    nothing at or beyond ``length`` is read or written. PAGE_LANES: a power of two, enough for the pages of a chunk.
    """
    lanes = tl.arange(0, CHUNK)
    for chunk in range(first, tl.cdiv(length, CHUNK), stride):
        begin = chunk * CHUNK
        columns = begin + lanes
        if begin + CHUNK <= length:
            chunk_source = source + begin
            if SOURCE_ALIGNED:
                chunk_source = tl.multiple_of(chunk_source, 16)
            slots = tl.load(chunk_source + lanes)
            for step in range(num_steps):
                for row in range(row_begin, row_end):
                    target = tl.multiple_of(table + step * table_step_stride + row * table_row_stride, 16)
                    tl.store(target + columns, slots)
        else:
            live = columns < length
            slots = tl.load(source + columns, mask=live, other=0)
            for step in range(num_steps):
                for row in range(row_begin, row_end):
                    tl.store(table + step * table_step_stride + row * table_row_stride + columns, slots, mask=live)

        # The pages that begin in this chunk; their slots were just read, so these loads hit the cache. A page table of
        # page size 1 holds the slots themselves: the caller aliases the two.
        if PAGE_SIZE > 1:
            page_columns = (begin + PAGE_SIZE - 1) // PAGE_SIZE + tl.arange(0, PAGE_LANES)
            live_pages = page_columns * PAGE_SIZE < tl.minimum(begin + CHUNK, length)
            page_ids = tl.load(source + page_columns * PAGE_SIZE, mask=live_pages, other=0) // PAGE_SIZE
            for step in range(num_steps):
                for row in range(row_begin, row_end):
                    target = pages + step * pages_step_stride + row * pages_row_stride
                    tl.store(target + page_columns, page_ids, mask=live_pages)
