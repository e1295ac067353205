"""Backends that know a batch, or a tensor of it, by its identity: wrong where the object is gone or was refreshed."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from nsa_oracle.reference.multi_step import MultiStepBackend
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, Metadata


def skipping_known(identity: Callable[[ForwardBatch], object]) -> type[MultiStepBackend]:
    """A backend that prepares a batch, eagerly or before a replay, once for each ``identity`` of a batch."""

    class Skips(MultiStepBackend):
        def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
            super().__init__(config, req_to_token)
            self._prepared: dict[object, list[Metadata]] = {}

        def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
            known = self._prepared.get(identity(forward_batch))
            if known is None:
                super().init_forward_metadata(forward_batch)
                self._prepared[identity(forward_batch)] = [step.forward_metadata for step in self.attn_backends]
                return
            for step, metadata in zip(self.attn_backends, known, strict=True):
                step.forward_metadata = metadata

        def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
            key = "replay", forward_batch.forward_mode, bs, identity(forward_batch)
            if key not in self._prepared:
                super().init_forward_metadata_replay_cuda_graph(forward_batch, bs)
                self._prepared = {key: []}  # another batch overwrites the buffers

    return Skips


ByBatchId = skipping_known(id)
ByLengthsId = skipping_known(lambda batch: id(batch.seq_lens))
ByLengthsObject = skipping_known(lambda batch: batch.seq_lens)
ByMirrorId = skipping_known(lambda batch: id(batch.seq_lens_cpu))
ByVersion = skipping_known(
    lambda batch: tuple((each.data_ptr(), each._version) for each in (batch.seq_lens, batch.req_pool_indices))
)
BySpecInfoId = skipping_known(lambda batch: id(batch.spec_info))


class RemembersBatches(MultiStepBackend):
    """Skips only what it knows to be the same: a batch that it still has and that nothing was prepared after."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        super().__init__(config, req_to_token)
        self._last: tuple[str, ForwardBatch] | None = None
        self._captured: list[tuple[ForwardBatch, dict[str, object]]] = []

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if not self._is_last("eager", forward_batch):
            super().init_forward_metadata(forward_batch)

    def init_forward_metadata_capture_cuda_graph(self, forward_batch: ForwardBatch) -> None:
        self._captured.append((forward_batch, dict(vars(forward_batch))))
        super().init_forward_metadata_capture_cuda_graph(forward_batch)

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        for batch, attributes in self._captured:
            assert all(getattr(batch, name) is value for name, value in attributes.items())
        if not self._is_last("replay", forward_batch):
            super().init_forward_metadata_replay_cuda_graph(forward_batch, bs)

    def _is_last(self, what: str, batch: ForwardBatch) -> bool:
        known = self._last is not None and self._last[0] == what and self._last[1] is batch
        self._last = what, batch
        return known


class RemembersWeakly(MultiStepBackend):
    """Skips a batch that it knows by an ``id``, which it forgets with the batch."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        super().__init__(config, req_to_token)
        self._known: set[int] = set()

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if id(forward_batch) in self._known:
            return
        self._known.add(id(forward_batch))
        weakref.finalize(forward_batch, self._known.discard, id(forward_batch))
        super().init_forward_metadata(forward_batch)
