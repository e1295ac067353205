"""Every metadata field of every mode against values worked out by hand from docs/contract.md.

``_`` marks a dead cell of a page table: unspecified, not compared. The arithmetic stands beside each value.
"""

from __future__ import annotations

from typing import Any

import pytest

from nsa_oracle.reference.types import ForwardBatch, ForwardMode, StepSemantics
from tests.support.literals import (
    LAYOUTS,
    POOL,
    SCHEDULES,
    SPECULATIVE,
    _,
    assert_metadata,
    assert_table,
    assert_tensor,
    make_batch,
    make_config,
    run,
)

DECODE_LENGTHS: dict[str, Any] = {
    "page_size": 2,
    "max_seq_len_q": 1,
    "cache_seqlens_int32": [5, 3],
    "cu_seqlens_k": [0, 5, 8],  # 5, 5+3
    "cu_seqlens_q": [0, 1, 2],
    "seqlens_expanded": [5, 3],
    "nsa_cache_seqlens_int32": [4, 3],  # min(5, 4), min(3, 4)
    "nsa_cu_seqlens_k": [0, 4, 7],  # 4, 4+3
    "nsa_cu_seqlens_q": [0, 1, 2],
}


@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.IDLE], ids=["mode=DECODE", "mode=IDLE"])
def test_decode_eager(mode: ForwardMode) -> None:
    """One row a request, tables as wide as the longest request."""
    expected = DECODE_LENGTHS | {
        "max_seq_len_k": 5,
        "page_table_1": [[10, 11, 20, 21, 30], [16, 17, 12, _, _]],
        "real_page_table": [[5, 10, 15], [8, 6, _]],  # 10/2 20/2 30/2; 16/2 12/2; ceil(5/2) = 3 columns
    }
    assert_metadata(run(make_config(), make_batch(mode, [1, 2], [5, 3]), in_graph=False), expected)


@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.IDLE], ids=["mode=DECODE", "mode=IDLE"])
def test_decode_graph(mode: ForwardMode) -> None:
    """As eagerly, but the tables are 7 wide."""
    expected = DECODE_LENGTHS | {
        "max_seq_len_k": 7,
        "page_table_1": [[10, 11, 20, 21, 30, _, _], [16, 17, 12, _, _, _, _]],
        "real_page_table": [[5, 10, 15, _], [8, 6, _, _]],  # ceil(7/2) = 4 columns
    }
    assert_metadata(run(make_config(), make_batch(mode, [1, 2], [5, 3]), in_graph=True), expected)


@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.IDLE], ids=["mode=DECODE", "mode=IDLE"])
def test_advancing_step_sees_its_own_tokens(mode: ForwardMode) -> None:
    """Step 1 of ADVANCING: seq_lens + 1 + 1."""
    config = make_config(step_semantics=StepSemantics.ADVANCING)
    expected: dict[str, Any] = {
        "page_size": 2,
        "max_seq_len_q": 1,
        "max_seq_len_k": 6,
        "cache_seqlens_int32": [6, 3],  # 4+2, 1+2
        "cu_seqlens_k": [0, 6, 9],
        "cu_seqlens_q": [0, 1, 2],
        "seqlens_expanded": [6, 3],
        "nsa_cache_seqlens_int32": [4, 3],
        "nsa_cu_seqlens_k": [0, 4, 7],
        "nsa_cu_seqlens_q": [0, 1, 2],
        "page_table_1": [[16, 17, 12, 13, 8, 9], [10, 11, 24, _, _, _]],
        "real_page_table": [[8, 6, 4], [5, 12, _]],
    }
    assert_metadata(run(config, make_batch(mode, [2, 3], [4, 1]), in_graph=False, step=1), expected)


@LAYOUTS
@pytest.mark.parametrize(
    ("semantics", "step", "cache_seqlens"),
    [
        (StepSemantics.SHARED, 0, [4, 1]),
        (StepSemantics.SHARED, 1, [4, 1]),  # every step the same
        (StepSemantics.ADVANCING, 0, [5, 2]),  # + 0 + 1
        (StepSemantics.ADVANCING, 1, [6, 3]),  # + 1 + 1
    ],
    ids=lambda value: str(getattr(value, "value", value)).replace(" ", ""),
)
def test_step_semantics(semantics: StepSemantics, step: int, cache_seqlens: list[int], in_graph: bool) -> None:
    batch = make_batch(ForwardMode.DECODE, [2, 3], [4, 1])
    metadata = run(make_config(step_semantics=semantics), batch, in_graph, step)
    assert_tensor("cache_seqlens_int32", metadata.cache_seqlens_int32, cache_seqlens)
    assert_tensor("seqlens_expanded", metadata.seqlens_expanded, cache_seqlens)


def test_step_semantics_default_is_shared() -> None:
    assert make_config().step_semantics is StepSemantics.SHARED


@LAYOUTS
@pytest.mark.parametrize(
    ("mode", "cache_seqlens", "expanded"),
    [
        (ForwardMode.TARGET_VERIFY, [7, 5], [5, 6, 7, 3, 4, 5]),  # 4+3, 2+3
        (ForwardMode.DRAFT_EXTEND, [4, 2], [2, 3, 4, 0, 1, 2]),  # 4-3+1.., 2-3+1..
        (ForwardMode.DRAFT_EXTEND_V2, [4, 2], [2, 3, 4, 0, 1, 2]),
    ],
    ids=["mode=TARGET_VERIFY", "mode=DRAFT_EXTEND", "mode=DRAFT_EXTEND_V2"],
)
def test_only_draft_steps_advance(
    mode: ForwardMode, cache_seqlens: list[int], expanded: list[int], in_graph: bool
) -> None:
    """Verify and draft extend run once a cycle: ADVANCING leaves them alone."""
    batch = make_batch(mode, [1, 2], [4, 2], accept=[3, 3])
    metadata = run(make_config(step_semantics=StepSemantics.ADVANCING), batch, in_graph, step=1)
    assert_tensor("cache_seqlens_int32", metadata.cache_seqlens_int32, cache_seqlens)
    assert_tensor("seqlens_expanded", metadata.seqlens_expanded, expanded)


@LAYOUTS
def test_target_verify(in_graph: bool) -> None:
    """3 rows a request, which see the cache and 1, 2, 3 draft tokens. 7 is also the graph's width here."""
    expected: dict[str, Any] = {
        "page_size": 2,
        "max_seq_len_q": 1,
        "max_seq_len_k": 7,
        "cache_seqlens_int32": [7, 4],  # 4+3, 1+3
        "cu_seqlens_k": [0, 7, 11],
        "cu_seqlens_q": [0, 1, 2, 3, 4, 5, 6],
        "seqlens_expanded": [5, 6, 7, 2, 3, 4],  # 4+1 4+2 4+3, 1+1 1+2 1+3
        "nsa_cache_seqlens_int32": [4, 4, 4, 2, 3, 4],
        "nsa_cu_seqlens_k": [0, 4, 8, 12, 14, 17, 21],
        "nsa_cu_seqlens_q": [0, 1, 2, 3, 4, 5, 6],
        "page_table_1": [
            [16, 17, 12, 13, 8, _, _],
            [16, 17, 12, 13, 8, 9, _],
            [16, 17, 12, 13, 8, 9, 14],
            [10, 11, _, _, _, _, _],
            [10, 11, 20, _, _, _, _],
            [10, 11, 20, 21, _, _, _],
        ],
        "real_page_table": [[8, 6, 4, _], [8, 6, 4, _], [8, 6, 4, 7], [5, _, _, _], [5, 10, _, _], [5, 10, _, _]],
    }
    assert_metadata(run(make_config(), make_batch(ForwardMode.TARGET_VERIFY, [2, 1], [4, 1]), in_graph), expected)


def test_target_verify_eager_width_counts_the_draft_tokens() -> None:
    """The longest request has 2 cached and 3 draft tokens: 5 columns."""
    metadata = run(make_config(), make_batch(ForwardMode.TARGET_VERIFY, [2, 1], [2, 1]), in_graph=False)
    assert metadata.max_seq_len_k == 5
    assert_table("page_table_1", metadata.page_table_1[2:3], [[16, 17, 12, 13, 8]], 5)
    assert_table("real_page_table", metadata.real_page_table[2:3], [[8, 6, 4]], 3)


def draft_extend_batch() -> ForwardBatch:
    """Accepts none, all three, one and two; the last is a padded row with fewer tokens than it accepts."""
    return make_batch(ForwardMode.DRAFT_EXTEND, [3, 1, 2, 0], [3, 6, 2, 1], accept=[0, 3, 1, 2])


def test_draft_extend_eager() -> None:
    """Exactly the live rows: 0+3+1+2 = 6."""
    expected: dict[str, Any] = {
        "page_size": 2,
        "max_seq_len_q": 1,
        "max_seq_len_k": 6,
        "cache_seqlens_int32": [3, 6, 2, 1],
        "cu_seqlens_k": [0, 3, 9, 11, 12],
        "cu_seqlens_q": [0, 1, 2, 3, 4, 5, 6],
        "seqlens_expanded": [4, 5, 6, 2, 0, 1],  # 6-3+1 .. 6; 2-1+1 = 2; 1-2+1 = 0, 1
        "nsa_cache_seqlens_int32": [4, 4, 4, 2, 0, 1],
        "nsa_cu_seqlens_k": [0, 4, 8, 12, 14, 14, 15],
        "nsa_cu_seqlens_q": [0, 1, 2, 3, 4, 5, 6],
        "page_table_1": [
            [10, 11, 20, 21, _, _],
            [10, 11, 20, 21, 30, _],
            [10, 11, 20, 21, 30, 31],
            [16, 17, _, _, _, _],
            [_, _, _, _, _, _],
            [0, _, _, _, _, _],
        ],
        "real_page_table": [[5, 10, _], [5, 10, 15], [5, 10, 15], [8, _, _], [_, _, _], [0, _, _]],
    }
    assert_metadata(run(make_config(), draft_extend_batch(), in_graph=False), expected)


def test_draft_extend_graph() -> None:
    """4*3 = 12 rows; the 6 behind the live ones have length 0 and nsa_cu_seqlens_k stays at 15."""
    dead_row: list[int | None] = [_] * 7
    dead_pages: list[int | None] = [_] * 4
    expected: dict[str, Any] = {
        "page_size": 2,
        "max_seq_len_q": 1,
        "max_seq_len_k": 7,
        "cache_seqlens_int32": [3, 6, 2, 1],
        "cu_seqlens_k": [0, 3, 9, 11, 12],
        "cu_seqlens_q": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
        "seqlens_expanded": [4, 5, 6, 2, 0, 1, 0, 0, 0, 0, 0, 0],
        "nsa_cache_seqlens_int32": [4, 4, 4, 2, 0, 1, 0, 0, 0, 0, 0, 0],
        "nsa_cu_seqlens_k": [0, 4, 8, 12, 14, 14, 15, 15, 15, 15, 15, 15, 15],
        "nsa_cu_seqlens_q": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
        "page_table_1": [
            [10, 11, 20, 21, _, _, _],
            [10, 11, 20, 21, 30, _, _],
            [10, 11, 20, 21, 30, 31, _],
            [16, 17, _, _, _, _, _],
            dead_row,
            [0, _, _, _, _, _, _],
            *[dead_row] * 6,
        ],
        "real_page_table": [
            [5, 10, _, _],
            [5, 10, 15, _],
            [5, 10, 15, _],
            [8, _, _, _],
            dead_pages,
            [0, _, _, _],
            *[dead_pages] * 6,
        ],
    }
    assert_metadata(run(make_config(), draft_extend_batch(), in_graph=True), expected)


@pytest.mark.parametrize(("in_graph", "rows"), [(False, 0), (True, 6)], ids=["layout=eager", "layout=graph"])
def test_draft_extend_accepts_nothing(in_graph: bool, rows: int) -> None:
    """T = 0: no live row, but two requests with KV."""
    metadata = run(make_config(), make_batch(ForwardMode.DRAFT_EXTEND, [1, 2], [5, 2], accept=[0, 0]), in_graph)
    width = 7 if in_graph else 5
    expected: dict[str, Any] = {
        "page_size": 2,
        "max_seq_len_q": 1,
        "max_seq_len_k": width,
        "cache_seqlens_int32": [5, 2],
        "cu_seqlens_k": [0, 5, 7],
        "cu_seqlens_q": [0, 1, 2, 3, 4, 5, 6][: rows + 1],
        "seqlens_expanded": [0, 0, 0, 0, 0, 0][:rows],
        "nsa_cache_seqlens_int32": [0, 0, 0, 0, 0, 0][:rows],
        "nsa_cu_seqlens_k": [0, 0, 0, 0, 0, 0, 0][: rows + 1],
        "nsa_cu_seqlens_q": [0, 1, 2, 3, 4, 5, 6][: rows + 1],
        "page_table_1": [[_] * width] * rows,
        "real_page_table": [[_] * (4 if in_graph else 3)] * rows,
    }
    assert_metadata(metadata, expected)


@LAYOUTS
def test_draft_extend_v2(in_graph: bool) -> None:
    """3 rows a request, already counted. The padded request (1 token, 3 rows) would see -1, 0, 1: clamped."""
    expected: dict[str, Any] = {
        "page_size": 2,
        "max_seq_len_q": 1,
        "max_seq_len_k": 7,
        "cache_seqlens_int32": [7, 1],
        "cu_seqlens_k": [0, 7, 8],
        "cu_seqlens_q": [0, 1, 2, 3, 4, 5, 6],
        "seqlens_expanded": [5, 6, 7, 0, 0, 1],  # 7-3+1 .. 7; max(1-3+1, 0), 1-1, 1
        "nsa_cache_seqlens_int32": [4, 4, 4, 0, 0, 1],
        "nsa_cu_seqlens_k": [0, 4, 8, 12, 12, 12, 13],
        "nsa_cu_seqlens_q": [0, 1, 2, 3, 4, 5, 6],
        "page_table_1": [
            [16, 17, 12, 13, 8, _, _],
            [16, 17, 12, 13, 8, 9, _],
            [16, 17, 12, 13, 8, 9, 14],
            [_] * 7,
            [_] * 7,
            [0, _, _, _, _, _, _],
        ],
        "real_page_table": [[8, 6, 4, _], [8, 6, 4, _], [8, 6, 4, 7], [_] * 4, [_] * 4, [0, _, _, _]],
    }
    assert_metadata(run(make_config(), make_batch(ForwardMode.DRAFT_EXTEND_V2, [2, 0], [7, 1]), in_graph), expected)


def test_draft_extend_v2_ignores_accept_length() -> None:
    batch = make_batch(ForwardMode.DRAFT_EXTEND_V2, [2], [7], accept=[1])
    assert_tensor("seqlens_expanded", run(make_config(), batch, False).seqlens_expanded, [5, 6, 7])


def test_extend_with_a_cached_prefix() -> None:
    """The contract's example: extend [3, 2], seq_lens [10, 4], so prefixes of 7 and 2."""
    expected: dict[str, Any] = {
        "page_size": 2,
        "max_seq_len_q": 3,  # max(3, 2)
        "max_seq_len_k": 10,
        "cache_seqlens_int32": [10, 4],
        "cu_seqlens_k": [0, 10, 14],
        "cu_seqlens_q": [0, 3, 5],
        "seqlens_expanded": [8, 9, 10, 3, 4],  # 10-3+1 .. 10, 4-2+1 .. 4
        "nsa_cache_seqlens_int32": [4, 4, 4, 3, 4],
        "nsa_cu_seqlens_k": [0, 4, 8, 12, 15, 19],
        "nsa_cu_seqlens_q": [0, 1, 2, 3, 4, 5],
        "page_table_1": [POOL[1], [16, 17, 12, 13, _, _, _, _, _, _]],  # one row a request
        "real_page_table": [[5, 10, 15, 20, 25], [8, 6, _, _, _]],
        "topk_indices_offset": [0, 0, 0, 10, 10],
        "indexer_k_start_end": ([0, 0, 0, 10, 10], [8, 9, 10, 13, 14]),  # 0+8 0+9 0+10 10+3 10+4
        "token_to_batch_idx": [0, 0, 0, 1, 1],
        "page_table_1_flattened": [10, 11, 20, 21, 30, 31, 40, 41, 50, 51, 16, 17, 12, 13],
    }
    batch = make_batch(ForwardMode.EXTEND, [1, 2], [10, 4], extend=[3, 2], prefix=[7, 2])
    assert_metadata(run(make_config(), batch, in_graph=False), expected)


def test_extend_without_a_prefix() -> None:
    """All tokens are new; nothing is flattened. The second request is the longer one."""
    expected: dict[str, Any] = {
        "page_size": 2,
        "max_seq_len_q": 3,
        "max_seq_len_k": 3,
        "cache_seqlens_int32": [2, 3],
        "cu_seqlens_k": [0, 2, 5],
        "cu_seqlens_q": [0, 2, 5],
        "seqlens_expanded": [1, 2, 1, 2, 3],
        "nsa_cache_seqlens_int32": [1, 2, 1, 2, 3],
        "nsa_cu_seqlens_k": [0, 1, 3, 4, 6, 9],
        "nsa_cu_seqlens_q": [0, 1, 2, 3, 4, 5],
        "page_table_1": [[10, 11, _], [16, 17, 12]],
        "real_page_table": [[5, _], [8, 6]],
        "topk_indices_offset": [0, 0, 2, 2, 2],
        "indexer_k_start_end": ([0, 0, 2, 2, 2], [1, 2, 3, 4, 5]),
        "token_to_batch_idx": [0, 0, 1, 1, 1],
    }
    batch = make_batch(ForwardMode.EXTEND, [1, 2], [2, 3], extend=[2, 3], prefix=[0, 0])
    assert_metadata(run(make_config(), batch, in_graph=False), expected)


def test_extend_where_only_the_last_request_has_a_prefix() -> None:
    """One cached prefix is enough: the KV of all requests is flattened, the two shared slots twice."""
    batch = make_batch(ForwardMode.EXTEND, [1, 3], [3, 4], extend=[3, 2], prefix=[0, 2])
    metadata = run(make_config(), batch, in_graph=False)
    assert_tensor("page_table_1_flattened", metadata.page_table_1_flattened, [10, 11, 20, 10, 11, 24, 25])


def test_extend_has_no_decode_schedule() -> None:
    config = make_config(paged_mqa_num_sms=2, flashmla_num_sm_parts=2)
    metadata = run(config, make_batch(ForwardMode.EXTEND, [1], [2], extend=[2], prefix=[0]), in_graph=False)
    assert [getattr(metadata, name) for name in SCHEDULES] == [None] * 3


def test_extend_has_no_graph() -> None:
    batch = make_batch(ForwardMode.EXTEND, [1], [2], extend=[2], prefix=[0])
    with pytest.raises(AssertionError, match="eagerly"):
        run(make_config(), batch, in_graph=True)


@LAYOUTS
@pytest.mark.parametrize("mode", SPECULATIVE, ids=lambda mode: f"mode={mode.name}")
def test_empty_batch(mode: ForwardMode, in_graph: bool) -> None:
    """Empty fields, cumulative ones [0]. The empty schedules are our own definition."""
    expected: dict[str, Any] = {
        "page_size": 2,
        "max_seq_len_q": 1,
        "max_seq_len_k": 7 if in_graph else 0,
        "cache_seqlens_int32": [],
        "cu_seqlens_k": [0],
        "cu_seqlens_q": [0],
        "seqlens_expanded": [],
        "nsa_cache_seqlens_int32": [],
        "nsa_cu_seqlens_k": [0],
        "nsa_cu_seqlens_q": [0],
        "page_table_1": [],
        "real_page_table": [],
        "paged_mqa_schedule_metadata": [[0, 0], [0, 0]],
        "flashmla_metadata": [[0, -1, 0, 0, 0, 0, 0]],
        "flashmla_num_splits": [0],
    }
    config = make_config(paged_mqa_num_sms=1, flashmla_num_sm_parts=1)
    assert_metadata(run(config, make_batch(mode, [], [], accept=[]), in_graph), expected)


def test_empty_extend() -> None:
    expected: dict[str, Any] = {
        "page_size": 2,
        "max_seq_len_q": 0,
        "max_seq_len_k": 0,
        "cache_seqlens_int32": [],
        "cu_seqlens_k": [0],
        "cu_seqlens_q": [0],
        "seqlens_expanded": [],
        "nsa_cache_seqlens_int32": [],
        "nsa_cu_seqlens_k": [0],
        "nsa_cu_seqlens_q": [0],
        "page_table_1": [],
        "real_page_table": [],
        "topk_indices_offset": [],
        "indexer_k_start_end": ([], []),
        "token_to_batch_idx": [],
    }
    batch = make_batch(ForwardMode.EXTEND, [], [], extend=[], prefix=[])
    assert_metadata(run(make_config(), batch, in_graph=False), expected)
