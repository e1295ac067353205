"""Work schedules, one program each: both are prefix sums over rows, followed by a search in them."""

# mypy: disable-error-code="untyped-decorator"
# (Triton ships no types for its decorator)

from __future__ import annotations

import triton
import triton.language as tl

SPLIT_KV = tl.constexpr(256)  # tokens of KV in one segment of DeepGEMM's paged MQA logits
BLOCK_SIZE = tl.constexpr(64)  # tokens of KV in one block of FlashMLA's decode kernel
FIXED_OVERHEAD_BLOCKS = tl.constexpr(5)  # cost, in blocks, for a part to start a request


@triton.jit
def write_paged_mqa_schedule(
    lengths: tl.tensor,
    num_rows: tl.tensor,
    schedule: tl.tensor,
    step_stride: tl.tensor,
    step_begin: tl.tensor,
    step_end: tl.tensor,
    num_sms: tl.tensor,
    SM_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
) -> None:
    """Where each multiprocessor starts, stored to steps ``step_begin .. step_end - 1``; see ``reference.schedules``.

    Multiprocessor s starts at segment begin(s), a closed form. Its row is the number of rows whose segments all lie
    before begin(s), so a tile of multiprocessors x rows counts instead of searching one by one.
    """
    row_lanes = tl.arange(0, ROW_BLOCK)
    total = num_rows * 0
    for start in range(0, num_rows, ROW_BLOCK):
        rows = start + row_lanes
        total += tl.sum(tl.cdiv(tl.load(lengths + rows, mask=rows < num_rows, other=0), SPLIT_KV), 0)
    quotient = total // num_sms
    remainder = total - quotient * num_sms

    for first_sm in range(0, num_sms + 1, SM_BLOCK):
        sms = first_sm + tl.arange(0, SM_BLOCK)
        begins = sms * quotient + tl.maximum(sms - (num_sms - remainder), 0)
        row_of_sm = tl.zeros([SM_BLOCK], tl.int32)
        row_begin = tl.zeros([SM_BLOCK], tl.int32)  # segments before the row
        before = num_rows * 0
        for start in range(0, num_rows, ROW_BLOCK):
            rows = start + row_lanes
            segments = tl.cdiv(tl.load(lengths + rows, mask=rows < num_rows, other=0), SPLIT_KV)
            ends = before + tl.cumsum(segments, 0)
            passed = (ends[None, :] <= begins[:, None]) & (rows < num_rows)[None, :]
            row_of_sm += tl.sum(passed.to(tl.int32), 1)
            row_begin = tl.maximum(row_begin, tl.max(tl.where(passed, ends[None, :], 0), 1))
            before += tl.sum(segments, 0)
        idle = begins >= total
        row_of_sm = tl.where(idle, tl.maximum(num_rows - 1, 0), row_of_sm)
        row_of_sm = tl.where(sms == num_sms, num_rows, row_of_sm)
        segment = tl.where(idle, 0, begins - row_begin)
        for step in range(step_begin, step_end):
            target = schedule + step * step_stride + sms * 2
            tl.store(target, row_of_sm, mask=sms <= num_sms)
            tl.store(target + 1, segment, mask=sms <= num_sms)


@triton.jit
def blocks_of(lengths: tl.tensor) -> tl.tensor:
    """Blocks of KV of rows this long; a row without keys still costs one."""
    return tl.cdiv(tl.maximum(lengths, 1), BLOCK_SIZE)


@triton.jit
def write_flashmla_schedule(
    lengths: tl.tensor,
    num_rows: tl.tensor,
    metadata: tl.tensor,
    num_splits: tl.tensor,
    metadata_step_stride: tl.tensor,
    splits_step_stride: tl.tensor,
    step_begin: tl.tensor,
    step_end: tl.tensor,
    num_sm_parts: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """FlashMLA's greedy schedule, stored to steps ``step_begin .. step_end - 1``; see ``reference.schedules``.

    Parts are sequential (each starts where the one before stopped), rows are not: with cost[k] = blocks and overhead
    of rows 0..k, a part that starts ``block`` blocks into row ``row`` finishes every row whose cost is at most
    cost[row - 1] + block + payload. One reduction over a block of rows finds the last of them and its cost.
    """
    lanes = tl.arange(0, BLOCK)
    total = num_rows * 0
    for start in range(0, num_rows, BLOCK):
        rows = start + lanes
        valid = rows < num_rows
        row_blocks = blocks_of(tl.load(lengths + rows, mask=valid, other=0))
        total += tl.sum(tl.where(valid, row_blocks + FIXED_OVERHEAD_BLOCKS, 0), 0)
    payload = tl.cdiv(total, num_sm_parts) + FIXED_OVERHEAD_BLOCKS
    for step in range(step_begin, step_end):
        tl.store(num_splits + step * splits_step_stride, 0)

    # State: the first unfinished row, the cost of the rows before it, its first unassigned block, its splits so far,
    # and the splits of the rows before it.
    part = num_rows * 0
    row = num_rows * 0
    row_cost = num_rows * 0
    block = num_rows * 0
    split = num_rows * 0
    splits_before = num_rows * 0
    cost_before = num_rows * 0  # cost of all rows before this block of rows
    for start in range(0, tl.maximum(num_rows, 1), BLOCK):  # an empty batch has parts too
        rows = start + lanes
        valid = rows < num_rows
        row_blocks = blocks_of(tl.load(lengths + rows, mask=valid, other=0))
        row_costs = tl.where(valid, row_blocks + FIXED_OVERHEAD_BLOCKS, 0)
        costs = cost_before + tl.cumsum(row_costs, 0)
        cost_after = cost_before + tl.sum(row_costs, 0)
        is_last = start + BLOCK >= num_rows
        # Row number and cost grow together, so one maximum over (row number, cost) finds both.
        keys = ((lanes + 1).to(tl.int64) << 32) | costs.to(tl.int64)

        # Parts that end within this block of rows. One that does not is continued in the next block.
        while (part < num_sm_parts) & (is_last | (row_cost + block + payload < cost_after)):
            limit = row_cost + block + payload
            found = tl.max(tl.where(valid & (costs <= limit), keys, cost_before.to(tl.int64)), 0)
            next_row = start + (found >> 32).to(tl.int32)
            next_cost = (found & 0xFFFFFFFF).to(tl.int32)
            advanced = next_row > row
            for first in range(row, next_row, BLOCK):
                done = first + lanes
                value = splits_before + split + 1 + done - row
                for step in range(step_begin, step_end):
                    tl.store(num_splits + step * splits_step_stride + done + 1, value, mask=done < next_row)
            splits_before += tl.where(advanced, split + next_row - row, 0)
            next_block = tl.where(advanced, 0, block)
            next_split = tl.where(advanced, 0, split)

            # What is left pays the overhead of the next row and as many of its blocks as it can.
            remaining = limit - next_cost - next_block
            partial = (next_row < num_rows) & (remaining > FIXED_OVERHEAD_BLOCKS)
            next_block += tl.where(partial, remaining - FIXED_OVERHEAD_BLOCKS, 0)
            next_split += tl.where(partial, 1, 0)

            end_row = tl.where(next_block > 0, next_row, next_row - 1)
            end_row_length = tl.load(lengths + end_row, mask=end_row >= 0, other=0)
            end_row_blocks = tl.where(end_row >= 0, blocks_of(end_row_length), 0)
            end_block = tl.where(next_block > 0, next_block, end_row_blocks)
            first_is_split = block != 0
            last_is_split = end_block != end_row_blocks
            one_row = row == end_row
            either = first_is_split | last_is_split
            first_is_split = tl.where(one_row, either, first_is_split)
            last_is_split = tl.where(one_row, either, last_is_split)

            column = tl.arange(0, 8)
            entry = tl.where(column == 0, row, 0)
            entry = tl.where(column == 1, end_row, entry)
            entry = tl.where(column == 2, block, entry)
            entry = tl.where(column == 3, end_block, entry)
            entry = tl.where(column == 4, split, entry)
            entry = tl.where(column == 5, first_is_split.to(tl.int32), entry)
            entry = tl.where(column == 6, last_is_split.to(tl.int32), entry)
            for step in range(step_begin, step_end):
                tl.store(metadata + step * metadata_step_stride + part * 8 + column, entry)
            part += 1
            row = next_row
            row_cost = next_cost
            block = next_block
            split = next_split
        cost_before = cost_after


_PAGED_MQA_SCALARS = ["lengths", "schedule", "lengths_stride", "schedule_stride", "num_rows", "num_sms"]


@triton.jit(do_not_specialize=_PAGED_MQA_SCALARS, do_not_specialize_on_alignment=_PAGED_MQA_SCALARS)
def paged_mqa_schedule_kernel(
    lengths: tl.tensor,
    schedule: tl.tensor,
    lengths_stride: tl.tensor,
    schedule_stride: tl.tensor,
    num_rows: tl.tensor,
    num_sms: tl.tensor,
    SM_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
) -> None:
    """The schedule alone. Grid: one program per step."""
    step = tl.program_id(0)
    row = lengths + step * lengths_stride.to(tl.int64)
    write_paged_mqa_schedule(
        row, num_rows, schedule, schedule_stride.to(tl.int64), step, step + 1, num_sms, SM_BLOCK, ROW_BLOCK
    )


_FLASHMLA_SCALARS = [
    "lengths", "metadata", "num_splits", "lengths_stride", "metadata_stride", "splits_stride", "num_rows",
    "num_sm_parts",
]  # fmt: skip


@triton.jit(do_not_specialize=_FLASHMLA_SCALARS, do_not_specialize_on_alignment=_FLASHMLA_SCALARS)
def flashmla_schedule_kernel(
    lengths: tl.tensor,
    metadata: tl.tensor,
    num_splits: tl.tensor,
    lengths_stride: tl.tensor,
    metadata_stride: tl.tensor,
    splits_stride: tl.tensor,
    num_rows: tl.tensor,
    num_sm_parts: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The schedule alone. Grid: one program per step."""
    step = tl.program_id(0)
    row = lengths + step * lengths_stride.to(tl.int64)
    write_flashmla_schedule(
        row, num_rows, metadata, num_splits, metadata_stride.to(tl.int64), splits_stride.to(tl.int64), step, step + 1,
        num_sm_parts, BLOCK,
    )  # fmt: skip
