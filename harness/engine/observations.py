"""Records of what an engine observes: metadata, passes of a layer, and isolated stages."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from nsa_oracle.harness.content.edge_keys import EdgeKeys
from nsa_oracle.harness.content.edge_logits import EdgeLogits
from nsa_oracle.harness.content.edge_scores import EdgeScores
from nsa_oracle.harness.engine.passes import Pass
from nsa_oracle.harness.findings import InputWrite
from nsa_oracle.harness.memory.bits import NAN_WORD
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.reference.types import AttentionCaches, AttentionOutputs, ForwardMode


@dataclass(frozen=True)
class Conditions:
    """Conditions that may vary around a scenario without changing a right answer.

    sentinel: value of unspecified integers. poison: byte value of unwritten cache memory. graphs: if False, replays run
    as eager calls. stress: late inputs and slow streams, on a GPU (see ``engine.stress``).
    """

    sentinel: int
    poison: int
    graphs: bool = True
    stress: bool = False

    @property
    def spoilt(self) -> int:
        """The int32 word that fills free memory at a replay: NaN, or the sentinel under stress.

        NaN shows even where a stale number has weight 0. But as an integer the NaN word is -1, which passes for "no
        slot", so one of the two runs uses the sentinel.
        """
        return self.sentinel if self.stress else NAN_WORD


@dataclass(frozen=True)
class StepObservation:
    """The metadata of one step as a consumer sees it.

    tensors: host copies by field name. moved: fields that are no longer at the address that the graph reads; elsewhere:
    host copies of what they are now. unchanged: fields of one axis that a graph read as its capture left them. odd:
    description of a value that is neither a tensor nor None, by field name. strides: of the backend's own tensors.
    """

    tensors: dict[str, torch.Tensor]
    dtypes: dict[str, torch.dtype]
    devices: dict[str, torch.device]
    host_scalars: dict[str, object]
    moved: tuple[str, ...] = ()
    elsewhere: Mapping[str, torch.Tensor] = field(default_factory=dict)
    unchanged: tuple[str, ...] = ()
    odd: Mapping[str, str] = field(default_factory=dict)
    strides: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class CallKind(NamedTuple):
    """What an engine calls: the mode of the batch, and whether a graph holds it. A replay that fits none is eager."""

    mode: ForwardMode
    in_graph: bool


@dataclass(frozen=True)
class Observation:
    """The metadata of one replay (``in_graph``) or eager call. Its tensors are valid until the engine's next call.

    batch: padded to the graph's bucket. Its first ``raw_bs`` requests are real. again: a second replay, without a
    preparation since the first.
    """

    batch: Batch
    raw_bs: int
    in_graph: bool
    steps: tuple[StepObservation, ...]
    again: bool = False


@dataclass(frozen=True)
class LayerObservation:
    """The layer's results of one replay or eager call. Rows are those of the padded batch, real rows first.

    modified: a read-only input that the layer modified. selected, stored, scored: results of isolated top-k on
    edge-case logits, of the isolated store on edge-case keys, and of the isolated indexer on edge-case index keys.
    again: a second replay, without a preparation since the first.
    """

    batch: Batch
    raw_bs: int
    feed: Feed
    bucket: int | None
    load: LayerLoad
    steps: tuple[LayerStep, ...]
    modified: Modified | None = None
    selected: Selected | None = None
    stored: Stored | None = None
    scored: Scored | None = None
    many: ManyRows | None = None
    again: bool = False


@dataclass(frozen=True)
class Selected:
    """Top-k of edge-case logits: positions, and their slots or their places in the concatenated KV."""

    given: EdgeLogits
    positions: torch.Tensor
    indices: torch.Tensor | None = None
    ragged: torch.Tensor | None = None


@dataclass(frozen=True)
class Scored:
    """The scores of edge-case index keys, [2, W] float32."""

    given: EdgeScores
    logits: torch.Tensor


@dataclass(frozen=True)
class ManyRows:
    """Results of stages by themselves on ``count`` rows, those of a pass over and over: row i is its row i % ``rows``.

    step: of the pass. result: its caches are those after a store of the pass, of the first one behind so many rows
    without a token that there are ``count`` in all.
    """

    step: int
    rows: int
    count: int
    result: LayerStep


@dataclass(frozen=True)
class Stored:
    """The caches after a store of edge-case keys."""

    given: EdgeKeys
    caches: AttentionCaches


class Feed(enum.Enum):
    """How a layer was run: what its stages got as inputs."""

    GRAPH = "captured chain"  # the backend's metadata, and the layer's own result of the stage before, in one graph
    CHAIN = "eager chain"  # the same, without a graph
    ISOLATED = "isolated stage"  # the reference's metadata, and the reference's result of the stage before


@dataclass(frozen=True)
class LayerLoad:
    """The layer's inputs in one replay or eager call: one pass per step, and the caches before the first pass."""

    passes: tuple[Pass, ...]
    caches: AttentionCaches  # dense, the setup's pages; read-only


@dataclass(frozen=True)
class LayerStep:
    """The results of one pass of the layer, and the caches after it (dense, the setup's pages).

    Only isolated stages give the others, but for positions, which a captured layer that brings ``topk_indices`` gives
    as well. positions, ragged: results of ``topk_indices`` and ``topk_transform_ragged``. fed: the reference's logits
    that top-k selected from.
    """

    outputs: AttentionOutputs
    caches: AttentionCaches
    positions: torch.Tensor | None = None
    ragged: torch.Tensor | None = None
    fed: torch.Tensor | None = None


def copied(outputs: AttentionOutputs) -> AttentionOutputs:
    """A dense copy of each tensor, in memory of its own."""
    return AttentionOutputs(**{name: tensor.contiguous().clone() for name, tensor in vars(outputs).items()})


def dense_copy(caches: AttentionCaches) -> AttentionCaches:
    return AttentionCaches(caches.kv.clone(), caches.index_k.clone())


class Modified(NamedTuple):
    """An input that a layer has modified, and the step of the pass that did so, if known.

    write: an operator that has written to it and left its content as it is; None if that has changed.
    """

    step: int | None
    name: str
    write: InputWrite | None = None
