"""Layers that are wrong about rows of the inputs behind those of the metadata."""

from __future__ import annotations

import dataclasses

import torch

from nsa_oracle.reference.layer import SparseAttention
from nsa_oracle.reference.types import AttentionCaches, AttentionInputs, AttentionOutputs, Metadata


class LeavesOutExtraRows(SparseAttention):
    """The outputs have only the rows of the metadata."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        rows = len(metadata.seqlens_expanded)
        kept = AttentionInputs(**{name: tensor[:rows] for name, tensor in vars(inputs).items()})
        return super().forward(kept, caches, metadata)


class AddsNothingOfAllQueries(SparseAttention):
    """The outputs of all rows contain 0 times the queries of all rows."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        return dataclasses.replace(outputs, out=outputs.out + 0 * inputs.q.sum())


class AddsTheLargestExtraKey(SparseAttention):
    """The outputs depend on the keys of extra rows, by a maximum that ignores NaN as those of GPUs do."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        outputs = super().forward(inputs, caches, metadata)
        extra = inputs.k[len(metadata.seqlens_expanded) :].flatten().float().nan_to_num(nan=-1)
        largest = torch.cat([extra, extra.new_full((1,), -1)]).amax()
        return dataclasses.replace(outputs, out=outputs.out + (largest > 0))


class StoresFromTheEnd(SparseAttention):
    """Slot -1 is the last one."""

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        slots = torch.where(inputs.out_cache_loc < 0, len(caches.kv) - 1, inputs.out_cache_loc)
        super().store_cache(caches, dataclasses.replace(inputs, out_cache_loc=slots))
