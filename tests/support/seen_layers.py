"""What a clean layer shows in one call, to be tampered with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from nsa_oracle.harness.checks.layer import StageJudge
from nsa_oracle.harness.checks.tally import LayerTally
from nsa_oracle.harness.content.edge_logits import LogitKind
from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.engine.expected import expected_metadata
from nsa_oracle.harness.engine.layer_engine import LayerEngine
from nsa_oracle.harness.engine.observations import (
    Conditions,
    Feed,
    LayerObservation,
    LayerStep,
    Observation,
    dense_copy,
)
from nsa_oracle.harness.findings import Finding
from nsa_oracle.harness.judge import sentinels
from nsa_oracle.harness.memory.poison import POISON_BYTES
from nsa_oracle.harness.protocol import Strictness
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Event, Join, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Regime
from nsa_oracle.harness.subjects.default import optimized_layer
from nsa_oracle.reference.types import AttentionOutputs, ForwardMode, KVCacheDtype, Metadata
from tests.support.layer_cases import BACKEND, BF16, case
from tests.support.layers.clean import Clean
from tests.support.metadata_cases import VERIFY

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TWO = (Join(seq_len=11), Join(seq_len=3))
RANDOM_LAYER = {"regime": Regime.RANDOM}
MADE_UP = len(LogitKind)  # rows of logits that isolated top-k is given beside those of the case


@dataclass(frozen=True)
class Seen:
    """What a clean layer showed in one call, to be tampered with."""

    engine: Engine
    layer: LayerObservation
    metadata: Sequence[Metadata]

    def judged(
        self,
        change: Callable[[LayerObservation], None] = lambda seen: None,
        weaker: Mapping[str, Strictness] | None = None,
        tally: LayerTally | None = None,
    ) -> Finding | None:
        """What is found when ``change`` has been made to a copy of the observation."""
        copy = dataclasses.replace(self.layer, steps=tuple(copied_step(step) for step in self.layer.steps))
        change(copy)
        return self.judge(weaker, tally).compare(copy, self.metadata)

    def judge(self, weaker: Mapping[str, Strictness] | None = None, tally: LayerTally | None = None) -> StageJudge:
        """A judge of the layer, as if it declared ``weaker``."""
        layer = dataclasses.replace(self.layer_engine.judged(), weaker=weaker or {})
        return StageJudge(layer, LayerTally() if tally is None else tally)

    @property
    def layer_engine(self) -> LayerEngine:
        assert self.engine.layer is not None
        return self.engine.layer

    def found(self, change: Callable[[LayerObservation], None], **options: Any) -> Finding:
        finding = self.judged(change, **options)
        assert finding is not None
        return finding


def copied_step(step: LayerStep) -> LayerStep:
    outputs = AttentionOutputs(**{name: tensor.clone() for name, tensor in vars(step.outputs).items()})
    others = [None if tensor is None else tensor.clone() for tensor in (step.positions, step.ragged)]
    return LayerStep(outputs, dense_copy(step.caches), *others)


def seen(scenario: Scenario, feed: Feed = Feed.CHAIN) -> Seen:
    """The last call of ``scenario``. Only graphs need a layer that can be captured, and a GPU if there is one."""
    graphs = feed is Feed.GRAPH
    layer, device = (optimized_layer, DEVICE) if graphs else (Clean, CPU)
    conditions = Conditions(sentinels(scenario.setup)[0], POISON_BYTES[0], graphs)
    engine = Engine(scenario, BACKEND, layer, device, conditions)
    last, metadata = None, []
    for event in scenario.events:
        for shown in engine.run(event):
            if isinstance(shown, Observation):
                metadata = expected_metadata(engine.config, engine.world.req_to_token, shown.batch, shown.in_graph)
            elif shown.feed is feed:
                last = shown
    assert last is not None
    return Seen(engine, last, metadata)


def verified(regime: Regime = Regime.DOMINATING, dtype: KVCacheDtype = BF16, feed: Feed = Feed.CHAIN) -> Seen:
    """Requests of 11 and 3 tokens and 2 drafts each, that keep 4 keys: rows 2 and 3 are the second one's."""
    return _verified(regime, dtype, feed)


@cache
def _verified(regime: Regime, dtype: KVCacheDtype, feed: Feed) -> Seen:
    layer = {"regime": regime, "kv_cache_dtype": dtype}
    return seen(case(*TWO, Eager(mode=VERIFY), layer=layer, index_topk=4), feed)


@cache
def replayed(mode: ForwardMode, bucket: int, *events: Event) -> Seen:
    return seen(case(Capture(mode=mode, buckets=(bucket,)), *events, Replay(mode=mode)), Feed.GRAPH)


def outputs(name: str, change: Callable[[torch.Tensor], None], step: int = 0) -> Callable[[LayerObservation], None]:
    """Changes one tensor of one step."""

    def tamper(layer: LayerObservation) -> None:
        shown = layer.steps[step]
        kept = {"topk_indices": shown.positions, "topk_ragged": shown.ragged}
        tensor = kept[name] if name in kept else getattr(shown.outputs, name)
        assert tensor is not None
        change(tensor)

    return tamper


def put(name: str, place: tuple[int, ...], number: float, step: int = 0) -> Callable[[LayerObservation], None]:
    return outputs(name, lambda tensor: tensor.__setitem__(place, number), step)
