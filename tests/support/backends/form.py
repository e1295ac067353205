"""Backends whose metadata has the wrong form: dtypes, shapes, and which fields there are."""

from __future__ import annotations

import torch

from nsa_oracle.reference.types import ForwardBatch, Metadata
from tests.support.backends.seams import Step, backend_of


@backend_of
class Int64Lengths(Step):
    """Hands out 64-bit lengths."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.cache_seqlens_int32 = metadata.cache_seqlens_int32.to(torch.int64)


@backend_of
class OneRowTooMany(Step):
    """The per-token lengths have a spare row."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.seqlens_expanded = torch.cat([metadata.seqlens_expanded, metadata.seqlens_expanded.new_zeros(1)])


@backend_of
class LacksQueryBounds(Step):
    """Never computes one of the fields."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.nsa_cu_seqlens_q = None  # type: ignore[assignment]


@backend_of
class LacksPageTable(Step):
    """Never computes the page table."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.page_table_1 = None  # type: ignore[assignment]


@backend_of
class LacksExpandedLengths(Step):
    """Never computes the length of each query token."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.seqlens_expanded = None  # type: ignore[assignment]


@backend_of
class OffersPrefillField(Step):
    """Offers a field that only prefill has."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.topk_indices_offset = torch.zeros_like(metadata.seqlens_expanded)


@backend_of
class WrongHostScalar(Step):
    """Reports the queries of a whole verify as the longest query."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.max_seq_len_q = self.config.speculative_num_draft_tokens
