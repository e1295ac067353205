"""Work schedules, derived from lengths, that attention kernels read from device memory at every launch."""

from __future__ import annotations

import torch

SPLIT_KV = 256  # tokens of KV in one segment of DeepGEMM's paged MQA logits
BLOCK_SIZE = 64  # tokens of KV in one block of FlashMLA's decode kernel
FIXED_OVERHEAD_BLOCKS = 5  # cost, in blocks, for a part to start a request


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def paged_mqa_schedule(context_lens: torch.Tensor, num_sms: int, next_n: int = 1) -> torch.Tensor:
    """Where each multiprocessor starts in DeepGEMM's paged MQA logits: int32 [num_sms + 1, 2].

    context_lens [batch]: KV length of each request, which has ``next_n`` query tokens. Two of them at a time (one when
    next_n = 1) form an *atom*. An atom has ceil(context_len / 256) segments. All segments, in order, are dealt
    to the multiprocessors, total // num_sms each, and one more to each of the last total % num_sms. Entry s is
    (atom, segment within the atom) at which multiprocessor s starts; the last entry is (number of atoms, 0).

    Without any work (every length is 0) all multiprocessors start at the first atom of the last request. An empty batch
    gives zeros.

    Source: deepseek-ai/DeepGEMM at 245dc5d, ``scheduler/paged_mqa_logits.cuh``. Other versions deal the remainder to
    the first multiprocessors, or end an idle one at the end of the batch.
    """
    lengths: list[int] = context_lens.tolist()
    schedule = torch.zeros(num_sms + 1, 2, dtype=torch.int32)
    if lengths:
        # 1. Segments of each atom, in the order they are dealt.
        atoms_per_request = ceil_div(next_n, 2)
        segments = [ceil_div(length, SPLIT_KV) for length in lengths for _ in range(atoms_per_request)]
        starts = [(atom, segment) for atom, count in enumerate(segments) for segment in range(count)]

        # 2. Deal them: the last `remainder` multiprocessors take one more.
        quotient, remainder = divmod(len(starts), num_sms)
        begin = 0
        nothing_left = ((len(lengths) - 1) * atoms_per_request, 0)
        for sm in range(num_sms):
            schedule[sm] = torch.tensor(starts[begin] if begin < len(starts) else nothing_left)
            begin += quotient + (1 if sm >= num_sms - remainder else 0)

        # 3. Close with the end of all work.
        schedule[num_sms] = torch.tensor([len(segments), 0])
    return schedule.to(context_lens.device)


def flashmla_schedule(nsa_cache_seqlens: torch.Tensor, num_sm_parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashMLA's decode schedule: (metadata int32 [num_sm_parts, 8], num_splits int32 [batch + 1]).

    nsa_cache_seqlens [batch]: keys each row attends to; a row without keys still costs one block. A part is dealt
    blocks of 64 keys in row order until its payload is spent; entering a row costs 5 blocks on top, so a part
    leaves a row it can no longer enter to the next one.

    metadata[p]: begin row, end row (inclusive), begin block, end block (exclusive), begin split of the begin row,
    whether the begin row is split, whether the end row is split, padding (dead: FlashMLA leaves it unwritten).
    num_splits[i]: splits of all rows before i.

    A part left without work has begin row = batch and end row = batch - 1. An empty batch gives end row -1 and
    end block 0.

    Source: deepseek-ai/FlashMLA at 9a7d253, ``get_decoding_sched_meta.cu`` and ``DecodingSchedMeta`` in ``params.h``.
    """
    # 1. Blocks of each row, and what one part may spend.
    num_blocks = [ceil_div(max(length, 1), BLOCK_SIZE) for length in nsa_cache_seqlens.tolist()]
    batch = len(num_blocks)
    total_cost = sum(blocks + FIXED_OVERHEAD_BLOCKS for blocks in num_blocks)
    payload = ceil_div(total_cost, num_sm_parts) + FIXED_OVERHEAD_BLOCKS

    metadata = torch.zeros(num_sm_parts, 8, dtype=torch.int32)
    num_splits = torch.zeros(batch + 1, dtype=torch.int32)
    row, block, split = 0, 0, 0  # the first unfinished row, its first undealt block, the splits it has so far
    for part in range(num_sm_parts):
        begin_row, begin_block, begin_split = row, block, split

        # 2. Deal whole rows while they fit, then blocks of the next one, if more than its overhead is left.
        remaining = payload
        while row < batch and remaining >= num_blocks[row] - block + FIXED_OVERHEAD_BLOCKS:
            remaining -= num_blocks[row] - block + FIXED_OVERHEAD_BLOCKS
            num_splits[row + 1] = num_splits[row] + split + 1
            row, block, split = row + 1, 0, 0
        if row < batch and remaining > FIXED_OVERHEAD_BLOCKS:
            block += remaining - FIXED_OVERHEAD_BLOCKS
            split += 1

        # 3. Where the part ends, and whether it shares its first and last rows with other parts.
        end_row = row if block > 0 else row - 1
        blocks_of_end_row = num_blocks[end_row] if end_row >= 0 else 0
        end_block = block if block > 0 else blocks_of_end_row
        first_split = begin_block != 0
        last_split = end_block != blocks_of_end_row
        if begin_row == end_row:
            first_split = last_split = first_split or last_split
        metadata[part, :7] = torch.tensor(
            [begin_row, end_row, begin_block, end_block, begin_split, first_split, last_split]
        )
    assert (row, block) == (batch, 0), "FlashMLA's payload always suffices for the whole batch"
    device = nsa_cache_seqlens.device
    return metadata.to(device), num_splits.to(device)
