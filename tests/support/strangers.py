"""Backends and layers as strangers may bring them: each misbehaves in form rather than in value."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from nsa_oracle.harness.protocol import Strictness
from nsa_oracle.optimized.layer import SparseAttention
from nsa_oracle.reference.multi_step import MultiStepBackend
from nsa_oracle.reference.types import AttentionConfig, AttentionOutputs, BackendConfig, ForwardBatch, Metadata

# Backends


class NeedsMore:
    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor, stream: object) -> None: ...


class NeedsLess:
    def __init__(self, config: BackendConfig) -> None: ...


def gives_none(config: BackendConfig, req_to_token: torch.Tensor) -> None: ...


def exits(config: BackendConfig, req_to_token: torch.Tensor) -> None:
    sys.exit(0)


class ExitsAtReplay(MultiStepBackend):
    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        sys.exit(0)


class CannotTell(MultiStepBackend):
    """Raises what raises when it is asked for its text."""

    class Mute(TypeError):
        def __str__(self) -> str:
            raise ValueError("no text")

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        raise self.Mute

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        raise self.Mute


class ShowsSteps(MultiStepBackend):
    """Shows something else as its single-step backends."""

    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        super().__init__(config, req_to_token)
        self.attn_backends = self.show(self.attn_backends)

    def show(self, steps: list[Any]) -> Any: ...


class OneTooMany(ShowsSteps):
    def show(self, steps: list[Any]) -> Any:
        return [*steps, steps[-1]]


class NoSteps(ShowsSteps):
    def show(self, steps: list[Any]) -> Any:
        return []


class NothingForSteps(ShowsSteps):
    pass


class NumberOfSteps(ShowsSteps):
    def show(self, steps: list[Any]) -> Any:
        return len(steps)


class ChangesMetadata(MultiStepBackend):
    """Puts something else in the place of a field once it has been prepared."""

    def change(self, metadata: Metadata) -> Any:
        return metadata

    def _change_all(self) -> None:
        for step in self.attn_backends:
            step.forward_metadata = self.change(step.forward_metadata)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self._change_all()

    def init_forward_metadata_capture_cuda_graph(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata_capture_cuda_graph(forward_batch)
        self._change_all()

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        pass


def with_field(name: str, change: Callable[[Any], Any]) -> type[ChangesMetadata]:
    class WithField(ChangesMetadata):
        def change(self, metadata: Metadata) -> Any:
            setattr(metadata, name, change(getattr(metadata, name)))
            return metadata

    return WithField


def with_metadata(change: Callable[[Metadata], Any]) -> type[ChangesMetadata]:
    class WithMetadata(ChangesMetadata):
        def change(self, metadata: Metadata) -> Any:
            return change(metadata)

    return WithMetadata


ListField = with_field("cu_seqlens_k", lambda field: field.tolist())
ArrayField = with_field("cu_seqlens_k", lambda field: field.cpu().numpy())
BoolField = with_field("seqlens_expanded", lambda field: field > 0)
ScalarField = with_field("cu_seqlens_k", lambda field: field.sum(dtype=torch.int32))
SparseField = with_field("cu_seqlens_k", lambda field: field.to_sparse())
MetaField = with_field("cu_seqlens_k", lambda field: field.to("meta"))
HalfAPair = with_field("indexer_k_start_end", lambda field: (1,))
TensorForScalar = with_field("max_seq_len_k", lambda number: torch.tensor(number))
TrueForOne = with_field("max_seq_len_q", lambda number: True)
NoMetadata = with_metadata(lambda metadata: None)
DictOfMetadata = with_metadata(vars)


class SizesOfAnotherKind(MultiStepBackend):
    sizes: ClassVar[Any] = ["page_size"]


class SizesOfALayer(MultiStepBackend):
    sizes: ClassVar[Any] = {"num_heads": (2,)}


class UnknownMode(MultiStepBackend):
    modes: ClassVar[Any] = ("PREFILL",)


# Layers


def returning(stage: str, change: Callable[[Any], Any]) -> type[SparseAttention]:
    """The layer of this repository, a stage of which gives something else."""

    def changed(self: SparseAttention, *inputs: Any) -> Any:
        return change(getattr(SparseAttention, stage)(self, *inputs))

    return type(f"Returning{stage.title()}", (SparseAttention,), {stage: changed})


NoLogits = returning("indexer_logits", lambda logits: None)
ListOfLogits = returning("indexer_logits", lambda logits: logits.tolist())
TupleOfLogits = returning("indexer_logits", lambda logits: (logits,))
ScalarLogits = returning("indexer_logits", lambda logits: logits.sum())
HalfLogits = returning("indexer_logits", lambda logits: logits.half())
LogitsOfTooFewRows = returning("indexer_logits", lambda logits: logits[:-1])
LogitsElsewhere = returning("indexer_logits", lambda logits: logits.to("meta"))
NoPositions = returning("topk_indices", lambda positions: None)
ScalarPositions = returning("topk_indices", lambda positions: positions.sum(dtype=torch.int32))
NoSlots = returning("topk_transform_paged", lambda slots: None)
WideSlots = returning("topk_transform_paged", lambda slots: slots.long())
SlotsOfTooFewRows = returning("topk_transform_paged", lambda slots: slots[:-1])
NoPlaces = returning("topk_transform_ragged", lambda places: None)
NoAttention = returning("sparse_mla", lambda pair: None)
OutAlone = returning("sparse_mla", lambda pair: pair[0])
OutLseAndMore = returning("sparse_mla", lambda pair: (*pair, None))
Floats = returning("sparse_mla", lambda pair: (1.0, 2.0))
NoLse = returning("sparse_mla", lambda pair: (pair[0], None))
ScalarOut = returning("sparse_mla", lambda pair: (pair[0].sum(), pair[1]))
OutElsewhere = returning("sparse_mla", lambda pair: (pair[0].to("meta"), pair[1]))
OutOfTooFewRows = returning("sparse_mla", lambda pair: (pair[0][:-1], pair[1]))
NoOutputs = returning("forward", lambda outputs: None)
TupleOfOutputs = returning("forward", lambda outputs: tuple(vars(outputs).values()))
OutputsWithoutOut = returning(
    "forward", lambda outputs: AttentionOutputs(outputs.logits, outputs.indices, None, outputs.lse)
)
OutputsOfTooFewRows = returning(
    "forward", lambda outputs: AttentionOutputs(outputs.logits, outputs.indices, outputs.out[:-1], outputs.lse)
)


class ExitsInAttention(SparseAttention):
    def sparse_mla(self, *inputs: Any) -> Any:
        sys.exit(0)


class ExitsAtOnce(SparseAttention):
    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
        sys.exit(0)


class LayerNeedsMore(SparseAttention):
    def __init__(self, config: BackendConfig, attention: AttentionConfig, stream: object) -> None: ...


class NumberForAStage:
    sparse_mla = 3

    def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None: ...


def no_layer(config: BackendConfig, attention: AttentionConfig) -> None: ...


class WeakerList(SparseAttention):
    weaker: ClassVar[Sequence[str]] = ["out"]


class WeakerText(SparseAttention):
    weaker: ClassVar[Mapping[str, str]] = {"out": "bound"}


class WeakerCache(SparseAttention):
    weaker: ClassVar[Mapping[str, Strictness]] = {"kv_cache": Strictness.BOUND}


class WeakerNothing(SparseAttention):
    weaker: ClassVar[Mapping[str, Strictness]] = {"output": Strictness.EXACT}


class SetOfOutputs(SparseAttention):
    weaker: ClassVar[Mapping[str, Strictness]] = {"out": Strictness.SAME_SET}


class WithGradient(SparseAttention):
    """Clean: outputs that a gradient belongs to."""

    def sparse_mla(self, *inputs: Any) -> Any:
        out, lse = super().sparse_mla(*inputs)
        return out * torch.ones((), dtype=out.dtype, requires_grad=True), lse


class InAList(SparseAttention):
    """Clean: out and lse in a list."""

    def sparse_mla(self, *inputs: Any) -> Any:
        return list(super().sparse_mla(*inputs))
