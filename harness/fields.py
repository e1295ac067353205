"""The metadata fields that are compared, and the meaning of their axes in reports."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nsa_oracle.reference.types import ForwardMode, Metadata


class Axis(enum.Enum):
    """The meaning of a position along an axis. Reports show the values."""

    REQUEST = "request"
    REQUEST_BOUND = "bound before request"  # entry i of a running sum: the total of the requests before i
    ROW = "row"  # one query token
    ROW_BOUND = "bound before row"
    TOKEN_COLUMN = "column"  # a cache position; live below the row's KV length
    PAGE_COLUMN = "page column"
    MULTIPROCESSOR = "multiprocessor"
    PART = "part"
    ENTRY = "entry"
    FLAT = "position"


@dataclass(frozen=True)
class Field:
    """A tensor of the metadata. dead_entry: a column of dead cells. extend_axes: axes in EXTEND, if they differ."""

    name: str
    axes: tuple[Axis, ...]
    dead_entry: int | None = None
    extend_axes: tuple[Axis, ...] = ()


FIELDS = (
    Field("cache_seqlens_int32", (Axis.REQUEST,)),
    Field("cu_seqlens_q", (Axis.ROW_BOUND,), extend_axes=(Axis.REQUEST_BOUND,)),
    Field("cu_seqlens_k", (Axis.REQUEST_BOUND,)),
    Field("seqlens_expanded", (Axis.ROW,)),
    Field("nsa_cache_seqlens_int32", (Axis.ROW,)),
    Field("nsa_cu_seqlens_q", (Axis.ROW_BOUND,)),
    Field("nsa_cu_seqlens_k", (Axis.ROW_BOUND,)),
    Field("page_table_1", (Axis.ROW, Axis.TOKEN_COLUMN), extend_axes=(Axis.REQUEST, Axis.TOKEN_COLUMN)),
    Field("real_page_table", (Axis.ROW, Axis.PAGE_COLUMN), extend_axes=(Axis.REQUEST, Axis.PAGE_COLUMN)),
    Field("paged_mqa_schedule_metadata", (Axis.MULTIPROCESSOR, Axis.ENTRY)),
    Field("flashmla_metadata", (Axis.PART, Axis.ENTRY), dead_entry=7),
    Field("flashmla_num_splits", (Axis.ROW_BOUND,)),
    Field("topk_indices_offset", (Axis.ROW,)),
    Field("indexer_k_start", (Axis.ROW,)),
    Field("indexer_k_end", (Axis.ROW,)),
    Field("token_to_batch_idx", (Axis.ROW,)),
    Field("page_table_1_flattened", (Axis.FLAT,)),
)
_ONLY_IN_EXTEND = (
    "topk_indices_offset", "indexer_k_start", "indexer_k_end", "token_to_batch_idx", "page_table_1_flattened"
)  # fmt: skip
_NEVER_IN_EXTEND = ("paged_mqa_schedule_metadata", "flashmla_metadata", "flashmla_num_splits")
HOST_SCALARS = ("page_size", "max_seq_len_q", "max_seq_len_k")


def may_be_expected(name: str, mode: ForwardMode) -> bool:
    """Whether the contract has the tensor ``name`` in ``mode``, with some configuration or batch."""
    if mode is ForwardMode.EXTEND:
        return name not in (*_NEVER_IN_EXTEND, *HOST_SCALARS)
    return name not in (*_ONLY_IN_EXTEND, *HOST_SCALARS)


def held(metadata: Metadata, own: Sequence[str] = ()) -> dict[str, object]:
    """The value of each field of ``metadata``, by field name. A backend may give values of any type.

    own: names of fields that the contract does not have.
    """
    start_end: object = getattr(metadata, "indexer_k_start_end", None)
    pair = start_end if isinstance(start_end, tuple | list) and len(start_end) == 2 else (start_end, start_end)
    halves = dict(zip(("indexer_k_start", "indexer_k_end"), pair, strict=True))
    names = (*(field.name for field in FIELDS), *own)
    return {name: halves.get(name, getattr(metadata, name, None)) for name in names}


def tensors(metadata: Metadata, own: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """The fields of ``metadata`` that are tensors, by field name."""
    return {name: value for name, value in held(metadata, own).items() if isinstance(value, torch.Tensor)}
