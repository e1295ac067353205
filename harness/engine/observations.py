"""Records of what an engine showed: of metadata, of each pass of a layer, of stages by themselves."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from nsa_oracle.harness.content.edge_keys import EdgeKeys
from nsa_oracle.harness.content.edge_logits import EdgeLogits
from nsa_oracle.harness.engine.passes import Pass
from nsa_oracle.harness.memory.bits import NAN_WORD
from nsa_oracle.harness.scenarios.world import Batch
from nsa_oracle.reference.types import AttentionCaches, AttentionOutputs


@dataclass(frozen=True)
class Conditions:
    """What may vary around one scenario without changing a right answer.

    sentinel: what unspecified integers hold. poison: the byte that unwritten cache memory is made of.
    graphs: False runs eagerly what the scenario would replay. stress: late inputs and slow streams, on a GPU (see
    ``engine.stress``).
    """

    sentinel: int
    poison: int
    graphs: bool = True
    stress: bool = False

    @property
    def spoilt(self) -> int:
        """What free memory holds at a replay: 0 times a number is 0, and the word of NaN also means "no slot"."""
        return self.sentinel if self.stress else NAN_WORD


@dataclass(frozen=True)
class StepObservation:
    """Metadata of one step as a consumer sees it.

    tensors: host copies by field name. moved: fields that are no longer where the graph reads them. odd: what there is
    in the place of a tensor, if anything.
    """

    tensors: dict[str, torch.Tensor]
    dtypes: dict[str, torch.dtype]
    devices: dict[str, torch.device]
    host_scalars: dict[str, object]
    moved: tuple[str, ...] = ()
    odd: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Observation:
    """One replay (``in_graph``) or eager call; its tensors hold until the engine's next one.

    ``batch`` is padded to the graph's bucket; its first ``raw_bs`` requests are real.
    """

    batch: Batch
    raw_bs: int
    in_graph: bool
    steps: tuple[StepObservation, ...]


@dataclass(frozen=True)
class LayerObservation:
    """The layer's side of one replay or eager call; rows are those of the padded batch, real ones first.

    modified: what the layer was given, may not write to, and did. selected, stored: what isolated top-k made of other
    logits, and the store of other keys. again: a second replay, right after the one before it.
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
    again: bool = False


@dataclass(frozen=True)
class Selected:
    """What top-k made of made-up logits: positions, and their slots or places in the concatenated KV."""

    given: EdgeLogits
    positions: torch.Tensor
    indices: torch.Tensor | None = None
    ragged: torch.Tensor | None = None


@dataclass(frozen=True)
class Stored:
    """What the store left in the caches when it was given made-up keys."""

    given: EdgeKeys
    caches: AttentionCaches


class Feed(enum.Enum):
    """What the stages of a layer were given."""

    GRAPH = "captured chain"  # the backend's metadata, and each stage the one before, all in one graph
    CHAIN = "eager chain"  # likewise, without a graph
    ISOLATED = "isolated stage"  # the reference's metadata, and its result of the stage before


@dataclass(frozen=True)
class LayerLoad:
    """What one replay or eager call gives the layer: the passes, one a step, and the caches before the first."""

    passes: tuple[Pass, ...]
    caches: AttentionCaches  # dense, the setup's pages; nobody writes to them


@dataclass(frozen=True)
class LayerStep:
    """What one pass of the layer computed, and what it left in the caches (dense, the setup's pages).

    Isolated stages also show top-k before each of its transforms. fed: the reference's logits that they selected from.
    """

    outputs: AttentionOutputs
    caches: AttentionCaches
    positions: torch.Tensor | None = None
    ragged: torch.Tensor | None = None
    fed: torch.Tensor | None = None


def copied(outputs: AttentionOutputs) -> AttentionOutputs:
    """A copy of all tensors, each in memory of its own."""
    return AttentionOutputs(**{name: tensor.contiguous().clone() for name, tensor in vars(outputs).items()})


def dense_copy(caches: AttentionCaches) -> AttentionCaches:
    return AttentionCaches(caches.kv.clone(), caches.index_k.clone())


class Modified(NamedTuple):
    """An input that a layer has written to, and the pass in which it did, if that is known."""

    step: int | None
    name: str
