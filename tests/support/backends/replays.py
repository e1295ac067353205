"""Backends that are wrong about the buffers of a replay, or about which steps they prepare."""

from __future__ import annotations

import dataclasses

import torch

from nsa_oracle.reference.multi_step import MultiStepBackend, copy_into
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, Metadata
from tests.support.backends.seams import Step, all_but, backend_of

KeepsPageTable = all_but("page_table_1", "real_page_table")
KeepsRealPageTable = all_but("real_page_table")
KeepsPagedMqaSchedule = all_but("paged_mqa_schedule_metadata")
KeepsFlashMlaSchedule = all_but("flashmla_metadata", "flashmla_num_splits")
KeepsCuSeqlensK = all_but("nsa_cu_seqlens_k")


@backend_of
class LeavesLastBound(Step):
    """Replay stages a field in fresh memory, where its values happen to lie, and leaves out the last."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        values = self._compute_in_graph(batch)
        bounds = values.nsa_cu_seqlens_k
        assert bounds is not None
        bounds.clone()  # given back at once: the next to ask for as much gets it
        staged = torch.empty_like(bounds)
        staged[:-1] = bounds[:-1]
        copy_into(buffers, dataclasses.replace(values, nsa_cu_seqlens_k=staged))


@backend_of
class RebuildsMetadata(Step):
    """Replay binds new tensors; the graph reads the old ones."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        self.forward_metadata = self._compute_in_graph(batch)


@backend_of
class RebuildsOneField(Step):
    """All is copied in place, but one attribute is bound to a new tensor of the right content."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        values = self._compute_in_graph(batch)
        copy_into(buffers, values)
        self.forward_metadata = dataclasses.replace(buffers, nsa_cu_seqlens_k=values.nsa_cu_seqlens_k)


@backend_of
class DropsFieldAtReplay(Step):
    """One attribute is gone after a replay."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        super().refresh(buffers, batch)
        self.forward_metadata = dataclasses.replace(buffers, nsa_cu_seqlens_k=None)  # type: ignore[arg-type]


@backend_of
class UpdatesTwin(Step):
    """Replay writes a twin of the buffers that the graph is bound to."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        self.twin = self._compute_in_graph(batch)


@backend_of
class MixesBuckets(Step):
    """Every replay refreshes the buffers of the bucket captured last."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        last = list(self._captured.values())[-1]
        values = self._compute_in_graph(batch)
        if last.cache_seqlens_int32.shape == values.cache_seqlens_int32.shape:
            copy_into(last, values)


class SkipsLastStep(MultiStepBackend):
    """The loop over the steps ends one early."""

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        steps, self.attn_backends = self.attn_backends, self.attn_backends[:-1]
        super().init_forward_metadata_replay_cuda_graph(forward_batch, bs)
        self.attn_backends = steps


class LastStepForAll(MultiStepBackend):
    """All steps see the lengths of the last one."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        super().__init__(config, req_to_token)
        for step in self.attn_backends:
            step.speculative_step_id = config.speculative_num_steps - 1


class OneStepTooFew(MultiStepBackend):
    """Has N - 1 steps."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        super().__init__(config, req_to_token)
        self.attn_backends.pop()


class RefreshesNothing(MultiStepBackend):
    """Has a method for replays that does nothing."""

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None: ...
