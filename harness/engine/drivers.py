"""Calls a backend as a serving engine does: through the multi-step wrapper, or on each single-step backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nsa_oracle.harness.protocol import MultiStepBackend, PreparesInGraph, SingleStepBackend
from nsa_oracle.harness.scenarios.scenario import Drive
from nsa_oracle.reference.types import BackendConfig, ForwardBatch


class Driver(Protocol):
    """One method per operation of the engine, whichever methods of the backend it takes."""

    def allocate(self, max_bs: int, max_num_tokens: int) -> None: ...

    def prepare_eagerly(self, batch: ForwardBatch) -> None: ...

    def bind(self, batch: ForwardBatch) -> None:
        """Bind the backend's metadata to the buffers of this mode and bucket. Called before capture."""

    def prepare_in_graph(self, batch: ForwardBatch) -> None:
        """Record the preparation, if the backend implements ``PreparesInGraph``. Called inside capture."""

    def prepare_replay(self, batch: ForwardBatch) -> None: ...


class MultiStepDriver:
    """Drives the multi-step backend as SGLang's draft worker drives ``NativeSparseAttnMultiStepBackend``."""

    def __init__(self, backend: MultiStepBackend) -> None:
        self.backend = backend

    def allocate(self, max_bs: int, max_num_tokens: int) -> None:
        self.backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def prepare_eagerly(self, batch: ForwardBatch) -> None:
        self.backend.init_forward_metadata(batch)

    def bind(self, batch: ForwardBatch) -> None:
        self.backend.init_forward_metadata_capture_cuda_graph(batch)

    def prepare_in_graph(self, batch: ForwardBatch) -> None:
        if isinstance(self.backend, PreparesInGraph):
            self.backend.init_forward_metadata_in_graph(batch, batch.batch_size)

    def prepare_replay(self, batch: ForwardBatch) -> None:
        self.backend.init_forward_metadata_replay_cuda_graph(batch, batch.batch_size)


class SingleStepDriver:
    """Drives each step's backend in turn, as SGLang's graph runners drive one ``NativeSparseAttnBackend``."""

    def __init__(self, backends: Sequence[SingleStepBackend], config: BackendConfig) -> None:
        self.backends = backends
        self.config = config

    def allocate(self, max_bs: int, max_num_tokens: int) -> None:
        for backend in self.backends:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def prepare_eagerly(self, batch: ForwardBatch) -> None:
        for backend in self.backends:
            backend.init_forward_metadata(batch)

    def bind(self, batch: ForwardBatch) -> None:
        for backend in self.backends:
            backend.init_forward_metadata_capture_cuda_graph(
                bs=batch.batch_size,
                num_tokens=batch.batch_size * self.config.rows_per_request(batch.forward_mode),
                req_pool_indices=batch.req_pool_indices,
                seq_lens=batch.seq_lens,
                encoder_lens=batch.encoder_lens,
                forward_mode=batch.forward_mode,
                spec_info=batch.spec_info,
            )

    def prepare_in_graph(self, batch: ForwardBatch) -> None:
        for backend in self.backends:
            if isinstance(backend, PreparesInGraph):
                backend.init_forward_metadata_in_graph(batch, batch.batch_size)

    def prepare_replay(self, batch: ForwardBatch) -> None:
        for backend in self.backends:
            backend.init_forward_metadata_replay_cuda_graph(
                bs=batch.batch_size,
                req_pool_indices=batch.req_pool_indices,
                seq_lens=batch.seq_lens,
                seq_lens_sum=batch.seq_lens_sum,
                encoder_lens=batch.encoder_lens,
                forward_mode=batch.forward_mode,
                spec_info=batch.spec_info,
                seq_lens_cpu=batch.seq_lens_cpu,
                out_cache_loc=batch.out_cache_loc,
            )


def driver_for(drive: Drive, backend: MultiStepBackend, config: BackendConfig) -> Driver:
    if drive is Drive.SINGLE_STEP:
        return SingleStepDriver(backend.attn_backends, config)
    return MultiStepDriver(backend)
