"""Both work splits against hand-worked values and against the integer arithmetic of the kernels that define them.

The statements of the two kernels are worked from these public sources, in our own words:
deepseek-ai/DeepGEMM ``deep_gemm/include/deep_gemm/scheduler/paged_mqa_logits.cuh`` (fixed next_n, not varlen) and
deepseek-ai/FlashMLA ``csrc/cuda_kernels/smxx/decode/get_decoding_sched_meta/get_decoding_sched_meta.cu`` (a length per
row, no extra cache).
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nsa_oracle.reference.schedules import flashmla_schedule, paged_mqa_schedule

Schedule = list[list[int]]
FAST = settings(deadline=None, max_examples=200, derandomize=True)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def got_paged_mqa(context_lens: list[int], num_sms: int, next_n: int = 1) -> Schedule:
    schedule = paged_mqa_schedule(int32(context_lens), num_sms, next_n)
    assert schedule.dtype == torch.int32
    assert tuple(schedule.shape) == (num_sms + 1, 2)
    return schedule.tolist()


def got_flashmla(nsa_cache_seqlens: list[int], num_sm_parts: int) -> tuple[Schedule, list[int]]:
    """The seven words FlashMLA writes for each part (the eighth is padding), and the cumulative splits."""
    metadata, num_splits = flashmla_schedule(int32(nsa_cache_seqlens), num_sm_parts)
    assert metadata.dtype == num_splits.dtype == torch.int32
    assert tuple(metadata.shape) == (num_sm_parts, 8)
    return metadata[:, :7].tolist(), num_splits.tolist()


def paged_mqa_by_kernel(context_lens: list[int], num_sms: int, next_n: int) -> Schedule:
    """DeepGEMM's way: bisect each multiprocessor's first segment in the running sum over requests.

    Our own definition where the kernel has none: an empty batch gives zeros (it would read before its array).
    """
    batch = len(context_lens)
    if batch == 0:
        return [[0, 0] for _ in range(num_sms + 1)]
    atoms = 1 if next_n == 1 else (next_n + 1) // 2
    per_atom = [(length + 255) // 256 for length in context_lens]
    ends = [total * atoms for total in accumulate(per_atom)]
    even, extra = ends[-1] // num_sms, ends[-1] % num_sms
    schedule = []
    for sm in range(num_sms):
        first = sm * even + max(0, sm - (num_sms - extra))
        request = min(bisect_right(ends, first), batch - 1)
        inside = first - (ends[request] - per_atom[request] * atoms)
        atom, split = divmod(inside, per_atom[request]) if per_atom[request] else (0, 0)
        schedule.append([request * atoms + atom, split])
    return [*schedule, [batch * atoms, 0]]


def flashmla_by_kernel(lengths: list[int], parts: int) -> tuple[Schedule, list[int]]:
    """FlashMLA's way, reported as the pieces (row, first block, end block) that each part takes.

    Our own definition where the kernel has none: with an empty batch, end row -1 and end block 0 (it would read
    before its array).
    """
    blocks = [(max(length, 1) + 63) // 64 for length in lengths]
    payload = (sum(blocks) + 5 * len(blocks) + parts - 1) // parts + 5
    pieces_of_row: list[int] = [0] * len(blocks)
    metadata: Schedule = []
    row = done = 0
    for _ in range(parts):
        budget, pieces = payload, []
        while row < len(blocks) and budget > 5:
            end = min(blocks[row], done + budget - 5)
            pieces.append((row, done, end, pieces_of_row[row]))
            pieces_of_row[row] += 1
            budget -= end - done + 5
            row, done = (row + 1, 0) if end == blocks[row] else (row, end)
        if pieces:
            begin_row, begin_block, _end, begin_split = pieces[0]
            end_row, _begin, end_block, _split = pieces[-1]
            cut = (begin_block > 0, end_block < blocks[end_row])
            first, last = (any(cut), any(cut)) if begin_row == end_row else cut
            metadata.append([begin_row, end_row, begin_block, end_block, begin_split, int(first), int(last)])
        else:
            metadata.append([row, row - 1, 0, blocks[-1] if blocks else 0, 0, 0, 0])
    assert row == len(blocks), "the parts must finish the batch"
    return metadata, [0, *accumulate(pieces_of_row)]


@pytest.mark.parametrize(
    ("context_lens", "num_sms", "next_n", "expected"),
    [
        ([256], 2, 1, [[0, 0], [0, 0], [1, 0]]),  # 1 segment: the first SM gets none, the last gets it
        ([257], 2, 1, [[0, 0], [0, 1], [1, 0]]),  # 2 segments, one each
        ([1], 1, 1, [[0, 0], [1, 0]]),
        ([1280], 4, 1, [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]),  # 5 = 4*1 + 1: counts 1 1 1 2
        ([1536], 4, 1, [[0, 0], [0, 1], [0, 2], [0, 4], [1, 0]]),  # 6 = 4*1 + 2: counts 1 1 2 2
        ([512, 0, 300], 3, 1, [[0, 0], [0, 1], [2, 0], [3, 0]]),  # segments 2 0 2, counts 1 1 2, starts 0 1 2
        ([0, 256], 2, 1, [[1, 0], [1, 0], [2, 0]]),  # an empty request is nobody's start
        ([256, 0], 2, 1, [[0, 0], [0, 0], [2, 0]]),
        ([0, 0], 2, 1, [[1, 0], [1, 0], [2, 0]]),  # no work: the last request
        ([0, 0], 2, 4, [[2, 0], [2, 0], [4, 0]]),  # no work, 2 atoms each: first atom of the last request
        ([], 2, 1, [[0, 0], [0, 0], [0, 0]]),  # our own definition
        ([257], 3, 2, [[0, 0], [0, 0], [0, 1], [1, 0]]),  # 1 atom, 2 segments: counts 0 1 1
        ([257], 3, 3, [[0, 0], [0, 1], [1, 0], [2, 0]]),  # 2 atoms, 4 segments: counts 1 1 2
        ([257], 3, 4, [[0, 0], [0, 1], [1, 0], [2, 0]]),
        ([257], 3, 5, [[0, 0], [1, 0], [2, 0], [3, 0]]),  # 3 atoms, 6 segments: 2 each
        ([256, 512], 2, 3, [[0, 0], [2, 1], [4, 0]]),  # atoms of 1 1 2 2: 6 = 3 + 3; the fourth is atom 2's second
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_paged_mqa_literals(context_lens: list[int], num_sms: int, next_n: int, expected: Schedule) -> None:
    assert got_paged_mqa(context_lens, num_sms, next_n) == expected
    assert paged_mqa_by_kernel(context_lens, num_sms, next_n) == expected


@pytest.mark.parametrize("batch", [31, 32, 33, 64, 96])
def test_paged_mqa_around_a_warp(batch: int) -> None:
    """The kernel sums 32 requests at a time: one segment each, one SM a request, and one with nothing before them."""
    expected = [[0, 0], *([sm, 0] for sm in range(batch)), [batch, 0]]
    assert got_paged_mqa([256] * batch, batch + 1) == expected  # q = 0, r = batch: counts 0 1 1 .. 1
    assert paged_mqa_by_kernel([256] * batch, batch + 1, 1) == expected


context_lens_of = st.one_of(
    st.integers(0, 1500),
    st.sampled_from([0, 0, 1, 255, 256, 257, 511, 512, 513]),
)
batches_of_context_lens = st.one_of(
    st.lists(context_lens_of, max_size=6),
    st.builds(lambda length, batch: [length] * batch, context_lens_of, st.sampled_from([1, 31, 32, 33, 64])),
    st.builds(lambda lens, batch: (lens * batch)[:batch], st.lists(context_lens_of, min_size=1, max_size=6),
              st.sampled_from([32, 64])),
)  # fmt: skip


@FAST
@given(batches_of_context_lens, st.integers(1, 140), st.integers(1, 5))
@example([0] * 32, 132, 1)
@example([0, 0, 257, 0], 3, 5)
def test_paged_mqa_equals_the_kernel(context_lens: list[int], num_sms: int, next_n: int) -> None:
    expected = paged_mqa_by_kernel(context_lens, num_sms, next_n)
    assert got_paged_mqa(context_lens, num_sms, next_n) == expected


@FAST
@given(batches_of_context_lens, st.integers(1, 140), st.integers(1, 5))
def test_paged_mqa_deals_every_segment_once(context_lens: list[int], num_sms: int, next_n: int) -> None:
    """Between two entries lie q or q + 1 segments, never fewer for a later SM, and all of them together."""
    atoms = 1 if next_n == 1 else (next_n + 1) // 2
    segments = [-(-length // 256) for length in context_lens for _ in range(atoms)]
    total = sum(segments)
    if total == 0:
        return
    before = [0, *accumulate(segments)]
    starts = [before[atom] + split for atom, split in got_paged_mqa(context_lens, num_sms, next_n)]
    counts = [end - start for start, end in pairwise(starts)]
    few, extra = divmod(total, num_sms)
    assert starts[0] == 0
    assert counts == [few] * (num_sms - extra) + [few + 1] * extra


@pytest.mark.parametrize(
    ("lengths", "parts", "metadata", "num_splits"),
    [
        # blocks 1 2, cost 6 + 7 = 13, payload 7 + 5 = 12: row 0 (6), then 6 left buys one block of row 1
        ([64, 128], 2, [[0, 1, 0, 1, 0, 0, 1], [1, 1, 1, 2, 1, 1, 1]], [0, 1, 3]),
        # cost 3 * 6 = 18, payload 6 + 5 = 11: after one row 5 are left, which only pays for entering
        ([64, 64, 64], 3, [[0, 0, 0, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0], [2, 2, 0, 1, 0, 0, 0]], [0, 1, 2, 3]),
        # blocks 32, cost 37, payload 10 + 5 = 15: 10 blocks a part, 2 for the last
        (
            [2048],
            4,
            [[0, 0, 0, 10, 0, 1, 1], [0, 0, 10, 20, 1, 1, 1], [0, 0, 20, 30, 2, 1, 1], [0, 0, 30, 32, 3, 1, 1]],
            [0, 4],
        ),
        # blocks 1 16 1, cost 6 + 21 + 6 = 33, payload 17 + 5 = 22: row 0, 11 blocks of row 1; the other 5, row 2
        ([64, 1024, 64], 2, [[0, 1, 0, 11, 0, 0, 1], [1, 2, 11, 1, 1, 1, 0]], [0, 1, 3, 4]),
        # cost 6, payload 3 + 5 = 8: the second part is idle, from row 1 to row 0, end block of the last row
        ([64], 2, [[0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0]], [0, 1]),
        # cost 6, payload 1 + 5 = 6: the row fits exactly, five parts are idle
        ([64], 6, [[0, 0, 0, 1, 0, 0, 0], *[[1, 0, 0, 1, 0, 0, 0]] * 5], [0, 1]),
        ([128, 192], 1, [[0, 1, 0, 3, 0, 0, 0]], [0, 1, 2]),
        ([64], 1, [[0, 0, 0, 1, 0, 0, 0]], [0, 1]),
        ([65], 1, [[0, 0, 0, 2, 0, 0, 0]], [0, 1]),
        ([0], 1, [[0, 0, 0, 1, 0, 0, 0]], [0, 1]),  # a row without keys costs one block
        ([0, 0], 1, [[0, 1, 0, 1, 0, 0, 0]], [0, 1, 2]),
        ([], 2, [[0, -1, 0, 0, 0, 0, 0], [0, -1, 0, 0, 0, 0, 0]], [0]),  # our own definition
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_flashmla_literals(lengths: list[int], parts: int, metadata: Schedule, num_splits: list[int]) -> None:
    assert got_flashmla(lengths, parts) == (metadata, num_splits)
    assert flashmla_by_kernel(lengths, parts) == (metadata, num_splits)


kept_keys = st.one_of(st.integers(0, 2048), st.sampled_from([0, 0, 1, 63, 64, 65, 128, 129, 2047, 2048]))
batches_of_kept_keys = st.one_of(
    st.lists(kept_keys, max_size=8),
    st.builds(lambda length, batch: [length] * batch, kept_keys, st.sampled_from([1, 31, 32, 33, 64])),
    st.builds(lambda keys, batch: (keys * batch)[:batch], st.lists(kept_keys, min_size=1, max_size=6),
              st.sampled_from([32, 64])),
)  # fmt: skip


@FAST
@given(batches_of_kept_keys, st.integers(1, 140))
@example([2048] * 64, 132)
@example([0] * 32, 78)
def test_flashmla_equals_the_kernel(lengths: list[int], parts: int) -> None:
    assert got_flashmla(lengths, parts) == flashmla_by_kernel(lengths, parts)


@FAST
@given(batches_of_kept_keys.filter(len), st.integers(1, 140))
def test_flashmla_covers_every_block_once(lengths: list[int], parts: int) -> None:
    """What a decode kernel would read: each part walks its rows from begin to end block, and counts its splits."""
    metadata, num_splits = got_flashmla(lengths, parts)
    blocks = [(max(length, 1) + 63) // 64 for length in lengths]
    reads: list[list[int]] = [[] for _ in lengths]
    splits = [0] * len(lengths)
    for begin_row, end_row, begin_block, end_block, begin_split, first_split, last_split in metadata:
        for row in range(begin_row, end_row + 1):
            start = begin_block if row == begin_row else 0
            stop = end_block if row == end_row else blocks[row]
            if row == begin_row:
                assert begin_split == splits[row]
                assert first_split == (stop - start < blocks[row])
            if row == end_row:
                assert last_split == (stop - start < blocks[row])
            reads[row].extend(range(start, stop))
            splits[row] += 1
    assert reads == [list(range(count)) for count in blocks]
    assert num_splits == [0, *accumulate(splits)]
