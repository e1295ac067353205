"""Backends that prepare a part of the metadata in the captured graph; all but two of them are wrong there."""

from __future__ import annotations

import torch

from nsa_oracle.reference.types import ForwardBatch, Metadata
from tests.support.backends.seams import InGraph, InGraphBackend


class PreparesInGraph(InGraphBackend):
    """Clean: device to device, at fixed addresses."""

    step = InGraph


class _Syncs(InGraph):
    def lengths(self, batch: ForwardBatch) -> torch.Tensor:
        return batch.seq_lens.clamp(max=batch.seq_lens.max().item())


class SyncsInCapture(InGraphBackend):
    """Asks the device for a number while it is being captured."""

    step = _Syncs


class _Freezes(InGraph):
    def init_forward_metadata_capture_cuda_graph(self, *args: object, **kwargs: object) -> None:
        super().init_forward_metadata_capture_cuda_graph(*args, **kwargs)  # type: ignore[arg-type]
        self.longest = int(self.forward_metadata.cache_seqlens_int32.max())

    def lengths(self, batch: ForwardBatch) -> torch.Tensor:
        return batch.seq_lens.clamp(max=self.longest)


class FreezesLength(InGraphBackend):
    """Freezes the longest length of the capture into the graph."""

    step = _Freezes


class _FreezesLimit(_Freezes):
    def lengths(self, batch: ForwardBatch) -> torch.Tensor:
        return batch.seq_lens.clamp(max=self.longest + 100)


class FreezesLimit(InGraphBackend):
    """Freezes a limit above the longest length of the capture: replays of moderate lengths are right."""

    step = _FreezesLimit


class _ClearsByTheMirror(InGraph):
    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        self.workspace = torch.zeros_like(self.req_to_token[0])

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        super().init_forward_metadata_in_graph(forward_batch, bs)
        assert forward_batch.seq_lens_cpu is not None
        self.workspace[: int(forward_batch.seq_lens_cpu.max())].zero_()


class ClearsByTheMirror(InGraphBackend):
    """Clears as much of a workspace as the host's lengths say at capture; no output depends on it."""

    step = _ClearsByTheMirror


class _ChoosesByBucket(InGraph):
    def lengths(self, batch: ForwardBatch) -> torch.Tensor:
        in_two = batch.batch_size > 1  # as an implementation chooses a tile or a number of splits
        return torch.cat([super().lengths(batch)[:1], super().lengths(batch)[1:]]) if in_two else super().lengths(batch)


class ChoosesByBucket(InGraphBackend):
    """Clean: what is launched depends on the bucket, and on nothing else."""

    step = _ChoosesByBucket


class _Accumulates(InGraph):
    """Every preparation starts the lengths at 0; the graph adds to what is there."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        buffers.cache_seqlens_int32.zero_()

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        self.forward_metadata.cache_seqlens_int32.add_(self.lengths(forward_batch))


class AccumulatesInGraph(InGraphBackend):
    """Right once per preparation: a second replay adds the lengths to themselves."""

    step = _Accumulates


class _KeepsFirst(InGraph):
    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        lengths = self.forward_metadata.cache_seqlens_int32
        remembered = torch.empty_like(lengths)
        lengths.copy_(torch.where(remembered == -1, self.lengths(forward_batch).to(torch.int32), remembered))
        remembered.copy_(lengths)


class KeepsTheFirstLengths(InGraphBackend):
    """Remembers the lengths of its first replay in memory that the graph made and nobody holds."""

    step = _KeepsFirst


class _DropsScratch(InGraph):
    def init_forward_metadata_capture_cuda_graph(self, *args: object, **kwargs: object) -> None:
        super().init_forward_metadata_capture_cuda_graph(*args, **kwargs)  # type: ignore[arg-type]
        self.scratch = torch.empty_like(self.forward_metadata.cache_seqlens_int32)

    def lengths(self, batch: ForwardBatch) -> torch.Tensor:
        return self.scratch.copy_(super().lengths(batch))


class DropsScratch(InGraphBackend):
    """Each capture makes scratch memory of its own and forgets that of the capture before."""

    step = _DropsScratch
