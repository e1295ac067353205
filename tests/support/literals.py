"""Batches from plain lists, and metadata compared with values worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata, SpecInfo

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
