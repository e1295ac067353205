"""Backends that read or write memory that they should leave alone."""

from __future__ import annotations

import torch

from nsa_oracle.reference.multi_step import MultiStepBackend
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, Metadata
from tests.support.backends.seams import Step, backend_of


@backend_of
class WritesOneRowBeyond(Step):
    """The last row is written once more, behind the table."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        table = buffers.page_table_1
        rows, width = table.shape
        beyond = table.as_strided((1, width), (width, 1), table.storage_offset() + rows * width)
        beyond[:, :32] = 7


class WritesBesideItsScratch(MultiStepBackend):
    """A tensor of its own, which is no field, is written once more behind its end."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        super().__init__(config, req_to_token)
        self.scratch = {"lengths": [torch.zeros(8, dtype=torch.int32, device=req_to_token.device)]}

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        (lengths,) = self.scratch["lengths"]
        lengths.as_strided((4,), (1,), lengths.storage_offset() + 8).fill_(1)


@backend_of
class WritesBesideAFieldEagerly(Step):
    """A field of an eager call is written beyond its end."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        bounds = metadata.cu_seqlens_k
        bounds.as_strided((4,), (1,), bounds.storage_offset() + len(bounds)).fill_(1)


@backend_of
class ReadsBehindSeqLens(Step):
    """Takes the length of the last request from one request further on than the engine has memory for."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        memory, stride = batch.seq_lens.untyped_storage(), batch.seq_lens.stride(0)
        whole = torch.empty(0, dtype=batch.seq_lens.dtype, device=batch.seq_lens.device).set_(memory)
        capacity = self.req_to_token.shape[0]
        buffers.cache_seqlens_int32[-1:].copy_(whole[batch.seq_lens.storage_offset() + capacity * stride])


@backend_of
class ReadsBehindThePool(Step):
    """Takes the first slot of the last row from one row further on than there are."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        pool = self.req_to_token
        behind = pool.storage_offset() + pool.shape[0] * pool.stride(0)
        whole = torch.empty(0, dtype=pool.dtype, device=pool.device).set_(pool.untyped_storage())
        buffers.page_table_1[-1, :1].copy_(whole[behind])


@backend_of
class WritesReqToToken(Step):
    """Parks a value in a cell of the pool that no request uses."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        self.req_to_token[-1, -1] = 7


@backend_of
class WritesBesideReqToToken(Step):
    """Writes behind the columns of the pool that it was given."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        pool = self.req_to_token
        pool.as_strided((1,), (1,), pool.storage_offset() + pool.shape[1]).fill_(7)


class WritesTheMirror(MultiStepBackend):
    """Adds the drafts to the host's copy of the lengths, which is the engine's."""

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        super().init_forward_metadata_replay_cuda_graph(forward_batch, bs)
        if forward_batch.seq_lens_cpu is not None:
            forward_batch.seq_lens_cpu.add_(1)


class WritesReqToTokenWhenBuilt(MultiStepBackend):
    """Clears the pool as it is built."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        super().__init__(config, req_to_token)
        req_to_token.zero_()


class WritesSeqLens(MultiStepBackend):
    """When all is prepared, adds the drafts to the engine's own lengths."""

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        super().init_forward_metadata_replay_cuda_graph(forward_batch, bs)
        forward_batch.seq_lens.add_(1)
