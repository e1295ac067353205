"""The methods that the harness calls on a backend and on a layer.

An engine does five things with a backend: it builds it, allocates for graphs, prepares a forward pass eagerly, binds
the metadata to a graph at capture, and prepares a replay, before the graph or inside it. SGLang has had two sets of
names for them, and a backend may have either. Those of ``SingleStepBackend`` and ``MultiStepBackend`` are the older
ones (up to 0.5.8); ``PreparesOutOfGraph`` are today's. If a backend has both completely, the older ones are called; if
it has some of the older ones beside all of today's, nothing calls those.

A third-party backend needs a thin adapter that renames its metadata fields to those of ``reference.types.Metadata``.
Every field is required, except schedules that the configuration does not ask for.
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
    """The backend of one draft step. After every call ``forward_metadata`` is what attention reads next."""

    forward_metadata: Metadata

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare ``forward_metadata`` for a forward pass outside any graph."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what all graphs, of up to ``max_bs`` requests and ``max_num_tokens`` rows, share.

        Called once, before any other method for graphs.
        """

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
        """Bind ``forward_metadata`` to the buffers that the graph of this mode and of bucket ``bs`` reads from now on.

        The tensor arguments are the engine's static inputs, which it refreshes in place before each replay.
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
        """Refresh those buffers in place, just before the graph of this mode and of bucket ``bs`` is replayed."""


@runtime_checkable
class MultiStepBackend(Protocol):
    """N single-step backends behind one set of methods."""

    @property
    def attn_backends(self) -> Sequence[SingleStepBackend]:
        """The N single-step backends, in step order."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None: ...

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None: ...

    def init_forward_metadata_capture_cuda_graph(self, forward_batch: ForwardBatch) -> None: ...

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None: ...


@runtime_checkable
class PreparesInGraph(Protocol):
    """Optional, for both kinds of backend: metadata preparation that is captured with the forward pass."""

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        """Run the preparation. Called during capture, before anything reads the metadata."""


@runtime_checkable
class PreparesOutOfGraph(Protocol):
    """Today's names, the same for one step and for N. ``attn_backends`` and ``forward_metadata`` are as before."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare ``forward_metadata`` for a forward pass outside any graph."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what all graphs share. Called once, before any other method for graphs."""

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Bind the metadata to the graph of this mode and bucket if ``in_capture``, else refresh it before a replay.

        The batch's tensors are the engine's static inputs, which it refreshes in place before each replay.
        """

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """The part of the preparation that the graph records. Called during capture, before anything reads it."""


@runtime_checkable
class SparseAttention(Protocol):
    """One sparse attention layer. Its stages are judged one by one; ``forward`` runs all of them, in a graph too.

    Arguments have the shapes and dtypes of ``reference.types``, for R rows (query tokens). The page tables passed to
    stages have one row per query token.
    """

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        """Quantise each row's own keys and write them to slot ``inputs.out_cache_loc`` of both caches."""

    def indexer_logits(
        self,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        index_k_cache: torch.Tensor,
        real_page_table: torch.Tensor,
        seqlens_expanded: torch.Tensor,
        max_seq_len_k: int,
    ) -> torch.Tensor:
        """Scores of the cached tokens for each row: float32 [R, max_seq_len_k], -inf from ``seqlens_expanded`` on."""

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        """Positions of each row's best tokens: int32 [R, index_topk], ascending, then -1."""

    def topk_transform_paged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, page_table_1: torch.Tensor
    ) -> torch.Tensor:
        """Slots of each row's best tokens: int32 [R, index_topk], in order of position, then -1."""

    def topk_transform_ragged(
        self, logits: torch.Tensor, seqlens_expanded: torch.Tensor, topk_indices_offset: torch.Tensor
    ) -> torch.Tensor:
        """Places of each row's best tokens in the batch's concatenated KV: int32 [R, index_topk], then -1."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the slots in ``indices``, int32 [R, index_topk], of which -1 is skipped.

        Returns out, bf16 [R, num_heads, kv_lora_rank], and lse, float32 [R, num_heads].
        """

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        """One forward pass of the R rows that ``metadata`` describes.

        The inputs may have further rows behind them, which stand for no token: indices, out and lse have them as well.
        """


STAGES = ("kv_cache", "index_k_cache", "logits", "topk_indices", "indices", "topk_ragged", "out", "lse")
"""The results of a layer that are compared, in order."""


class Strictness(enum.Enum):
    """How a stage of a layer is compared.

    A layer that cannot be bit-exact declares weaker comparisons in an attribute ``weaker``, a mapping of stage names
    (``STAGES``) to members of this class. The closing report names every stage that was compared in a weaker way.
    """

    EXACT = "bit-exact"
    BOUND = "within the error bound"  # the bound of ordinary numbers, on exact content too
    SAME_SET = "the same tokens in any order, ties forgiven"
    ONE_STEP = "within one step of bf16"

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that can be compared in this way."""
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
"""Builds the layer to judge from the configurations of backend and attention."""

BackendFactory = Callable[[BackendConfig, torch.Tensor, tuple[str, ...]], MultiStepBackend]
"""Builds the backend to judge from its configuration, ``req_to_token`` and the scenario's optimisation names."""
