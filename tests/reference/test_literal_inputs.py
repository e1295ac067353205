"""Sizes, padding, missing and strange inputs: metadata against values worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nsa_oracle.reference import lengths, page_table
from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.types import ForwardBatch, ForwardMode, Metadata, SpecInfo
from tests.support.literals import (
    LAYOUTS,
    POOL,
    SPECULATIVE,
    _,
    assert_table,
    assert_tensor,
    int32,
    make_batch,
    make_config,
    run,
)


@pytest.mark.parametrize(
    ("mode", "missing"),
    [
        (ForwardMode.DRAFT_EXTEND, "accept_length"),
        (ForwardMode.EXTEND, "extend_seq_lens"),
    ],
    ids=["mode=DRAFT_EXTEND", "mode=EXTEND"],
)
def test_missing_input_is_named(mode: ForwardMode, missing: str) -> None:
    with pytest.raises(AssertionError, match=missing):
        run(make_config(), make_batch(mode, [1], [2]), in_graph=False)


def test_missing_prefix_is_named() -> None:
    with pytest.raises(AssertionError, match="extend_prefix_lens"):
        run(make_config(), make_batch(ForwardMode.EXTEND, [1], [2], extend=[2]), in_graph=False)


@pytest.mark.parametrize(
    ("index_topk", "clipped", "cumulative"),
    [
        (4, [4, 4, 4], [0, 4, 8, 12]),
        (5, [5, 5, 5], [0, 5, 10, 15]),  # K = the shortest row
        (6, [5, 6, 6], [0, 5, 11, 17]),
        (7, [5, 6, 7], [0, 5, 11, 18]),  # K = the longest row: nothing clipped
        (2048, [5, 6, 7], [0, 5, 11, 18]),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_index_topk_clips_only_the_nsa_lengths(index_topk: int, clipped: list[int], cumulative: list[int]) -> None:
    batch = make_batch(ForwardMode.TARGET_VERIFY, [1], [4])
    metadata = run(make_config(index_topk=index_topk), batch, in_graph=True)
    assert_tensor("nsa_cache_seqlens_int32", metadata.nsa_cache_seqlens_int32, clipped)
    assert_tensor("nsa_cu_seqlens_k", metadata.nsa_cu_seqlens_k, cumulative)
    assert_tensor("seqlens_expanded", metadata.seqlens_expanded, [5, 6, 7])
    assert_tensor("cu_seqlens_k", metadata.cu_seqlens_k, [0, 7])


@pytest.mark.parametrize(
    ("page_size", "pages", "graph_pages", "eager_pages"),
    [
        (16, [9, 3, 7, 1, 5], [9, 3, 7, 1, 5], [9, 3, 7]),  # ceil(70/16) = 5, ceil(33/16) = 3
        (32, [6, 2, 4], [6, 2, 4], [6, 2]),  # ceil(70/32) = 3, ceil(33/32) = 2
        (64, [3, 1], [3, 1], [3]),  # ceil(70/64) = 2, ceil(33/64) = 1
        (70, [2], [2], [2]),  # one page holds all: ceil(70/70) = 1, ceil(33/70) = 1
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_page_size(page_size: int, pages: list[int], graph_pages: list[int], eager_pages: list[int]) -> None:
    """A request of 70 tokens fills the graph's table, one of 33 is alone in an eager batch; pages in no order."""
    slots = [page * page_size + offset for page in pages for offset in range(page_size)]
    config = make_config(page_size=page_size, max_context_len=70)
    in_graph = compute_metadata(config, int32([slots]), make_batch(ForwardMode.DECODE, [0], [70]), 0, in_graph=True)
    assert_tensor("real_page_table", in_graph.real_page_table, [graph_pages])
    assert_tensor("page_table_1", in_graph.page_table_1, [slots[:70]])
    eager = compute_metadata(config, int32([slots]), make_batch(ForwardMode.DECODE, [0], [33]), 0, in_graph=False)
    assert_tensor("real_page_table", eager.real_page_table, [eager_pages])
    assert_tensor("page_table_1", eager.page_table_1, [slots[:33]])


def test_page_size_one_has_equal_tables() -> None:
    batch = make_batch(ForwardMode.DECODE, [2, 1], [7, 7])
    metadata = run(make_config(page_size=1), batch, in_graph=True)
    slots = [[16, 17, 12, 13, 8, 9, 14], [10, 11, 20, 21, 30, 31, 40]]
    assert_tensor("page_table_1", metadata.page_table_1, slots)
    assert_tensor("real_page_table", metadata.real_page_table, slots)


def test_padded_requests_are_rows_like_any_other() -> None:
    """raw_bs 1 in a bucket of 3: the fill is seq_len 1 on pool row 0."""
    metadata = run(make_config(), make_batch(ForwardMode.TARGET_VERIFY, [2, 0, 0], [2, 1, 1]), in_graph=True)
    assert_tensor("cache_seqlens_int32", metadata.cache_seqlens_int32, [5, 4, 4])
    assert_tensor("seqlens_expanded", metadata.seqlens_expanded, [3, 4, 5, 2, 3, 4, 2, 3, 4])
    assert_table("page_table_1", metadata.page_table_1[8:], [[0, 1, 0, 1, _, _, _]], 7)


def test_schedules_belong_to_the_right_lengths() -> None:
    """Paged MQA scores all keys a row sees, FlashMLA attends to the kept ones; rows behind the live ones count too."""
    config = make_config(
        max_context_len=520,
        index_topk=64,
        speculative_num_draft_tokens=2,
        paged_mqa_num_sms=3,
        flashmla_num_sm_parts=2,
    )
    pool = int32([list(range(520))])
    batch = make_batch(ForwardMode.DRAFT_EXTEND, [0, 0], [513, 9], accept=[2, 0])
    metadata = compute_metadata(config, pool, batch, 0, in_graph=True)
    assert_tensor("seqlens_expanded", metadata.seqlens_expanded, [512, 513, 0, 0])
    # Segments 2, 3, 0, 0: total 5 = 3*1 + 2, so SMs 0, 1, 2 take 1, 2, 2, from segments 0, 1, 3; 3 is row 1's second.
    assert_tensor("paged_mqa_schedule_metadata", metadata.paged_mqa_schedule_metadata, [[0, 0], [0, 1], [1, 1], [4, 0]])
    # Kept keys 64, 64, 0, 0, one block each: payload ceil(4*6 / 2) + 5 = 17 holds two rows (12) but not a third (18).
    assert metadata.flashmla_metadata is not None
    seven_words = metadata.flashmla_metadata[:, :7]
    assert_tensor("flashmla_metadata", seven_words, [[0, 1, 0, 1, 0, 0, 0], [2, 3, 0, 1, 0, 0, 0]])
    assert_tensor("flashmla_num_splits", metadata.flashmla_num_splits, [0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("paged_mqa_num_sms", "flashmla_num_sm_parts"), [(0, 0), (2, 0), (0, 2)], ids=["none", "paged_mqa", "flashmla"]
)
def test_schedules_are_optional(paged_mqa_num_sms: int, flashmla_num_sm_parts: int) -> None:
    config = make_config(paged_mqa_num_sms=paged_mqa_num_sms, flashmla_num_sm_parts=flashmla_num_sm_parts)
    metadata = run(config, make_batch(ForwardMode.DECODE, [1], [3]), in_graph=True)
    assert (metadata.paged_mqa_schedule_metadata is not None) == (paged_mqa_num_sms > 0)
    assert (metadata.flashmla_metadata is not None) == (flashmla_num_sm_parts > 0)
    assert (metadata.flashmla_num_splits is not None) == (flashmla_num_sm_parts > 0)


def every_second(values: list[int], dtype: torch.dtype) -> torch.Tensor:
    """``values`` as every second element of a tensor that holds -999 between them."""
    wide = torch.full((len(values), 2), -999, dtype=dtype)
    wide[:, 0] = torch.tensor(values, dtype=dtype)
    return wide[:, 0]


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["dtype=int32", "dtype=int64"])
@pytest.mark.parametrize("mode", SPECULATIVE, ids=lambda mode: f"mode={mode.name}")
def test_input_dtype_and_strides_do_not_matter(mode: ForwardMode, dtype: torch.dtype, in_graph: bool) -> None:
    plain = make_batch(mode, [1, 2, 0], [4, 3, 1], accept=[2, 0, 3])
    strided = ForwardBatch(
        mode,
        3,
        every_second([1, 2, 0], dtype),
        every_second([4, 3, 1], dtype),
        spec_info=SpecInfo(every_second([2, 0, 3], dtype)),
    )
    wider = torch.full((8, 16), -999, dtype=torch.int32)
    view = wider[::2, 3:13]
    view.copy_(int32(POOL))
    config = make_config(paged_mqa_num_sms=2, flashmla_num_sm_parts=2)
    expected = run(config, plain, in_graph)
    got = compute_metadata(config, view, strided, 0, in_graph)
    for field in dataclasses.fields(Metadata):
        want = getattr(expected, field.name)
        value = getattr(got, field.name)
        if isinstance(want, torch.Tensor):
            assert_tensor(field.name, value, want.tolist())
        else:
            assert value == want, field.name


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["dtype=int32", "dtype=int64"])
def test_extend_input_dtype_and_strides_do_not_matter(dtype: torch.dtype) -> None:
    batch = ForwardBatch(
        ForwardMode.EXTEND,
        2,
        every_second([1, 2], dtype),
        every_second([10, 4], dtype),
        extend_seq_lens=every_second([3, 2], dtype),
        extend_prefix_lens=every_second([7, 2], dtype),
    )
    metadata = run(make_config(), batch, in_graph=False)
    assert_tensor("cu_seqlens_q", metadata.cu_seqlens_q, [0, 3, 5])
    assert metadata.indexer_k_start_end is not None
    assert_tensor("ks", metadata.indexer_k_start_end[0], [0, 0, 0, 10, 10])
    assert_tensor("ke", metadata.indexer_k_start_end[1], [8, 9, 10, 13, 14])
    assert_tensor("token_to_batch_idx", metadata.token_to_batch_idx, [0, 0, 0, 1, 1])
    assert_tensor("topk_indices_offset", metadata.topk_indices_offset, [0, 0, 0, 10, 10])


@LAYOUTS
@pytest.mark.parametrize("mirror", [None, [1, 1], [7, 7]], ids=["mirror=absent", "mirror=behind", "mirror=ahead"])
def test_host_mirror_is_not_read(mirror: list[int] | None, in_graph: bool) -> None:
    batch = make_batch(
        ForwardMode.DECODE,
        [1, 2],
        [5, 3],
        seq_lens_cpu=None if mirror is None else int32(mirror),
        seq_lens_sum=None if mirror is None else sum(mirror),
    )
    metadata = run(make_config(), batch, in_graph)
    assert_tensor("seqlens_expanded", metadata.seqlens_expanded, [5, 3])
    assert metadata.max_seq_len_k == (7 if in_graph else 5)


def storages(metadata: Metadata) -> list[int]:
    """Addresses of all fields with content."""
    values = [getattr(metadata, field.name) for field in dataclasses.fields(Metadata)]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    tensors += [part for value in values if isinstance(value, tuple) for part in value]
    return [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()]


@pytest.mark.parametrize("mode", list(ForwardMode), ids=lambda mode: f"mode={mode.name}")
def test_fields_share_no_memory(mode: ForwardMode) -> None:
    """A graph's fields are buffers of their own: neither inputs nor each other. Page size 1, where it would be easy."""
    config = make_config(page_size=1, paged_mqa_num_sms=1, flashmla_num_sm_parts=1)
    pool = int32(POOL)
    batch = make_batch(mode, [1, 2], [4, 3], accept=[1, 1], extend=[1, 1], prefix=[3, 2])
    metadata = compute_metadata(config, pool, batch, 0, in_graph=mode is not ForwardMode.EXTEND)
    assert batch.spec_info is not None
    assert batch.extend_seq_lens is not None
    inputs = [pool, batch.seq_lens, batch.req_pool_indices, batch.spec_info.accept_length, batch.extend_seq_lens]
    addresses = storages(metadata) + [tensor.untyped_storage().data_ptr() for tensor in inputs]
    assert len(addresses) == len(set(addresses))


def test_pad_rows_refuses_more_rows_than_the_graph_has() -> None:
    with pytest.raises(RuntimeError):
        lengths.pad_rows(int32([1, 2, 3]), 2)


def test_length_helpers() -> None:
    assert_tensor("cu_seqlens", lengths.cu_seqlens(int32([])), [0])
    assert_tensor("cu_seqlens", lengths.cu_seqlens(int32([3, 0, 2])), [0, 3, 3, 5])
    assert_tensor("pad_rows", lengths.pad_rows(int32([3, 2]), 4), [3, 2, 0, 0])
    assert_tensor("seqlens_expanded", lengths.seqlens_expanded(int32([2, 5]), int32([4, 0])), [0, 0, 1, 2])


def test_page_table_helpers() -> None:
    table = int32([[4, 5, 8], [6, 7, 2]])
    assert_tensor("real_page_table", page_table.real_page_table(table, 2), [[2, 4], [3, 1]])
    assert_tensor("flatten", page_table.flatten(table, int32([1, 3])), [4, 6, 7, 2])
    assert_tensor("flatten", page_table.flatten(table[:0], int32([])), [])
    repeated = page_table.repeat_rows(table, int32([0, 2]), 3)
    assert_table("repeat_rows", repeated, [[6, 7, 2], [6, 7, 2], [_, _, _]], 3)
