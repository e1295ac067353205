"""Backends that are wrong in eager calls."""

from __future__ import annotations

import torch

from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.types import ForwardBatch, ForwardMode, Metadata
from tests.support.backends.seams import Step, backend_of


@backend_of
class EagerReadsPadding(Step):
    """The eager table is as wide as a graph's."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        if forward_batch.forward_mode is not ForwardMode.EXTEND:
            wide = compute_metadata(self.config, self.req_to_token, forward_batch, self.speculative_step_id, True)
            self.forward_metadata.page_table_1 = wide.page_table_1


@backend_of
class PrefillForgetsPrefix(Step):
    """Prefill places the queries at the start of the request instead of behind its cached prefix."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if batch.forward_mode is ForwardMode.EXTEND:
            assert batch.extend_seq_lens_cpu is not None
            windows = [torch.arange(1, new + 1, dtype=torch.int32) for new in batch.extend_seq_lens_cpu]
            metadata.seqlens_expanded = torch.cat(windows).to(batch.seq_lens.device)


@backend_of
class PrefillSwapsTables(Step):
    """Prefill gives every request the table of the first."""

    def alter(self, metadata: Metadata, batch: ForwardBatch) -> None:
        if batch.forward_mode is ForwardMode.EXTEND:
            metadata.page_table_1 = metadata.page_table_1[:1].repeat(batch.batch_size, 1)
