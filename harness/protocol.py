"""What the harness asks of a backend: the methods a serving engine calls on SGLang's NSA backend, by the same names.

A third-party backend stands behind these protocols with a thin adapter that renames its metadata fields to those of
``reference.types.Metadata``. Every field must be there, but for the schedules of a configuration that asks for none.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from nsa_oracle.reference.types import (
    AttentionCaches,
    AttentionConfig,
    AttentionInputs,
    AttentionOutputs,
    BackendConfig,
    ForwardBatch,
    ForwardMode,
    Metadata,
    SpecInfo,
)


@runtime_checkable
class SingleStepBackend(Protocol):
    """One draft step. After every call ``forward_metadata`` is what attention reads next."""

    forward_metadata: Metadata

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare ``forward_metadata`` for a forward pass outside any graph."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what graphs of up to ``max_bs`` requests and ``max_num_tokens`` rows share. Called once, first."""

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
        """Bind ``forward_metadata`` to the buffers that the graph of this mode and bucket will read from now on.

        The tensors given here are the engine's static inputs: it refreshes them in place before each replay.
        """

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
        """Refresh those buffers, in place, just before the graph of this mode and bucket is replayed."""


@runtime_checkable
class MultiStepBackend(Protocol):
    """N single-step backends behind one set of calls."""

    @property
    def attn_backends(self) -> Sequence[SingleStepBackend]:
        """The single-step backends, in step order."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None: ...

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None: ...

    def init_forward_metadata_capture_cuda_graph(self, forward_batch: ForwardBatch) -> None: ...

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None: ...


@runtime_checkable
class PreparesInGraph(Protocol):
    """Optional, for either kind of backend: metadata preparation that is captured with the forward pass."""

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        """Record the preparation. Called inside capture, before anything reads the metadata."""


@runtime_checkable
class SparseAttention(Protocol):
    """One sparse attention layer. Its stages can be judged one by one; ``forward`` is all of them, in a graph too.

    Shapes and dtypes are those of ``reference.types``; the page tables given to stages have a row per query token.
    """

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        """Quantise and write the rows' own keys."""

    def indexer_logits(
        self,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        index_k_cache: torch.Tensor,
        real_page_table: torch.Tensor,
        seqlens_expanded: torch.Tensor,
        max_seq_len_k: int,
    ) -> torch.Tensor:
        """Score of every cached token for every row: float32 [R, max_seq_len_k]."""

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        """Positions of the best tokens of each row: int32 [R, index_topk]."""

    def topk_transform_paged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor
    ) -> torch.Tensor:
        """Slots of the best tokens of each row: int32 [R, index_topk]."""

    def topk_transform_ragged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, topk_indices_offset: torch.Tensor
    ) -> torch.Tensor:
        """Places of the best tokens of each row in the batch's concatenated KV: int32 [R, index_topk]."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the slots ``indices`` names: out bf16 [R, heads, kv_lora_rank], lse float32 [R, heads]."""

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        """One forward pass of the R rows that ``metadata`` describes."""


STAGES = ("kv_cache", "index_k_cache", "logits", "topk_indices", "indices", "topk_ragged", "out", "lse")
"""What is compared of a layer, in order."""


class Strictness(enum.Enum):
    """How a stage of a layer is compared. A layer that cannot be bit-exact declares a weaker way, by stage.

    It does so in an attribute ``weaker``, a mapping of stage names (``STAGES``) to these; the report
    names every stage that was compared so.
    """

    EXACT = "bit-exact"
    BOUND = "within the error bound"  # of ordinary numbers, on exact content too
    SAME_SET = "the same tokens in any order, ties forgiven"
    ONE_STEP = "within one step of bf16"

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that can be compared so."""
        match self:
            case Strictness.SAME_SET:
                return "topk_indices", "indices", "topk_ragged"
            case Strictness.ONE_STEP:
                return ("out",)
            case Strictness.BOUND:
                return "logits", "out", "lse"
            case Strictness.EXACT:
                return STAGES


LayerFactory = Callable[[BackendConfig, AttentionConfig], SparseAttention]
"""Builds the layer to judge."""

BackendFactory = Callable[[BackendConfig, torch.Tensor, tuple[str, ...]], MultiStepBackend]
"""Builds the backend to judge from its configuration, ``req_to_token`` and the scenario's optimisation names."""
