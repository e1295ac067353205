"""What is right where vLLM's metadata differs from the contract: padding of length 0, requests with several rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness.fields import Field
from nsa_oracle.harness.subjects.declarations import Call
from nsa_oracle.reference import schedules
from nsa_oracle.reference.types import Metadata


@dataclass(frozen=True)
class Convention:
    """What a version makes the metadata for on one kind of GPU.

    family: of the GPU's capability. native: numbers of query tokens of a request for which DeepGEMM has a kernel; None:
    any. With others every query token is a request of its own to the indexer, in DECODE if flattens_one. pairs: numbers
    for which the kernel runs on pairs of multiprocessors. is_varlen: whether a kernel takes any numbers in one batch.
    most_decoded: query tokens of a request that attention's builder still counts among decodes, with 64 heads; None: as
    many as a verification has. is_verified_first: whether requests with so many come first, and not the shortest.
    """

    family: int
    native: tuple[int, ...] | None
    pairs: tuple[int, ...] = ()
    is_varlen: bool = False
    flattens_one: bool = True
    most_decoded: int | None = 256
    is_verified_first: bool = True

    def order(self, query_lens: Sequence[int], drafts: int) -> list[int]:
        """The places of the requests in the order that vLLM gives them."""
        key = lambda i: (self.is_verified_first and query_lens[i] != drafts, query_lens[i])  # noqa: E731
        return sorted(range(len(query_lens)), key=key)

    def is_flat(self, call: Call) -> bool:
        """Whether every query token is a request of its own to the indexer."""
        return self._flattens(call) and (self.flattens_one or _rows(call) > 1)

    def blocks(self, expected: Metadata, call: Call) -> torch.Tensor:
        """The rows of a request share one row of the table, unless they are requests of their own."""
        return expected.real_page_table if self.is_flat(call) else expected.real_page_table[:: _rows(call)]

    def schedule(self, expected: Metadata, call: Call) -> torch.Tensor:
        """Padding has no work, and there may be half as many places as multiprocessors."""
        places = call.config.paged_mqa_num_sms // (2 if _rows(call) in self.pairs else 1)
        return schedules.paged_mqa_schedule(lengths(expected, call), places)

    def tokens_of_entries(self, expected: Metadata, call: Call) -> torch.Tensor:
        """Query tokens of what the indexer counts as a request."""
        return ones(expected, call) if self.is_flat(call) else tokens_of_requests(expected, call)

    def requests_of_kv(self, expected: Metadata, call: Call) -> torch.Tensor:
        """The request of each token of the concatenated KV; -1 for what the indexer counts among decodes."""
        lens, most = call.batch.extend_lens, call.config.speculative_num_draft_tokens
        decodes = [n <= most for n in lens] if self._flattens(call) else self._alike(call, most)
        owners = torch.tensor([-1 if decoded else i for i, decoded in enumerate(decodes)], dtype=torch.int32)
        return torch.repeat_interleave(owners, expected.cache_seqlens_int32)

    def offsets_of_prefills(self, expected: Metadata, call: Call) -> torch.Tensor:
        """Where a request's KV starts; -1 in rows that attention's builder counts among decodes, which read pages."""
        assert expected.topk_indices_offset is not None
        most = self.most_decoded or call.config.speculative_num_draft_tokens
        decodes = torch.tensor(self._alike(call, most)).repeat_interleave(torch.tensor(call.batch.extend_lens))
        return torch.where(decodes, -1, expected.topk_indices_offset)

    def _flattens(self, call: Call) -> bool:
        return self.native is not None and call.config.speculative_num_draft_tokens not in self.native

    def _alike(self, call: Call, most: int) -> list[bool]:
        """Which requests count as decodes where these must have as many query tokens each as the first of the batch."""
        lens = call.batch.extend_lens
        first = lens[self.order(lens, call.config.speculative_num_draft_tokens)[0]]
        return [n == first <= most for n in lens]


HOPPER = Convention(90, native=(1, 2, 4), pairs=(4,))
BLACKWELL = Convention(100, native=(), is_varlen=True)
OLDER_HOPPER = Convention(
    90, native=(1, 2), flattens_one=False, most_decoded=None, is_verified_first=False
)  # up to 0.24, at least


def _rows(call: Call) -> int:
    return call.config.rows_per_request(call.batch.mode)


def _without_padding(values: torch.Tensor, call: Call, per_request: int) -> torch.Tensor:
    found = values.clone()
    found[call.raw_bs * per_request :] = 0
    return found


def lengths(expected: Metadata, call: Call) -> torch.Tensor:
    """Rows of padding have length 0."""
    return _without_padding(expected.seqlens_expanded, call, _rows(call))


def lengths_of_rows(expected: Metadata, call: Call) -> torch.Tensor:
    """Those of the contract."""
    return expected.seqlens_expanded


def lengths_of_requests(expected: Metadata, call: Call) -> torch.Tensor:
    """Padding has length 0."""
    return _without_padding(expected.cache_seqlens_int32, call, 1)


def of_padding_requests(call: Call, field: Field, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Cells of padding in a field with one row or more for each request."""
    mask = np.zeros(shape, dtype=np.bool_)
    mask[call.raw_bs * shape[0] // call.batch.size :] = True
    return mask


def before_first_token(call: Call, field: Field, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Rows of requests that are shorter than their query tokens, which vLLM never has."""
    mask, rows = np.zeros(shape, dtype=np.bool_), _rows(call)
    for i, length in enumerate(call.batch.seq_lens[: call.raw_bs]):
        mask[i * rows : i * rows + max(0, rows - length)] = True
    return mask


def several_rows(call: Call, field: Field, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """All cells, of requests with several rows."""
    return np.full(shape, _rows(call) > 1)


def requests_of_rows(expected: Metadata, call: Call) -> torch.Tensor:
    """Rows of padding name request 0."""
    rows = torch.repeat_interleave(torch.arange(call.batch.size, dtype=torch.int32), _rows(call))
    return _without_padding(rows, call, _rows(call))


def requests_of_entries(expected: Metadata, call: Call) -> torch.Tensor:
    """The request of each row; rows of padding get numbers of their own, behind those of the requests."""
    rows = torch.repeat_interleave(torch.arange(call.raw_bs, dtype=torch.int32), _rows(call))
    padding = torch.arange((call.batch.size - call.raw_bs) * _rows(call), dtype=torch.int32) + call.batch.size
    return torch.cat([rows, padding])


def ones(expected: Metadata, call: Call) -> torch.Tensor:
    """One query token for each row."""
    return torch.ones_like(expected.seqlens_expanded)


def tokens_of_requests(expected: Metadata, call: Call) -> torch.Tensor:
    """Query tokens of each request; padding has none."""
    return _without_padding(torch.full((call.batch.size,), _rows(call), dtype=torch.int32), call, 1)
