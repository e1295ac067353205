"""Layers that are wrong as a whole, each stage by itself being right, or wrong in form."""

from __future__ import annotations

import dataclasses

import torch

from nsa_oracle.reference.layer import SparseAttention
from nsa_oracle.reference.types import AttentionCaches, AttentionInputs, AttentionOutputs, Metadata


class WithoutStore(SparseAttention):
    """Writes nothing at all."""

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        pass


class StoresAfterwards(SparseAttention):
    """The keys of a pass are written when it has been computed."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = WithoutStore(self.config, self.attention).forward(inputs, caches, metadata)
        self.store_cache(caches, inputs)
        return outputs


class AttendsBesideStore(SparseAttention):
    """Attention reads the keys as they were before the pass; the indexer waits for its own."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        before = caches.kv.clone()
        outputs = super().forward(inputs, caches, metadata)
        out, lse = self.sparse_mla(inputs.q, before, outputs.indices)
        return AttentionOutputs(outputs.logits, outputs.indices, out, lse)


class LengthsOfRequests(SparseAttention):
    """Every draft token sees all of its request."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        requests, rows = len(metadata.cache_seqlens_int32), len(metadata.seqlens_expanded)
        if requests and rows % requests == 0:
            lengths = metadata.cache_seqlens_int32.repeat_interleave(rows // requests)
            metadata = dataclasses.replace(metadata, seqlens_expanded=lengths)
        return super().forward(inputs, caches, metadata)


class AttendsToLastSelection(SparseAttention):
    """Attention runs beside top-k and sees the slots of the call before."""

    last: torch.Tensor | None = None

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        seen = self.last if self.last is not None and self.last.shape == outputs.indices.shape else outputs.indices
        self.last = outputs.indices
        out, lse = self.sparse_mla(inputs.q, caches.kv, seen)
        return AttentionOutputs(outputs.logits, outputs.indices, out, lse)


class Raises(SparseAttention):
    """Attention raises."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("no kernel image\nis available")


class OutInFloat32(SparseAttention):
    """Outputs are not rounded."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        return out.float(), lse


class OneRowTooFew(SparseAttention):
    """The last row of the lse is missing."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        return out, lse[:-1]


class WritesBeyondOutput(SparseAttention):
    """One number is written behind a buffer of the layer's own."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().sparse_mla(q, kv_cache, indices)
        buffer = torch.empty_like(lse)
        buffer.as_strided((1,), (1,), buffer.storage_offset() + buffer.numel()).fill_(1)
        return out, lse
