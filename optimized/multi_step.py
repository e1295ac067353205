"""The backend as a serving engine drives it: eager calls, and buffers that a captured graph reads.

Methods and arguments are those of ``reference.multi_step``. ``init_forward_metadata_in_graph`` works with either set.
"""

from __future__ import annotations

import dataclasses

import torch

from nsa_oracle.optimized import buffers, metadata
from nsa_oracle.optimized.buffers import GraphBuffers, StepBuffers
from nsa_oracle.optimized.optimizations import Optimizations
from nsa_oracle.optimized.page_table import StridedIndices
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata, SpecInfo

_ALL_OFF = Optimizations()


class SingleStepBackend:
    """Metadata of one draft step. ``forward_metadata`` is what attention reads next.

    Inside a ``MultiStepBackend`` the graph buffers belong to all steps together (``_buffers`` is shared and this step
    is its entry ``_index``); on its own a backend has buffers of one step.
    """

    def __init__(
        self,
        config: BackendConfig,
        req_to_token: torch.Tensor,
        speculative_step_id: int = 0,
        optimizations: Optimizations = _ALL_OFF,
    ) -> None:
        optimizations.check(config)
        if req_to_token.dtype is not torch.int32 or req_to_token.stride(1) != 1:
            raise ValueError("req_to_token must be int32 with adjacent columns")
        self.config = config
        self.req_to_token = req_to_token
        self.speculative_step_id = speculative_step_id
        self.optimizations = optimizations
        self.forward_metadata: Metadata
        self._indices = StridedIndices(config, optimizations)
        self._buffers: GraphBuffers
        self._index = 0
        self._captured: dict[tuple[ForwardMode, int], StepBuffers] = {}

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Metadata outside any graph, exactly as large as the batch. Synchronises once to read the batch's sizes."""
        self.forward_metadata = self.compute_eagerly(forward_batch, 1).metadata[0]

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Forget all captures and allocate page tables for the largest batch."""
        self.use_buffers(GraphBuffers(self.config, self.req_to_token.device, 1, max_bs, max_num_tokens), 0)

    def use_buffers(self, graph_buffers: GraphBuffers, index: int) -> None:
        """Forget all captures; from now on this step is entry ``index`` of ``graph_buffers``."""
        self._buffers = graph_buffers
        self._index = index
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
        """Bind ``forward_metadata`` to the buffers that the graph of this mode and bucket will read from now on."""
        self.bind(forward_mode, bs)
        self._refresh(ForwardBatch(forward_mode, bs, req_pool_indices, seq_lens, spec_info=spec_info))

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
        """Refresh, in place, the buffers of this mode and bucket, unless the graph does so itself."""
        self.select(forward_mode, bs)
        if not self.optimizations.in_graph:
            self._refresh(ForwardBatch(forward_mode, bs, req_pool_indices, seq_lens, spec_info=spec_info))

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Today's name for both: bind at capture, refresh before a replay unless the graph does so itself."""
        mode, bs = forward_batch.forward_mode, forward_batch.batch_size
        if in_capture:
            self.bind(mode, bs)
        else:
            self.select(mode, bs)
        if in_capture or not self.optimizations.in_graph:
            self._refresh(forward_batch)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int | None = None) -> None:
        """Record the preparation. Called inside capture, before anything reads the metadata."""
        bs = forward_batch.batch_size if bs is None else bs
        if self.optimizations.in_graph:
            target = self.select(forward_batch.forward_mode, bs)
            metadata.fill(self.config, self.req_to_token, forward_batch, self.speculative_step_id, target)

    def bind(self, mode: ForwardMode, bs: int) -> None:
        """Take this step's buffers of ``mode`` and ``bs``, made on first use, and make them ``forward_metadata``."""
        self._captured[buffers.graph_key(mode, bs)] = self._buffers.capture(mode, bs).step(self._index)
        self.select(mode, bs)

    def select(self, mode: ForwardMode, bs: int) -> StepBuffers:
        """The buffers of a captured bucket, made ``forward_metadata``. Raises KeyError if not captured."""
        target = self._captured[buffers.graph_key(mode, bs)]
        self.forward_metadata = target.metadata[0]
        return target

    def compute_eagerly(self, batch: ForwardBatch, num_steps: int) -> StepBuffers:
        """Fresh metadata of this step and the ``num_steps - 1`` after it; one buffer if they alias."""
        config, options, step = self.config, self.optimizations, self.speculative_step_id
        distinct = 1 if options.aliased_steps else num_steps
        if options.one_launch:
            return metadata.fill_eagerly(config, self.req_to_token, batch, step, num_steps, distinct)
        advances = config.step_advance(batch.forward_mode, 0) > 0
        computed = self.compute(batch, num_steps if advances else 1, in_graph=False)
        if distinct == 1:
            return computed
        widths = [step_metadata.max_seq_len_k for step_metadata in computed.metadata]
        target = buffers.allocate(
            config,
            computed.layout,
            widths if advances else widths * distinct,
            batch.seq_lens.device,
            None if computed.flattened is None else computed.flattened.shape[1],
            computed.metadata[0].max_seq_len_q,
        )
        metadata.copy_into(target, computed, options.batched_copy)
        return target

    def compute(self, batch: ForwardBatch, num_steps: int, in_graph: bool) -> StepBuffers:
        """Metadata of this step and the ``num_steps - 1`` after it, composed from the parts."""
        return metadata.compute_metadata(
            self.config, self.req_to_token, batch, self.speculative_step_id, num_steps, in_graph, self.optimizations,
            self._indices,
        )  # fmt: skip

    def refresh(self, batch: ForwardBatch, target: StepBuffers) -> None:
        """Refresh ``target``, whose first step is this one, in place."""
        if self.optimizations.one_launch:
            metadata.fill(self.config, self.req_to_token, batch, self.speculative_step_id, target)
            return
        advances = self.config.step_advance(batch.forward_mode, 0) > 0
        computed = self.compute(batch, target.num_steps if advances else 1, in_graph=True)
        metadata.copy_into(target, computed, self.optimizations.batched_copy)

    def _refresh(self, batch: ForwardBatch) -> None:
        self.refresh(batch, self._captured[buffers.graph_key(batch.forward_mode, batch.batch_size)])


class MultiStepBackend:
    """N single-step backends, one per draft step. Their graph buffers are stacked, so that one launch can fill all."""

    def __init__(
        self, config: BackendConfig, req_to_token: torch.Tensor, optimizations: Optimizations = _ALL_OFF
    ) -> None:
        self.config = config
        self.optimizations = optimizations
        self.attn_backends = [
            SingleStepBackend(config, req_to_token, step, optimizations) for step in range(config.speculative_num_steps)
        ]
        self._buffers: GraphBuffers
        # Whether the steps are prepared together; the original prepares each step separately.
        self._together = optimizations.one_launch or optimizations.precompute or optimizations.aliased_steps

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Eager metadata of all steps."""
        if not self._together:
            for backend in self.attn_backends:
                backend.init_forward_metadata(forward_batch)
            return
        computed = self.attn_backends[0].compute_eagerly(forward_batch, len(self.attn_backends))
        for index, backend in enumerate(self.attn_backends):
            backend.forward_metadata = computed.metadata[0 if computed.num_steps == 1 else index]

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Forget all captures and allocate the page tables of all steps for the largest batch."""
        num_steps = 1 if self.optimizations.aliased_steps else len(self.attn_backends)
        device = self.attn_backends[0].req_to_token.device
        self._buffers = GraphBuffers(self.config, device, num_steps, max_bs, max_num_tokens)
        for index, backend in enumerate(self.attn_backends):
            backend.use_buffers(self._buffers, 0 if num_steps == 1 else index)

    def init_forward_metadata_capture_cuda_graph(self, forward_batch: ForwardBatch) -> None:
        """Bind every step to the buffers that the graph of this mode and bucket will read from now on."""
        for backend in self.attn_backends:
            backend.bind(forward_batch.forward_mode, forward_batch.batch_size)
        self._refresh(forward_batch, forward_batch.batch_size)

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        """Refresh, in place, every step's buffers of this mode and bucket, unless the graph does so itself."""
        for backend in self.attn_backends:
            backend.select(forward_batch.forward_mode, bs)
        if not self.optimizations.in_graph:
            self._refresh(forward_batch, bs)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Today's name for both: bind at capture, refresh before a replay unless the graph does so itself."""
        if in_capture:
            self.init_forward_metadata_capture_cuda_graph(forward_batch)
        else:
            self.init_forward_metadata_replay_cuda_graph(forward_batch, forward_batch.batch_size)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int | None = None) -> None:
        """Record the preparation. Called inside capture, before anything reads the metadata."""
        bs = forward_batch.batch_size if bs is None else bs
        if self.optimizations.in_graph:
            self._refresh(forward_batch, bs)

    def _refresh(self, forward_batch: ForwardBatch, bs: int) -> None:
        batch = forward_batch if forward_batch.batch_size == bs else dataclasses.replace(forward_batch, batch_size=bs)
        if self._together:
            self.attn_backends[0].refresh(batch, self._buffers.captured(batch.forward_mode, bs))
            return
        for backend in self.attn_backends:
            backend.refresh(batch, backend.select(batch.forward_mode, bs))
