"""Backends that are wrong about lengths."""

from __future__ import annotations

import dataclasses

import torch

from nsa_oracle.reference.lengths import cu_seqlens
from nsa_oracle.reference.types import ForwardBatch, ForwardMode, Metadata, SpecInfo
from tests.support.backends.seams import Step, backend_of, copy_all_but


@backend_of
class ReadsMirror(Step):
    """Trusts the host's copy of the lengths."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        assert batch.seq_lens_cpu is not None, "no host mirror to read"
        super().refresh(buffers, dataclasses.replace(batch, seq_lens=batch.seq_lens_cpu.to(batch.seq_lens.device)))


@backend_of
class VerifyForgetsDrafts(Step):
    """TARGET_VERIFY counts only what is committed."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if batch.forward_mode is ForwardMode.TARGET_VERIFY:
            metadata.cache_seqlens_int32.sub_(self.config.speculative_num_draft_tokens)


@backend_of
class WindowOffByOne(Step):
    """Each draft-extend token sees one token too few."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if batch.forward_mode is ForwardMode.DRAFT_EXTEND:
            expanded = metadata.seqlens_expanded
            expanded.sub_((expanded > 0).to(torch.int32))


class _WithAccept(Step):
    """Computes with other accept lengths than it was given."""

    def accepts(self, given: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        if batch.spec_info is not None:
            batch = dataclasses.replace(batch, spec_info=SpecInfo(self.accepts(batch.spec_info.accept_length)))
        super().refresh(buffers, batch)


@backend_of
class IgnoresAccept(_WithAccept):
    """Takes every draft for accepted."""

    def accepts(self, given: torch.Tensor) -> torch.Tensor:
        return torch.full_like(given, self.config.speculative_num_draft_tokens)


@backend_of
class ReusesLastAccept(_WithAccept):
    """Each replay uses the accept lengths of the replay before it."""

    last: torch.Tensor | None = None

    def accepts(self, given: torch.Tensor) -> torch.Tensor:
        used = given if self.last is None else self.last
        self.last = given.clone()
        return used


@backend_of
class SkipsPaddingRows(Step):
    """Writes only the requests that look real, and leaves padding as the last replay left it."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        values = self._compute_in_graph(batch)
        real = int((batch.seq_lens > 1).sum())
        copy_all_but(("cache_seqlens_int32",), buffers, values)
        buffers.cache_seqlens_int32[:real] = values.cache_seqlens_int32[:real]


@backend_of
class NegativeLengths(Step):
    """Does not clamp the window of a request shorter than its drafts."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if batch.forward_mode is ForwardMode.DRAFT_EXTEND_V2:
            drafts = self.config.speculative_num_draft_tokens
            ends = metadata.cache_seqlens_int32[:, None]
            window = torch.arange(1 - drafts, 1, dtype=torch.int32, device=ends.device)
            metadata.seqlens_expanded.copy_((ends + window).flatten())


@backend_of
class KeepsTail(Step):
    """Leaves rows beyond the accepted tokens as the last replay left them."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        values = self._compute_in_graph(batch)
        copy_all_but(("seqlens_expanded",), buffers, values)
        live = int((values.seqlens_expanded > 0).sum())
        buffers.seqlens_expanded[:live] = values.seqlens_expanded[:live]


@backend_of
class TailFallsToZero(Step):
    """The cumulative lengths restart at 0 behind the live rows."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.nsa_cu_seqlens_k[1:][metadata.seqlens_expanded == 0] = 0


@backend_of
class ForgetsTopK(Step):
    """Does not limit what attention reads to the indexer's choice."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        metadata.nsa_cache_seqlens_int32.copy_(metadata.seqlens_expanded)


@backend_of
class CuSeqlensAreLengths(Step):
    """Hands out lengths where bounds are asked for, shifted by the leading 0."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        bounds = cu_seqlens(metadata.cache_seqlens_int32)
        bounds[1:] = metadata.cache_seqlens_int32
        metadata.cu_seqlens_k = bounds
