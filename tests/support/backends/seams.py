"""The reference's backend with seams: where the backends of this package alter what it computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from nsa_oracle.reference.multi_step import MultiStepBackend, SingleStepBackend, copy_into
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata, SpecInfo


class Step(SingleStepBackend):
    """The reference's step with seams: ``alter`` what was computed, or how buffers are ``refresh``ed."""

    seq_lens_cpu: torch.Tensor | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self.alter(self.forward_metadata, forward_batch)

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
        key = ForwardMode.DECODE if forward_mode.is_decode_or_idle else forward_mode
        self.forward_metadata = self._captured[key, bs]
        self.refresh(
            self.forward_metadata,
            ForwardBatch(forward_mode, bs, req_pool_indices, seq_lens, seq_lens_cpu, spec_info=spec_info),
        )

    def _compute_in_graph(self, batch: ForwardBatch) -> Metadata:
        metadata = super()._compute_in_graph(batch)
        self.alter(metadata, batch)
        return metadata

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        """Change freshly computed metadata: at capture, before a replay and eagerly."""

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        """Bring the buffers of a graph up to date before its replay."""
        copy_into(buffers, self._compute_in_graph(batch))


class OfSteps(MultiStepBackend):
    """A multi-step backend of steps of another class."""

    step: type[SingleStepBackend] = Step

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        self.attn_backends = [self.step(config, req_to_token, number) for number in range(config.speculative_num_steps)]


def backend_of(step: type[SingleStepBackend]) -> type[OfSteps]:
    """Decorates a step: the name then stands for the backend made of such steps."""
    return type(step.__name__, (OfSteps,), {"step": step, "__doc__": step.__doc__})


def copy_all_but(fields: Iterable[str], buffers: Metadata, values: Metadata) -> None:
    kept = {name: getattr(buffers, name) for name in fields}
    copy_into(dataclasses.replace(buffers, **dict.fromkeys(kept)), values)


def all_but(*fields: str) -> type[OfSteps]:
    """A backend whose replays leave ``fields`` as the capture wrote them."""

    class Stale(Step):
        def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
            copy_all_but(fields, buffers, self._compute_in_graph(batch))

    return backend_of(Stale)


class InGraph(Step):
    """Writes the lengths inside the graph, everything else before the replay."""

    def lengths(self, batch: ForwardBatch) -> torch.Tensor:
        verifies = batch.forward_mode is ForwardMode.TARGET_VERIFY
        return batch.seq_lens + self.config.speculative_num_draft_tokens if verifies else batch.seq_lens

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        copy_all_but(("cache_seqlens_int32",), buffers, self._compute_in_graph(batch))

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        self.forward_metadata.cache_seqlens_int32.copy_(self.lengths(forward_batch))


class InGraphBackend(OfSteps):
    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        for step in self.attn_backends:
            step.init_forward_metadata_in_graph(forward_batch, bs)  # type: ignore[attr-defined]
