"""The backend as a serving engine drives it: eager calls, and buffers that a captured graph reads.

Method names and arguments are those with which an engine calls SGLang's NSA backend and its multi-step wrapper: the
older ones, and today's, ``init_forward_metadata_out_graph`` and ``init_forward_metadata_in_graph``.
"""

from __future__ import annotations

import dataclasses

import torch

from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata, SpecInfo


def copy_into(buffers: Metadata, values: Metadata) -> None:
    """Write ``values`` into the tensors of ``buffers``, which keep their addresses."""
    for field in dataclasses.fields(Metadata):
        buffer = getattr(buffers, field.name)
        if isinstance(buffer, torch.Tensor):
            buffer.copy_(getattr(values, field.name))


class SingleStepBackend:
    """Metadata of one draft step. ``forward_metadata`` is what attention reads next."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, speculative_step_id: int = 0) -> None:
        self.config = config
        self.req_to_token = req_to_token
        self.speculative_step_id = speculative_step_id
        self.forward_metadata: Metadata
        self._captured: dict[tuple[ForwardMode, int], Metadata] = {}

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self.forward_metadata = compute_metadata(
            self.config, self.req_to_token, forward_batch, self.speculative_step_id, in_graph=False
        )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Forget all captures. Buffers are allocated per capture, so the sizes are not needed here."""
        self._captured = {}

    def init_forward_metadata_capture_cuda_graph(
        self,
        bs: int,
        num_tokens: int,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None,
        forward_mode: ForwardMode,
        spec_info: SpecInfo | None,
    ) -> None:
        """Allocate the buffers that the graph of this mode and bucket will read from now on."""
        batch = ForwardBatch(forward_mode, bs, req_pool_indices[:bs], seq_lens[:bs], spec_info=spec_info)
        metadata = self._compute_in_graph(batch)
        self._captured[_graph_key(forward_mode, bs)] = metadata
        self.forward_metadata = metadata

    def init_forward_metadata_replay_cuda_graph(
        self,
        bs: int,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_sum: int | None,
        encoder_lens: torch.Tensor | None,
        forward_mode: ForwardMode,
        spec_info: SpecInfo | None,
        seq_lens_cpu: torch.Tensor | None,
        out_cache_loc: torch.Tensor | None = None,
    ) -> None:
        """Refresh, in place, the buffers of this mode and bucket before its graph is replayed."""
        batch = ForwardBatch(forward_mode, bs, req_pool_indices[:bs], seq_lens[:bs], spec_info=spec_info)
        buffers = self._captured[_graph_key(forward_mode, bs)]
        copy_into(buffers, self._compute_in_graph(batch))
        self.forward_metadata = buffers

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Today's name for both: bind at capture, refresh before a replay."""
        batch, bs = forward_batch, forward_batch.batch_size
        if in_capture:
            rows = bs * self.config.rows_per_request(batch.forward_mode)
            self.init_forward_metadata_capture_cuda_graph(
                bs, rows, batch.req_pool_indices, batch.seq_lens, batch.encoder_lens, batch.forward_mode,
                batch.spec_info,
            )  # fmt: skip
        else:
            self.init_forward_metadata_replay_cuda_graph(
                bs, batch.req_pool_indices, batch.seq_lens, batch.seq_lens_sum, batch.encoder_lens,
                batch.forward_mode, batch.spec_info, batch.seq_lens_cpu, batch.out_cache_loc,
            )  # fmt: skip

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int | None = None) -> None:
        """Nothing is prepared inside the graph."""

    def _compute_in_graph(self, batch: ForwardBatch) -> Metadata:
        return compute_metadata(self.config, self.req_to_token, batch, self.speculative_step_id, in_graph=True)


class MultiStepBackend:
    """N single-step backends, one per draft step, each with separate buffers."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        self.attn_backends = [
            SingleStepBackend(config, req_to_token, step) for step in range(config.speculative_num_steps)
        ]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        for backend in self.attn_backends:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_capture_cuda_graph(self, forward_batch: ForwardBatch) -> None:
        for backend in self.attn_backends:
            rows = backend.config.rows_per_request(forward_batch.forward_mode)
            backend.init_forward_metadata_capture_cuda_graph(
                forward_batch.batch_size,
                forward_batch.batch_size * rows,
                forward_batch.req_pool_indices,
                forward_batch.seq_lens,
                forward_batch.encoder_lens,
                forward_batch.forward_mode,
                forward_batch.spec_info,
            )

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata_replay_cuda_graph(
                bs,
                forward_batch.req_pool_indices,
                forward_batch.seq_lens,
                forward_batch.seq_lens_sum,
                forward_batch.encoder_lens,
                forward_batch.forward_mode,
                forward_batch.spec_info,
                forward_batch.seq_lens_cpu,
                forward_batch.out_cache_loc,
            )

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Today's name for both: bind at capture, refresh before a replay."""
        if in_capture:
            self.init_forward_metadata_capture_cuda_graph(forward_batch)
        else:
            self.init_forward_metadata_replay_cuda_graph(forward_batch, forward_batch.batch_size)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int | None = None) -> None:
        """Nothing is prepared inside the graph."""


def _graph_key(mode: ForwardMode, bs: int) -> tuple[ForwardMode, int]:
    """An idle rank replays the DECODE graph of its bucket."""
    return (ForwardMode.DECODE if mode.is_decode_or_idle else mode, bs)
