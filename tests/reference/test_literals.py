"""Every metadata field of every mode against values worked out by hand from docs/contract.md.

``_`` marks a dead cell of a page table: unspecified, not compared. The arithmetic stands beside each value.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from nsa_oracle.reference import lengths, page_table
from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata, SpecInfo, StepSemantics

_: None = None  # a dead cell

# Slots of four pooled requests, pages of 2 tokens: slot = page * 2 + offset.
POOL = [
    [0, 1, 0, 1, 0, 1, 0, 1, 0, 1],  # the dummy page, again and again
    [10, 11, 20, 21, 30, 31, 40, 41, 50, 51],  # pages 5 10 15 20 25
    [16, 17, 12, 13, 8, 9, 14, 15, 2, 3],  # pages 8 6 4 7 1
    [10, 11, 24, 25, 26, 27, 28, 29, 32, 33],  # pages 5 12 13 14 16: the first is shared with the request above
]
TABLES = ("page_table_1", "real_page_table")
SCALARS = ("page_size", "max_seq_len_q", "max_seq_len_k")
EXTEND_ONLY = ("topk_indices_offset", "indexer_k_start_end", "token_to_batch_idx", "page_table_1_flattened")
SCHEDULES = ("paged_mqa_schedule_metadata", "flashmla_metadata", "flashmla_num_splits")
LAYOUTS = pytest.mark.parametrize("in_graph", [False, True], ids=["layout=eager", "layout=graph"])
SPECULATIVE = [mode for mode in ForwardMode if mode is not ForwardMode.EXTEND]


def make_config(**changes: Any) -> BackendConfig:
    """Two draft steps, 3 draft tokens, pages of 2, 4 keys kept, graph tables 7 wide: 7 is no multiple of 2."""
    config = BackendConfig(
        page_size=2, max_context_len=7, index_topk=4, speculative_num_steps=2, speculative_num_draft_tokens=3
    )
    return dataclasses.replace(config, **changes)


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_batch(mode: ForwardMode, pool_rows: list[int], seq_lens: list[int], **fields: Any) -> ForwardBatch:
    """A batch from plain lists: ``accept``, ``extend`` and ``prefix`` become the tensors of the same meaning."""
    accept, extend, prefix = (fields.pop(name, None) for name in ("accept", "extend", "prefix"))
    return ForwardBatch(
        mode,
        len(seq_lens),
        int32(pool_rows),
        int32(seq_lens),
        spec_info=None if accept is None else SpecInfo(int32(accept)),
        extend_seq_lens=None if extend is None else int32(extend),
        extend_prefix_lens=None if prefix is None else int32(prefix),
        **fields,
    )


def assert_tensor(name: str, got: object, expected: list[Any]) -> None:
    assert isinstance(got, torch.Tensor), f"{name} is {got}"
    assert got.dtype == torch.int32, f"{name} is {got.dtype}"
    assert got.tolist() == expected, name


def assert_table(name: str, got: torch.Tensor, expected: list[list[int | None]], width: int) -> None:
    assert got.dtype == torch.int32, f"{name} is {got.dtype}"
    assert tuple(got.shape) == (len(expected), width), name
    for row, (got_row, expected_row) in enumerate(zip(got.tolist(), expected, strict=True)):
        for column, (value, wanted) in enumerate(zip(got_row, expected_row, strict=True)):
            assert wanted is None or value == wanted, f"{name}[{row}, {column}] is {value}, expected {wanted}"


def assert_metadata(got: Metadata, expected: dict[str, Any]) -> None:
    """``expected`` names every field; the fields of EXTEND and the schedules may be left out, they are None then."""
    names = {field.name for field in dataclasses.fields(Metadata)}
    assert names - set(EXTEND_ONLY) - set(SCHEDULES) <= set(expected) <= names
    width = expected["max_seq_len_k"]
    for name in sorted(names):
        value, wanted = getattr(got, name), expected.get(name)
        if wanted is None:
            assert value is None, f"{name} is {value}"
        elif name in SCALARS:
            assert type(value) is int, f"{name} is {value!r}"
            assert value == wanted, name
        elif name in TABLES:
            assert_table(name, value, wanted, width if name == "page_table_1" else -(-width // got.page_size))
        elif name == "flashmla_metadata":  # the eighth word is padding
            assert tuple(value.shape) == (len(wanted), 8)
            assert_tensor(name, value[:, :7], wanted)
        elif name == "indexer_k_start_end":
            assert len(value) == 2
            for part, wanted_part in zip(value, wanted, strict=True):
                assert_tensor(name, part, wanted_part)
        else:
            assert_tensor(name, value, wanted)


def run(config: BackendConfig, batch: ForwardBatch, in_graph: bool, step: int = 0) -> Metadata:
    return compute_metadata(config, int32(POOL), batch, step, in_graph)


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
