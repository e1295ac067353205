"""Calls a backend as a serving engine does: through the multi-step wrapper, or on each single-step backend."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, TypeGuard, cast

from nsa_oracle.harness.protocol import MultiStepBackend, PreparesInGraph, PreparesOutOfGraph, SingleStepBackend
from nsa_oracle.harness.scenarios.setup import Drive
from nsa_oracle.harness.subjects.names import BuiltBackend, attn_backends_of, has_older_names
from nsa_oracle.harness.watching import noted
from nsa_oracle.reference.types import BackendConfig, ForwardBatch


class Act(enum.Enum):
    """What an engine has just asked for, after which ``forward_metadata`` must be current."""

    EAGER = "eager call"
    CAPTURE = "capture"
    REPLAY = "replay"


_OLDER_NAMES = {
    Act.EAGER: "init_forward_metadata",
    Act.CAPTURE: "init_forward_metadata_capture_cuda_graph",
    Act.REPLAY: "init_forward_metadata_replay_cuda_graph",
}
_TODAYS_NAMES = {
    Act.EAGER: "init_forward_metadata",
    Act.CAPTURE: "init_forward_metadata_out_graph",
    Act.REPLAY: "init_forward_metadata_out_graph",
}


def prepares_in_graph(backend: object) -> TypeGuard[PreparesInGraph]:
    """Whether ``backend`` has the method, also if it passes on what it is asked for, as an adapter may.

    ``isinstance`` of a protocol would not see that from Python 3.12 on.
    """
    return callable(getattr(backend, "init_forward_metadata_in_graph", None))


class Driver(Protocol):
    """One method per operation of the engine. names: the backend's method for each act, for reports.

    steps: how many of the steps will run, the first ones; None for all. A multi-step backend is not told.
    """

    names: ClassVar[Mapping[Act, str]]

    def allocate(self, max_bs: int, max_num_tokens: int) -> None: ...

    def prepare_eagerly(self, batch: ForwardBatch, steps: int | None = None) -> None: ...

    def bind(self, batch: ForwardBatch) -> None:
        """Bind the backend's metadata to the buffers of this mode and bucket. Called before capture."""

    def prepare_in_graph(self, batch: ForwardBatch) -> None:
        """Record the preparation, if the backend implements ``PreparesInGraph``. Called inside capture."""

    def prepare_replay(self, batch: ForwardBatch, steps: int | None = None) -> None: ...


class MultiStepDriver:
    """Drives the multi-step backend as SGLang's draft worker drives ``NativeSparseAttnMultiStepBackend``."""

    names: ClassVar[Mapping[Act, str]] = _OLDER_NAMES

    def __init__(self, backend: MultiStepBackend) -> None:
        self.backend = backend

    def allocate(self, max_bs: int, max_num_tokens: int) -> None:
        noted(self.backend.init_cuda_graph_state)(max_bs, max_num_tokens)

    def prepare_eagerly(self, batch: ForwardBatch, steps: int | None = None) -> None:
        noted(self.backend.init_forward_metadata)(batch)

    def bind(self, batch: ForwardBatch) -> None:
        noted(self.backend.init_forward_metadata_capture_cuda_graph)(batch)

    def prepare_in_graph(self, batch: ForwardBatch) -> None:
        if prepares_in_graph(self.backend):
            noted(self.backend.init_forward_metadata_in_graph)(batch, batch.batch_size)

    def prepare_replay(self, batch: ForwardBatch, steps: int | None = None) -> None:
        noted(self.backend.init_forward_metadata_replay_cuda_graph)(batch, batch.batch_size)


class _EachBackend:
    """What is alike under both sets of names: every backend is called in turn."""

    def __init__(self, backends: Sequence[SingleStepBackend | PreparesOutOfGraph]) -> None:
        self._each = backends

    def allocate(self, max_bs: int, max_num_tokens: int) -> None:
        for backend in self._each:
            noted(backend.init_cuda_graph_state)(max_bs, max_num_tokens)

    def prepare_eagerly(self, batch: ForwardBatch, steps: int | None = None) -> None:
        for backend in self._each[:steps]:
            noted(backend.init_forward_metadata)(batch)


class SingleStepDriver(_EachBackend):
    """Drives each step's backend in turn, as SGLang's graph runners drive one ``NativeSparseAttnBackend``."""

    names: ClassVar[Mapping[Act, str]] = _OLDER_NAMES

    def __init__(self, backends: Sequence[SingleStepBackend], config: BackendConfig) -> None:
        super().__init__(backends)
        self.backends = backends
        self.config = config

    def bind(self, batch: ForwardBatch) -> None:
        for backend in self.backends:
            noted(backend.init_forward_metadata_capture_cuda_graph)(
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
            if prepares_in_graph(backend):
                noted(backend.init_forward_metadata_in_graph)(batch, batch.batch_size)

    def prepare_replay(self, batch: ForwardBatch, steps: int | None = None) -> None:
        for backend in self.backends[:steps]:
            noted(backend.init_forward_metadata_replay_cuda_graph)(
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


class OutOfGraphDriver(_EachBackend):
    """Calls the backend by today's names: the multi-step backend alone, or each single-step backend in turn."""

    names: ClassVar[Mapping[Act, str]] = _TODAYS_NAMES

    def __init__(self, backends: Sequence[PreparesOutOfGraph]) -> None:
        super().__init__(backends)
        self.backends = backends

    def bind(self, batch: ForwardBatch) -> None:
        for backend in self.backends:
            noted(backend.init_forward_metadata_out_graph)(batch, in_capture=True)

    def prepare_in_graph(self, batch: ForwardBatch) -> None:
        for backend in self.backends:
            noted(backend.init_forward_metadata_in_graph)(batch)

    def prepare_replay(self, batch: ForwardBatch, steps: int | None = None) -> None:
        for backend in self.backends[:steps]:
            noted(backend.init_forward_metadata_out_graph)(batch)


def driver_for(drive: Drive, backend: BuiltBackend, config: BackendConfig) -> Driver:
    """The driver that calls ``backend`` by the set of names that it has; the older one if it has both.

    drive: whose methods are called, if ``backend`` is a multi-step backend.
    """
    steps = attn_backends_of(backend)
    if steps is None:
        steps = (cast(SingleStepBackend, backend),)
    elif drive is Drive.MULTI_STEP:
        if has_older_names(backend):
            return MultiStepDriver(cast(MultiStepBackend, backend))
        return OutOfGraphDriver([cast(PreparesOutOfGraph, backend)])
    if all(map(has_older_names, steps)):
        return SingleStepDriver(cast("Sequence[SingleStepBackend]", steps), config)
    return OutOfGraphDriver(cast("Sequence[PreparesOutOfGraph]", steps))
