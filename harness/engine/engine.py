"""The device side of a serving engine: static graph inputs, padding, capture, replay, and probes in the graph.

What a captured graph really reads is observed from inside it: each graph ends with copies of every metadata field,
taken from the addresses the fields had at capture, into memory of the engine. A backend that prepares the right
numbers in the wrong place is seen as the attention kernel behind it would see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness import fields
from nsa_oracle.harness.content.edge_keys import MadeUpKeys, made_up_keys
from nsa_oracle.harness.content.edge_logits import Selection, selection
from nsa_oracle.harness.engine.cache_state import CacheState, as_bytes
from nsa_oracle.harness.engine.drivers import driver_for
from nsa_oracle.harness.engine.expected import ExpectedLayer, expected_metadata
from nsa_oracle.harness.engine.inputs import StaticInputs
from nsa_oracle.harness.engine.isolated import Selected, Stages, Stored
from nsa_oracle.harness.engine.layer_driver import Feed, LayerDriver, LayerLoad, LayerStep, copied, dense_copy, load_of
from nsa_oracle.harness.engine.read_only import Modified
from nsa_oracle.harness.engine.stress import Delivery, late_inputs, slow_side_streams
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.graphs.audit import AuditTally
from nsa_oracle.harness.graphs.cuda import CapturedGraph, CaptureError, graph_runner
from nsa_oracle.harness.memory.poison import (
    NAN_BYTE,
    NAN_WORD,
    BandedInput,
    GuardedAllocations,
    GuardedBuffer,
    PoisonedAllocations,
    fill_dead_cells,
    overrun,
)
from nsa_oracle.harness.protocol import BackendFactory, LayerFactory
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Event, Replay, Scenario
from nsa_oracle.harness.scenarios.world import Batch, World, choose_bucket
from nsa_oracle.harness.subjects.results import WrongResult, told
from nsa_oracle.reference.types import ForwardMode, Metadata


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
class Probe:
    """Where a graph leaves its copy of one field of one step."""

    offset: int  # in the probe arena, in int32 words
    shape: torch.Size
    address: int  # of the field itself, at capture

    def view(self, arena: torch.Tensor) -> torch.Tensor:
        return arena[self.offset : self.offset + self.shape.numel()].view(self.shape)


@dataclass(frozen=True, eq=False)
class BoundGraph:
    """A captured graph with the metadata it reads and the probes that tell what it read, by step and field."""

    graph: CapturedGraph
    metadata: tuple[Metadata, ...]
    probes: tuple[dict[str, Probe], ...]
    arena: torch.Tensor  # int32, on the device: one transfer brings all probes to the host
    arena_behind: torch.Tensor  # the same fields once the layer has run; empty without one
    layer_steps: tuple[LayerStep, ...]  # the graph's copies of what each pass of the layer computed

    def modified_field(self) -> Modified | None:
        """A field of the metadata that the layer has written to, or None."""
        if not len(self.arena_behind) or torch.equal(self.arena, self.arena_behind):
            return None
        before, after = self.arena.cpu(), self.arena_behind.cpu()
        return next(
            Modified(step, name)
            for step, probes in enumerate(self.probes)
            for name, probe in probes.items()
            if not torch.equal(probe.view(before), probe.view(after))
        )


class Engine:
    """Runs the events of one scenario against one backend, and the layer behind it, on one device.

    sentinel: what unspecified integers hold. poison: the byte that unwritten cache memory is made of.
    graphs: False runs eagerly what the scenario would replay. stress: see ``harness.stress``; only a GPU has streams.
    """

    def __init__(
        self,
        scenario: Scenario,
        factory: BackendFactory,
        layer_factory: LayerFactory,
        device: torch.device,
        sentinel: int,
        poison: int,
        graphs: bool = True,
        stress: bool = False,
    ) -> None:
        setup = scenario.setup
        self.setup = setup
        self.seed = scenario.seed
        self.device = device
        self.sentinel = sentinel
        self.config = setup.backend_config()
        self.use_graphs = graphs
        self.stress = stress
        # What free memory holds at a replay: 0 times a number is 0, and the word of NaN is what "no slot" is, too.
        self._spoilt = sentinel if stress else NAN_WORD
        self._calls = 0
        self.world = World(scenario, sentinel)
        self.runner = graph_runner(device)
        self.graphs: dict[tuple[ForwardMode, int], BoundGraph] = {}
        self.audit = AuditTally()  # of the graphs' nodes
        self._replayed: list[BoundGraph] = []  # those that were replayed once more

        # 1. The engine's own memory. A batch that outgrows every bucket runs eagerly from the same inputs.
        buckets = [bucket for event in scenario.events if isinstance(event, Capture) for bucket in event.buckets]
        max_bs = max(buckets, default=1)
        self._delivery = Delivery(device, late=stress)
        self.inputs = StaticInputs(setup.inputs, max(max_bs, setup.pool_size), sentinel, self._delivery)
        margin = 3 if setup.inputs.wide_req_to_token else 0  # columns of the wider tensor on either side
        width = setup.max_context_len
        far = setup.inputs.far_req_to_token and setup.pool_size > 1
        self._pool = BandedInput((setup.pool_size, width + 2 * margin), torch.int32, sentinel, device, far)
        self._columns = slice(margin, margin + width)
        self.req_to_token = self._pool.tensor[:, self._columns]
        self._sync_req_to_token()
        self._delivery.deliver()

        # 2. The backend, every allocation of it between guard bands.
        self._guarded: list[GuardedBuffer] = []  # buffers that the backend still holds
        self._overrun: GuardedBuffer | None = None
        with GuardedAllocations(sentinel, device) as guard:
            self.backend = factory(self.config, self.req_to_token, scenario.optimizations)
            self.driver = driver_for(setup.drive, self.backend, self.config)
            self._check_steps()
            self.driver.allocate(max_bs, max_bs * setup.num_draft_tokens)
        self._guarded += guard.buffers

        # 3. The layer behind it, and what its caches must hold.
        self.layer: LayerDriver | None = None
        if setup.layer is not None:
            attention = setup.layer.attention_config()
            max_rows = max_bs * setup.num_draft_tokens
            layer = layer_factory(self.config, attention)
            self.layer = LayerDriver(setup, layer, device, poison, max_rows, setup.num_steps)
            self.cache_state = CacheState(setup, scenario.seed, poison, device)
            self.expected_layer = ExpectedLayer(self.config, attention)
            self._made_up = 0  # sets of rows for the store and for top-k

    def run(self, event: Event) -> Iterator[Observation | LayerObservation]:
        """Apply one event to the world and the backend; yield what each replay or eager call showed.

        Metadata comes first: whoever finds it wrong need not ask for what the layer made of it.
        """
        batch = self.world.apply(event)
        self._sync_req_to_token()
        match event:
            case Capture():
                for bs in event.buckets if self.use_graphs else ():
                    self.capture(event.mode, bs)
            case Replay():
                assert batch is not None
                captured = [bs for mode, bs in self.graphs if mode is event.mode]
                bucket = choose_bucket(event.bucket, batch.size, captured)
                for _ in range(event.times):
                    yield from self._call(batch, bucket)
            case Eager():
                assert batch is not None
                yield from self._call(batch, None)

    def _call(self, batch: Batch, bucket: int | None) -> Iterator[Observation | LayerObservation]:
        """One replay or eager call, with new keys for the layer."""
        load = None
        if self.layer is not None:
            self.cache_state.settle(self.world)
            load = load_of(self.cache_state, self.cache_state.passes(self.world, batch, self.config))
            self.cache_state.apply(load.passes)
        if bucket is None:
            yield from self.call_eagerly(batch, load)
        else:
            yield from self.replay(bucket, batch, load)
            yield from self._replay_again(bucket, batch, load)

    def _replay_again(self, bs: int, batch: Batch, load: LayerLoad | None) -> Iterator[LayerObservation]:
        """The layer once more, without a preparation in between; once for each graph, since it costs a replay."""
        bound = self.graphs[_graph_mode(batch.mode), bs]
        if self.layer is None or load is None or self.stress or bound in self._replayed:
            return
        self._replayed.append(bound)
        padded = batch.padded(bs, self.config.speculative_num_draft_tokens)
        _spoil_outputs(bound)
        bound.graph.replay()
        yield LayerObservation(padded, batch.size, Feed.GRAPH, bs, load, _shown_steps(bound), again=True)

    def replay(self, bs: int, batch: Batch, load: LayerLoad | None) -> Iterator[Observation | LayerObservation]:
        """Replay the graph of the batch's mode and bucket ``bs``."""
        bound = self.graphs[_graph_mode(batch.mode), bs]
        if dangling := bound.graph.dangling_bytes():
            reason = f"the graph uses {dangling} bytes that nobody holds any more: a later allocation may get them"
            raise CaptureError("capture", f"{batch.mode.value}, bucket {bs}", reason)
        padded = batch.padded(bs, self.config.speculative_num_draft_tokens)
        forward_batch = self.inputs.load(padded)
        self._poison(bound)
        if self.layer is not None:
            assert load is not None
            self.layer.load(load)
        # Without guard bands: to look at them would wait for streams, to keep them would keep memory from being reused.
        with self._under_stress():
            with PoisonedAllocations(self.sentinel, self.device):
                self.driver.prepare_replay(forward_batch)
            bound.graph.spoil(self._spoilt)
            bound.graph.replay()
        yield Observation(padded, batch.size, True, self._observe_graph(bound))
        if self.layer is None:
            # Once more without a preparation in between: a graph that counts on one, or adds to itself, shows it.
            first = bound.arena.clone()
            bound.arena.fill_(self.sentinel)
            bound.graph.spoil(self._spoilt)
            bound.graph.replay()
            if not torch.equal(bound.arena, first):
                yield Observation(padded, batch.size, True, self._observe_graph(bound))
        if self.layer is not None:
            assert load is not None
            steps = _shown_steps(bound)
            modified = self.layer.modified_input() or bound.modified_field()
            yield LayerObservation(padded, batch.size, Feed.GRAPH, bs, load, steps, modified)

    def call_eagerly(
        self, batch: Batch, load: LayerLoad | None, feeds: Sequence[Feed] = (Feed.ISOLATED, Feed.CHAIN)
    ) -> Iterator[Observation | LayerObservation]:
        """Prepare ``batch`` without a graph; then each stage of the layer by itself, then the whole layer."""
        forward_batch = self.inputs.load(batch)
        with self._under_stress():
            with GuardedAllocations(self.sentinel, self.device) as guard:
                self.driver.prepare_eagerly(forward_batch)
            metadata = self._shown_metadata()
            seen = [{name: tensor.clone() for name, tensor in fields.tensors(m).items()} for m in metadata]
        self._overrun = self._overrun or overrun(guard.buffers)
        yield Observation(
            batch,
            batch.size,
            False,
            tuple(
                self._observe(m, {name: tensor.cpu() for name, tensor in tensors.items()}, {})
                for m, tensors in zip(metadata, seen, strict=True)
            ),
        )
        if self.layer is not None:
            assert load is not None
            for feed in feeds:
                yield self._isolated(batch, load) if feed is Feed.ISOLATED else self._chained(batch, load, metadata)

    def _isolated(self, batch: Batch, load: LayerLoad) -> LayerObservation:
        """Each stage of each pass, given what the reference says of the stage before; and top-k on other logits."""
        assert self.layer is not None
        stages = Stages(self.layer, self.expected_layer, self.sentinel)
        steps = stages.run(load, expected_metadata(self.config, self.world.req_to_token, batch, in_graph=False))
        self._made_up += 1
        stored = stages.store(self._keys())
        selected = stages.select(self._selection(), ragged=batch.mode is ForwardMode.EXTEND)
        self._overrun = self._overrun or overrun(stages.guard.buffers)
        return LayerObservation(batch, batch.size, Feed.ISOLATED, None, load, steps, stages.modified, selected, stored)

    def _selection(self) -> Selection:
        """Others at every call, and in a scenario's other run."""
        return selection(self.setup, self.seed, self.cache_state.poison, self._made_up, self.sentinel)

    def _keys(self) -> MadeUpKeys:
        """Likewise."""
        return made_up_keys(self.setup, self.cache_state.config, self.seed, self.cache_state.poison, self._made_up)

    def _chained(self, batch: Batch, load: LayerLoad, metadata: Sequence[Metadata]) -> LayerObservation:
        """Every pass as a whole, on the backend's own metadata."""
        assert self.layer is not None
        self.layer.load_caches(load.caches)
        guard = GuardedAllocations(self.sentinel, self.device)
        shown = [
            self.layer.forward_eagerly(a_pass, step_metadata, guard)
            for a_pass, step_metadata in zip(load.passes, metadata, strict=True)
        ]
        self._overrun = self._overrun or overrun(guard.buffers)
        modified = next((modified for _, modified in shown if modified is not None), None)
        steps = tuple(step for step, _ in shown)
        return LayerObservation(batch, batch.size, Feed.CHAIN, None, load, steps, modified)

    def _check_steps(self) -> None:
        """Raises WrongResult unless there is a single-step backend for each step."""
        seen, wanted = len(self.backend.attn_backends), self.config.speculative_num_steps
        if seen != wanted:
            raise WrongResult(Finding(Kind.SHAPE, "attn_backends", f"{seen} steps", f"{wanted} steps"))

    def _shown_metadata(self) -> list[Metadata]:
        """The metadata of each step, as the backend shows it now."""
        self._check_steps()
        return [getattr(step, "forward_metadata", None) for step in self.backend.attn_backends]  # type: ignore[misc]

    def place(self, req_to_token: NDArray[np.int32]) -> None:
        """Take over the page mapping of another engine's requests."""
        self.world.req_to_token[:] = req_to_token
        self._sync_req_to_token()

    def overrun(self) -> GuardedBuffer | None:
        """A buffer of the backend that something was written around, or None."""
        return self._overrun or overrun(self._guarded)

    def modified_input(self) -> str | None:
        """The name of an input that the backend has written to, or None."""
        self._delivery.deliver()
        if self._pool.is_modified():
            return "req_to_token"
        written = None if self.layer is None else self.layer.modified_input()  # by a capture, too
        return self.inputs.modified() or (None if written is None else written.name)

    def _sync_req_to_token(self) -> None:
        self._pool.content[:, self._columns] = torch.from_numpy(self.world.req_to_token)
        self._delivery.send(self._pool.memory, self._pool.expected)

    def _under_stress(self) -> AbstractContextManager[None]:
        """Around a preparation and what is to come after it: inputs arrive late, or else other streams are slow."""
        self._calls += 1
        if not self.stress or self._calls % 2:
            return late_inputs(self._delivery)
        self._delivery.deliver()
        return slow_side_streams(self.device)

    def _check_guards(self, guard: GuardedAllocations, metadata: Sequence[Metadata]) -> None:
        """Check what a call allocated while it is there, and keep watching what the metadata still uses."""
        self._overrun = self._overrun or overrun(guard.buffers)
        held = {t.untyped_storage().data_ptr() for step in metadata for t in fields.tensors(step).values()}
        self._guarded += [buffer for buffer in guard.buffers if buffer.address in held]
        guard.buffers.clear()  # what else it made lives as long as the backend holds it

    def capture(self, mode: ForwardMode, bs: int, batch: Batch | None = None) -> None:
        """Capture the preparation, where the backend wants it in the graph, the layer, and the probes.

        On padding alone, as servers do, unless ``batch``, of ``bs`` requests, is given. Raises CaptureError for what
        the capture refuses, and for what its graph holds and must not.
        """
        if batch is None:
            batch = Batch(mode, (), (), (), ()).padded(bs, self.config.speculative_num_draft_tokens)
        forward_batch = self.inputs.load(batch)
        self._delivery.deliver()
        with GuardedAllocations(self.sentinel, self.device) as guard:
            self.driver.bind(forward_batch)
        metadata = tuple(self._shown_metadata())
        self._check_guards(guard, metadata)

        # Lay the probes out in one arena, so that one transfer brings them to the host.
        probes, words = [], 0
        for step_metadata in metadata:
            step_probes = {}
            for name, tensor in fields.tensors(step_metadata).items():
                step_probes[name] = Probe(words, tensor.shape, tensor.data_ptr())
                words += tensor.numel()
            probes.append(step_probes)
        arena = torch.empty(words, dtype=torch.int32, device=self.device)
        behind = torch.empty(words if self.layer is not None else 0, dtype=torch.int32, device=self.device)
        read = [tensor for step_metadata in metadata for tensor in fields.tensors(step_metadata).values()]
        write = [probe.view(arena) for step_probes in probes for probe in step_probes.values()]

        kept: dict[int, LayerStep] = {}
        rows = bs * self.config.rows_per_request(mode)
        if self.layer is not None:
            self.layer.reserve()
            self.layer.load(LayerLoad((), dense_copy(self.cache_state.truth)))

        def forward() -> None:
            self.driver.prepare_in_graph(forward_batch)
            if read:  # a backend without any metadata is told so when it is looked at
                torch._foreach_copy_(write, read)  # what attention would read, at the addresses it would read it from
            if self.layer is None:
                return
            for step, step_metadata in enumerate(metadata):
                shown = self.layer.forward(step, step_metadata, rows)
                if step not in kept:  # the warm-up: these stay where they are
                    kept[step] = LayerStep(copied(shown.outputs), shown.caches)
                for ours, theirs in zip(vars(kept[step].outputs).values(), vars(shown.outputs).values(), strict=True):
                    ours.copy_(theirs)  # now: the next pass may use the same memory
            torch._foreach_copy_([probe.view(behind) for step_probes in probes for probe in step_probes.values()], read)

        assert forward_batch.seq_lens_cpu is not None
        graph = self.runner.capture(forward, host_tensors=[forward_batch.seq_lens_cpu])
        audit = graph.audit()
        self.audit.add(audit.tally)
        if audit.fault is not None:
            raise CaptureError(audit.fault.part, f"{mode.value}, bucket {bs}", audit.fault.reason)
        self.graphs[mode, bs] = BoundGraph(graph, metadata, tuple(probes), arena, behind, tuple(kept.values()))

    def _poison(self, bound: BoundGraph) -> None:
        """Before a replay: nothing is left in the probes, nor in table cells that the graph's last batch had dead."""
        bound.arena.fill_(self.sentinel)
        _spoil_outputs(bound)
        seen: set[int] = set()
        for metadata in bound.metadata:
            tensors = fields.tensors(metadata)
            lengths = tensors.get("seqlens_expanded")
            for name, page_size in (("page_table_1", 1), ("real_page_table", self.setup.page_size)):
                table = tensors.get(name)
                if lengths is None or table is None or {lengths.dtype, table.dtype} != {torch.int32}:
                    continue
                if len(table) != len(lengths) or 0 in table.stride():
                    continue  # not laid out as the contract says; the comparison will tell
                if table.data_ptr() not in seen:  # steps may share one buffer
                    seen.add(table.data_ptr())
                    fill_dead_cells(table, -(-lengths // page_size), self.sentinel)

    def _observe_graph(self, bound: BoundGraph) -> tuple[StepObservation, ...]:
        """What the probes of a replayed graph hold."""
        arena = bound.arena.cpu()
        if self.stress and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # nothing that a stream still does may reach into the next call
        return tuple(
            self._observe(metadata, {name: probe.view(arena) for name, probe in probes.items()}, probes)
            for metadata, probes in zip(self._shown_metadata(), bound.probes, strict=True)
        )

    def _observe(self, metadata: Metadata, seen: dict[str, torch.Tensor], probes: dict[str, Probe]) -> StepObservation:
        held = fields.tensors(metadata)
        others = {name: thing for name, thing in fields.held(metadata).items() if name not in held}
        return StepObservation(
            tensors=seen,
            dtypes={name: tensor.dtype for name, tensor in held.items()},
            devices={name: tensor.device for name, tensor in held.items()},
            host_scalars={name: getattr(metadata, name, None) for name in fields.HOST_SCALARS},
            moved=tuple(n for n, probe in probes.items() if n not in held or held[n].data_ptr() != probe.address),
            odd={name: told(thing) for name, thing in others.items() if thing is not None},
        )


def _shown_steps(bound: BoundGraph) -> tuple[LayerStep, ...]:
    """Copies of what a replayed graph's passes have left."""
    return tuple(LayerStep(copied(kept.outputs), dense_copy(kept.caches)) for kept in bound.layer_steps)


def _spoil_outputs(bound: BoundGraph) -> None:
    for step in bound.layer_steps:
        for tensor in vars(step.outputs).values():
            as_bytes(tensor.view(-1)).fill_(NAN_BYTE)


def _graph_mode(mode: ForwardMode) -> ForwardMode:
    """An idle rank replays the DECODE graph."""
    return ForwardMode.DECODE if mode is ForwardMode.IDLE else mode
