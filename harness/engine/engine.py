"""The device side of a serving engine: static graph inputs, padding, capture, replay, and probes in the graph.

What a captured graph reads is observed from inside it. Each graph ends with copies of every metadata field into the
engine's memory, taken from the addresses that the fields had at capture. Numbers that a backend prepares at another
address are therefore missed here, as the attention kernel in the same graph would miss them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness import fields
from nsa_oracle.harness.engine.drivers import Act
from nsa_oracle.harness.engine.guards import GuardWatch
from nsa_oracle.harness.engine.inputs import PoolInput, StaticInputs
from nsa_oracle.harness.engine.instances import Instances
from nsa_oracle.harness.engine.layer_engine import LayerEngine
from nsa_oracle.harness.engine.observations import (
    CallKind,
    Conditions,
    Feed,
    LayerLoad,
    LayerObservation,
    Observation,
    StepObservation,
)
from nsa_oracle.harness.engine.probes import BoundGraph, ProbeArena, observe, on_host
from nsa_oracle.harness.engine.second_backend import SecondBackend
from nsa_oracle.harness.engine.stress import Delivery, under_stress
from nsa_oracle.harness.errors import CaptureError
from nsa_oracle.harness.graphs.audit import Audit, AuditTally
from nsa_oracle.harness.graphs.runner import graph_runner
from nsa_oracle.harness.memory.poison import GuardedAllocations, PoisonedAllocations
from nsa_oracle.harness.protocol import BackendFactory, LayerFactory
from nsa_oracle.harness.scenarios.batch import Batch, choose_bucket
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Event, Replay, Scenario, graph_mode
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.harness.subjects.declarations import declarations_of
from nsa_oracle.reference.types import ForwardMode, Metadata


class Engine:
    """Runs the events of one scenario against one backend, and its attention layer if any, on one device."""

    def __init__(
        self,
        scenario: Scenario,
        factory: BackendFactory,
        layer_factory: LayerFactory,
        device: torch.device,
        conditions: Conditions,
    ) -> None:
        setup, sentinel = scenario.setup, conditions.sentinel
        self.setup = setup
        self.device = device
        self.conditions = conditions
        self.config = setup.backend_config()
        self.declarations = declarations_of(factory)
        self.world = World(scenario, sentinel)
        self.runner = graph_runner(device)
        self.graphs: dict[tuple[ForwardMode, int], BoundGraph] = {}
        self.audit = AuditTally()  # of all captured graphs
        self.calling: CallKind | None = None  # by the event that runs, or ran last
        self._preparations = 1  # of each batch
        self._replayed: list[BoundGraph] = []  # graphs whose second replay has been checked

        # 1. The engine's inputs. A batch larger than every bucket runs eagerly and uses them too.
        buckets = [bucket for event in scenario.events if isinstance(event, Capture) for bucket in event.buckets]
        max_bs = max(buckets, default=1)
        self._delivery = Delivery(device, late=conditions.stress)
        capacity = max(max_bs, setup.pool_size + setup.eager_padding)
        self.inputs = StaticInputs(setup.inputs, capacity, sentinel, self._delivery, setup.num_draft_tokens)
        self._pool = PoolInput(setup, sentinel, self._delivery)
        self._pool.send(self.world.req_to_token)
        self._delivery.deliver()

        # 2. The backend. Each of its allocations lies between guard bands. A second one leaves its traces before it.
        self.guards = GuardWatch()
        self.second = SecondBackend(factory, self.declarations, scenario, max_bs, sentinel, device)
        with GuardedAllocations(sentinel, device) as guard:
            config, pool = setup.backend_config(), self._pool.tensor  # not our configuration: a backend may change it
            inputs = lambda: [*self._pool.memory(), *self.inputs.memory()]  # noqa: E731
            self.instances = Instances(factory, self.declarations, setup, config, pool, scenario.optimizations, inputs)
            self.instances.allocate(max_bs, max_bs * setup.num_draft_tokens)
        self.guards.keep(guard.buffers)

        # 3. The layer, and the expected content of its caches.
        self.layer: LayerEngine | None = None
        if setup.layer is not None:
            max_rows = max_bs * setup.num_draft_tokens
            self.layer = LayerEngine(
                scenario, setup.layer, layer_factory, self.world, device, conditions, max_rows, self.num_steps
            )

    def num_steps(self, batch: Batch) -> int:
        """Number of steps, and of passes of the layer, in a call of ``batch``."""
        return self.instances.serving(batch.mode).running(batch)

    def run(self, event: Event) -> Iterator[Observation | LayerObservation]:
        """Apply one event and yield the observations of its calls, metadata first: a caller may stop if it is wrong."""
        self.calling = None
        batch = self.world.apply(event)
        self._pool.send(self.world.req_to_token)
        self._preparations = getattr(event, "preparations", 1)
        match event:
            case Capture():
                for bs in event.buckets if self.conditions.graphs else ():
                    self.capture(event.mode, bs)
            case Replay() | Eager():
                assert batch is not None
                bucket = _bucket_of(event, batch, self.graphs)
                self.calling = CallKind(batch.mode, bucket is not None)
                for _ in range(event.times if isinstance(event, Replay) else 1):
                    yield from self._call(batch, bucket)

    def _call(self, batch: Batch, bucket: int | None) -> Iterator[Observation | LayerObservation]:
        """Make one replay or eager call, with new keys for the layer."""
        load = None if self.layer is None else self.layer.load(batch)
        if bucket is None:
            yield from self.call_eagerly(batch, load)
        else:
            yield from self.replay(bucket, batch, load)
            yield from self._replay_again(bucket, batch, load)
            if load is not None and self.layer is not None and self.layer.has_unjudged_stages():
                yield self.layer.run_stages(self._padded(batch, bucket), batch.size, load, True, self.guards)

    def _replay_again(self, bs: int, batch: Batch, load: LayerLoad | None) -> Iterator[LayerObservation]:
        """Replay again without a preparation, to observe the layer. Once per graph, because it costs a replay."""
        bound = self.graphs[graph_mode(batch.mode), bs]
        if load is None or self.conditions.stress or bound in self._replayed:
            return
        self._replayed.append(bound)
        padded = self._padded(batch, bs)
        bound.spoil_outputs()
        bound.graph.replay()
        yield LayerObservation(padded, batch.size, Feed.GRAPH, bs, load, bound.shown_steps(), again=True)

    def replay(self, bs: int, batch: Batch, load: LayerLoad | None) -> Iterator[Observation | LayerObservation]:
        """Replay the graph of the batch's mode and bucket ``bs``. Raises CaptureError if it uses released memory."""
        sentinel, spoilt = self.conditions.sentinel, self.conditions.spoilt
        bound = self.graphs[graph_mode(batch.mode), bs]
        _refuse_released_memory(bound, f"{batch.mode.value}, bucket {bs}")
        padded, serving = self._padded(batch, bs), self.instances.serving(batch.mode)
        forward_batch = self.inputs.load(padded)
        bound.poison(sentinel, self.setup.page_size)
        if self.layer is not None:
            assert load is not None
            self.layer.driver.load(load, bs * self.config.rows_per_request(batch.mode))
        # No guard bands here: checking them would synchronise streams, and keeping them would prevent memory reuse.
        with under_stress(self._delivery):
            with PoisonedAllocations(sentinel, self.device):
                serving.prepare_replay(forward_batch, padded, self._preparations)
            self.second.prepare(padded, in_graph=True)
            bound.graph.spoil(spoilt)
            bound.graph.replay()
        shown, stress = serving.shown_metadata(Act.REPLAY, batch), self.conditions.stress
        yield Observation(padded, batch.size, True, bound.observe(shown, stress))
        if self.layer is None:
            if bound.changes_when_replayed_again(sentinel, spoilt, len(shown)):
                yield Observation(padded, batch.size, True, bound.observe(shown, stress), again=True)
        else:
            assert load is not None
            steps = bound.shown_steps()
            modified = self.layer.driver.modified_input() or bound.modified_field()
            yield LayerObservation(padded, batch.size, Feed.GRAPH, bs, load, steps, modified)

    def call_eagerly(
        self, batch: Batch, load: LayerLoad | None, feeds: Sequence[Feed] = (Feed.ISOLATED, Feed.CHAIN)
    ) -> Iterator[Observation | LayerObservation]:
        """Prepare ``batch`` without a graph. Then run the layer stage by stage and as a whole, as ``feeds`` says."""
        raw_bs, batch = batch.size, self.declarations.padded_eagerly(batch, self.setup)
        forward_batch, own = self.inputs.load(batch), self.declarations.own_names
        serving = self.instances.serving(batch.mode)
        with under_stress(self._delivery):
            with GuardedAllocations(self.conditions.sentinel, self.device) as guard:
                serving.prepare_eagerly(forward_batch, batch, self._preparations)
            self.second.prepare(batch, in_graph=False)
            metadata = serving.shown_metadata(Act.EAGER, batch)
            seen = [{name: tensor.clone() for name, tensor in fields.tensors(m, own).items()} for m in metadata]
        self.guards.check(guard.buffers, metadata)
        yield Observation(batch, raw_bs, False, _observed(metadata, seen, own))
        if self.layer is not None:
            assert load is not None
            for feed in feeds:
                if feed is Feed.ISOLATED:
                    yield self.layer.run_stages(batch, batch.size, load, False, self.guards)
                else:
                    yield self.layer.run_chain(batch, load, metadata, self.guards)

    def capture(self, mode: ForwardMode, bs: int, batch: Batch | None = None) -> None:
        """Capture the preparation, if the backend records it in the graph, the layer, and the probes.

        The batch is padding alone, as in servers, unless a ``batch`` of ``bs`` requests is given. Raises CaptureError
        for an operation that the capture refuses and for a fault that the audit of the graph finds.
        """
        if batch is None:
            batch = self._padded(Batch(mode, (), (), (), ()), bs)
        forward_batch, serving = self.inputs.load(batch), self.instances.serving(mode)
        self._delivery.deliver()
        self.second.bind(batch)
        with GuardedAllocations(self.conditions.sentinel, self.device) as guard:
            serving.bind(forward_batch)
        metadata = tuple(serving.shown_metadata(Act.CAPTURE, batch))
        self.guards.check_and_keep(guard.buffers, metadata)

        own = self.declarations.own_names
        arena = ProbeArena(metadata, self.device, with_layer=self.layer is not None, own=own)
        layer = None if self.layer is None else self.layer.prepare_capture(bs * self.config.rows_per_request(mode))

        def forward() -> None:
            serving.prepare_in_graph(forward_batch)
            arena.copy_metadata()  # what attention would read, from the addresses that it uses
            if layer is not None:
                layer.forward(metadata)
                arena.copy_metadata_behind_layer()

        assert forward_batch.seq_lens_cpu is not None
        graph = self.runner.capture(forward, host_tensors=[forward_batch.seq_lens_cpu])
        audit = graph.audit()
        self.audit.add(audit.tally)
        _refuse_fault(audit, f"{mode.value}, bucket {bs}")
        steps = () if layer is None else layer.steps
        self.graphs[mode, bs] = BoundGraph(graph, metadata, arena.probes, arena.arena, arena.arena_behind, steps, own)

    def place(self, req_to_token: NDArray[np.int32]) -> None:
        """Use the page mapping ``req_to_token`` of another engine's requests."""
        self.world.req_to_token[:] = req_to_token
        self._pool.send(req_to_token)

    def modified_input(self) -> str | None:
        """The name of an input that the backend has modified, or None."""
        self._delivery.deliver()
        return "req_to_token" if self._pool.is_modified() else self.inputs.modified()

    def modified_input_of_layer(self) -> str | None:
        """The name of an input that the layer has modified, in a capture too, or None."""
        return None if self.layer is None else self.layer.modified_input()

    def _padded(self, batch: Batch, bs: int) -> Batch:
        return self.declarations.padded(batch, bs, self.setup)


def _bucket_of(event: Replay | Eager, batch: Batch, graphs: Iterable[tuple[ForwardMode, int]]) -> int | None:
    """The bucket of the graph that serves the batch. None for an eager call, and for a replay that fits no graph."""
    if isinstance(event, Eager):
        return None
    return choose_bucket(event.bucket, batch.size, [bs for mode, bs in graphs if mode is event.mode])


def _refuse_released_memory(bound: BoundGraph, where: str) -> None:
    if released := bound.graph.released():
        reason = f"the graph uses released memory ({released}): a later allocation may get it"
        raise CaptureError("capture", where, reason)


def _refuse_fault(audit: Audit, where: str) -> None:
    if audit.fault is not None:
        raise CaptureError(audit.fault.part, where, audit.fault.reason)


def _observed(
    metadata: Sequence[Metadata], seen: Sequence[dict[str, torch.Tensor]], own: Sequence[str]
) -> tuple[StepObservation, ...]:
    """The metadata of an eager call. seen: copies of its fields, on the device."""
    return tuple(
        observe(m, {name: on_host(tensor) for name, tensor in tensors.items()}, {}, own)
        for m, tensors in zip(metadata, seen, strict=True)
    )
