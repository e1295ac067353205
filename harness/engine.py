"""The device side of a serving engine: static graph inputs, padding, capture, replay, and probes in the graph.

What a captured graph really reads is observed from inside it: each graph ends with copies of every metadata field,
taken from the addresses the fields had at capture, into memory of the engine. A backend that prepares the right
numbers in the wrong place is seen as the attention kernel behind it would see it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from harness import fields
from harness.driver import driver_for
from harness.expected import ExpectedLayer, expected_metadata
from harness.graph import CapturedGraph, CaptureError, graph_runner
from harness.layer import CacheState, as_bytes, far_apart, map_tensors
from harness.layer_driver import LayerDriver, LayerLoad, dense_copy, load_of
from harness.poison import NAN_BYTE, GuardedAllocations, GuardedBuffer, fill_dead_cells, overrun
from harness.protocol import BackendFactory, LayerFactory
from harness.scenario import Capture, Eager, Event, Inputs, IntDtype, Replay, Scenario
from harness.world import Batch, World, choose_bucket
from reference.types import AttentionCaches, AttentionOutputs, ForwardBatch, ForwardMode, Metadata, SpecInfo

INT_DTYPES = {IntDtype.INT32: torch.int32, IntDtype.INT64: torch.int64}


@dataclass(frozen=True)
class StepObservation:
    """Metadata of one step as a consumer sees it.

    tensors: host copies by field name. moved: fields that are no longer where the graph reads them.
    """

    tensors: dict[str, torch.Tensor]
    dtypes: dict[str, torch.dtype]
    devices: dict[str, torch.device]
    host_scalars: dict[str, object]
    moved: tuple[str, ...] = ()


@dataclass(frozen=True)
class Observation:
    """One replay (``in_graph``) or eager call; its tensors hold until the engine's next one.

    ``batch`` is padded to the graph's bucket; its first ``raw_bs`` requests are real.
    """

    batch: Batch
    raw_bs: int
    in_graph: bool
    steps: tuple[StepObservation, ...]


class Feed(enum.Enum):
    """What the stages of a layer were given."""

    GRAPH = "captured chain"  # the backend's metadata, and each stage the one before, all in one graph
    CHAIN = "eager chain"  # likewise, without a graph
    ISOLATED = "isolated stage"  # the reference's metadata, and its result of the stage before


@dataclass(frozen=True)
class LayerStep:
    """What one pass of the layer computed. Isolated stages also show top-k before each of its transforms."""

    outputs: AttentionOutputs
    positions: torch.Tensor | None = None
    ragged: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerObservation:
    """The layer's side of one replay or eager call; rows are those of the padded batch, real ones first.

    caches: dense, as the passes left them.
    """

    batch: Batch
    raw_bs: int
    feed: Feed
    bucket: int | None
    load: LayerLoad
    steps: tuple[LayerStep, ...]
    caches: AttentionCaches


@dataclass(frozen=True)
class Probe:
    """Where a graph leaves its copy of one field of one step."""

    offset: int  # in the probe arena, in int32 words
    shape: torch.Size
    address: int  # of the field itself, at capture

    def view(self, arena: torch.Tensor) -> torch.Tensor:
        return arena[self.offset : self.offset + self.shape.numel()].view(self.shape)


@dataclass(frozen=True)
class BoundGraph:
    """A captured graph with the metadata it reads and the probes that tell what it read, by step and field."""

    graph: CapturedGraph
    metadata: tuple[Metadata, ...]
    probes: tuple[dict[str, Probe], ...]
    arena: torch.Tensor  # int32, on the device: one transfer brings all probes to the host
    outputs: tuple[AttentionOutputs, ...]  # the graph's copies of what each pass of the layer computed


class StaticInput:
    """One input tensor at a fixed address, and a host copy of all memory around it."""

    def __init__(
        self, name: str, dtype: IntDtype, capacity: int, columns: int, sentinel: int, device: torch.device
    ) -> None:
        self.name = name
        self._expected = torch.full((capacity, columns), sentinel, dtype=INT_DTYPES[dtype])
        self._base = self._expected.to(device, copy=True)
        self._column = columns // 2

    def write(self, numbers: Sequence[int]) -> torch.Tensor:
        """Put ``numbers`` at the front and return that part; what lies behind stays as earlier batches left it."""
        count = len(numbers)
        self._expected[:count, self._column] = torch.tensor(numbers, dtype=self._expected.dtype)
        self._base.copy_(self._expected)
        return self._base[:count, self._column]

    def is_modified(self) -> bool:
        return not torch.equal(self._base.cpu(), self._expected)


class StaticInputs:
    """The input tensors of all graphs, at fixed addresses. A smaller batch leaves the rest as earlier ones did."""

    def __init__(self, inputs: Inputs, capacity: int, sentinel: int, device: torch.device) -> None:
        def static(name: str, dtype: IntDtype, columns: int) -> StaticInput:
            return StaticInput(name, dtype, capacity, columns if inputs.strided else 1, sentinel, device)

        # A strided input is a column of several, of another number for each: no stride may stand for another.
        self.seq_lens = static("seq_lens", inputs.seq_lens, 3)
        self.req_pool_indices = static("req_pool_indices", inputs.req_pool_indices, 2)
        self.accept_length = static("accept_length", inputs.accept_length, 4)
        self.extend_seq_lens = static("extend_seq_lens", inputs.accept_length, 5)
        self.extend_prefix_lens = static("extend_prefix_lens", inputs.accept_length, 6)

    def load(self, batch: Batch) -> ForwardBatch:
        """Write the batch into the static tensors and return it as the engine hands it to a backend."""
        mirror = None if batch.seq_lens_cpu is None else torch.tensor(batch.seq_lens_cpu, dtype=torch.int64)
        accept_length = self.accept_length.write(batch.accept_lengths)
        drafts = batch.mode in (ForwardMode.DRAFT_EXTEND, ForwardMode.DRAFT_EXTEND_V2)
        forward_batch = ForwardBatch(
            forward_mode=batch.mode,
            batch_size=batch.size,
            req_pool_indices=self.req_pool_indices.write(batch.pool_rows),
            seq_lens=self.seq_lens.write(batch.seq_lens),
            seq_lens_cpu=mirror,
            seq_lens_sum=None if batch.seq_lens_cpu is None else sum(batch.seq_lens_cpu),
            spec_info=SpecInfo(accept_length) if drafts else None,
        )
        if batch.mode is not ForwardMode.EXTEND:
            return forward_batch
        prefix_lens = tuple(s - e for s, e in zip(batch.seq_lens, batch.extend_lens, strict=True))
        return dataclasses.replace(
            forward_batch,
            extend_seq_lens=self.extend_seq_lens.write(batch.extend_lens),
            extend_prefix_lens=self.extend_prefix_lens.write(prefix_lens),
            extend_seq_lens_cpu=batch.extend_lens,
            extend_prefix_lens_cpu=prefix_lens,
        )

    def modified(self) -> str | None:
        """The name of an input whose memory is not as the engine left it, or None."""
        inputs = (value for value in vars(self).values() if isinstance(value, StaticInput))
        return next((static.name for static in inputs if static.is_modified()), None)


class Engine:
    """Runs the events of one scenario against one backend, and the layer behind it, on one device.

    sentinel: what unspecified integers hold. poison: the byte that unwritten cache memory is made of.
    graphs: False runs eagerly what the scenario would replay.
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
    ) -> None:
        setup = scenario.setup
        self.setup = setup
        self.device = device
        self.sentinel = sentinel
        self.config = setup.backend_config()
        self.use_graphs = graphs
        self.world = World(scenario, sentinel)
        self.runner = graph_runner(device)
        self.graphs: dict[tuple[ForwardMode, int], BoundGraph] = {}

        # 1. The engine's own memory. A batch that outgrows every bucket runs eagerly from the same inputs.
        buckets = [bucket for event in scenario.events if isinstance(event, Capture) for bucket in event.buckets]
        max_bs = max(buckets, default=1)
        self.inputs = StaticInputs(setup.inputs, max(max_bs, setup.pool_size), sentinel, device)
        margin = 3 if setup.inputs.wide_req_to_token else 0  # columns of the wider tensor on either side
        width = setup.max_context_len
        self._pool = torch.full((setup.pool_size, width + 2 * margin), sentinel, dtype=torch.int32)
        self._pool_on_device = self._pool.to(device, copy=True)
        if setup.inputs.far_req_to_token and setup.pool_size > 1:
            self._pool_on_device = _far_pool(self._pool_on_device)
        self._columns = slice(margin, margin + width)
        self.req_to_token = self._pool_on_device[:, self._columns]
        self._sync_req_to_token()

        # 2. The backend, every allocation of it between guard bands.
        self._guarded: list[GuardedBuffer] = []  # buffers that the backend still holds
        self._overrun: GuardedBuffer | None = None
        with GuardedAllocations(sentinel, device) as guard:
            self.backend = factory(self.config, self.req_to_token, scenario.optimizations)
            self.driver = driver_for(setup.drive, self.backend, self.config)
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
        self.driver.prepare_replay(forward_batch)
        bound.graph.replay()
        yield Observation(padded, batch.size, True, self._observe_graph(bound))
        if self.layer is None:
            # Once more without a preparation in between: a graph that counts on one, or adds to itself, shows it.
            first = bound.arena.clone()
            bound.arena.fill_(self.sentinel)
            bound.graph.replay()
            if not torch.equal(bound.arena, first):
                yield Observation(padded, batch.size, True, self._observe_graph(bound))
        if self.layer is not None:
            assert load is not None
            outputs = tuple(LayerStep(copied(kept)) for kept in bound.outputs)
            yield LayerObservation(padded, batch.size, Feed.GRAPH, bs, load, outputs, self.layer.cached())

    def call_eagerly(
        self, batch: Batch, load: LayerLoad | None, feeds: Sequence[Feed] = (Feed.ISOLATED, Feed.CHAIN)
    ) -> Iterator[Observation | LayerObservation]:
        """Prepare ``batch`` without a graph; then each stage of the layer by itself, then the whole layer."""
        forward_batch = self.inputs.load(batch)
        with GuardedAllocations(self.sentinel, self.device) as guard:
            self.driver.prepare_eagerly(forward_batch)
        metadata = [step.forward_metadata for step in self.backend.attn_backends]
        self._overrun = self._overrun or overrun(guard.buffers)
        yield Observation(
            batch,
            batch.size,
            False,
            tuple(
                self._observe(m, {name: tensor.cpu() for name, tensor in fields.tensors(m).items()}, {})
                for m in metadata
            ),
        )
        if self.layer is not None:
            assert load is not None
            for feed in feeds:
                with GuardedAllocations(self.sentinel, self.device) as guard:
                    isolated = feed is Feed.ISOLATED
                    outputs, caches = self._isolated(batch, load) if isolated else self._chained(load, metadata)
                self._overrun = self._overrun or overrun(guard.buffers)
                yield LayerObservation(batch, batch.size, feed, None, load, outputs, caches)

    def _isolated(self, batch: Batch, load: LayerLoad) -> tuple[tuple[LayerStep, ...], AttentionCaches]:
        """Each stage of each pass, given what the reference says of the stage before; and what the first wrote."""
        assert self.layer is not None
        expected, layer = self.expected_layer, self.layer.layer
        metadata = expected_metadata(self.config, self.world.req_to_token, batch, in_graph=False)

        # 1. All passes write their keys.
        self.layer.load_caches(load.caches)
        for a_pass in load.passes:
            layer.store_cache(self.layer.caches, map_tensors(a_pass.inputs, lambda tensor: tensor.to(self.device)))
        stored = self.layer.cached()

        # 2. The other stages, over caches as the reference writes them.
        truth = dense_copy(load.caches)
        steps = []
        for a_pass, step_metadata in zip(load.passes, metadata, strict=True):
            rows = expected.rows(a_pass, step_metadata, truth)
            self.layer.load_caches(truth)
            lengths, inputs = rows.seqlens_expanded, rows.inputs
            logits = layer.indexer_logits(
                inputs.index_q,
                inputs.index_weights,
                self.layer.caches.index_k,
                rows.real_page_table,
                lengths,
                rows.page_table_1.shape[1],
            )
            logits = logits.clone()  # now, as everything below: the next call may use the same memory
            fed = expected.logits(rows)
            positions = layer.topk_indices(fed, lengths).clone()
            indices = layer.topk_transform_paged(fed, lengths, rows.page_table_1).clone()
            offset = rows.topk_indices_offset
            ragged = None if offset is None else layer.topk_transform_ragged(fed, lengths, offset).clone()
            out, lse = layer.sparse_mla(inputs.q, self.layer.caches.kv, expected.indices_with_holes(rows, fed))
            steps.append(LayerStep(copied(AttentionOutputs(logits, indices, out, lse)), positions, ragged))
        return tuple(steps), stored

    def _chained(self, load: LayerLoad, metadata: Sequence[Metadata]) -> tuple[tuple[LayerStep, ...], AttentionCaches]:
        """Every pass as a whole, on the backend's own metadata."""
        assert self.layer is not None
        self.layer.load_caches(load.caches)
        steps = tuple(
            LayerStep(copied(self.layer.forward_eagerly(a_pass, step_metadata)))
            for a_pass, step_metadata in zip(load.passes, metadata, strict=True)
        )
        return steps, self.layer.cached()

    def place(self, req_to_token: NDArray[np.int32]) -> None:
        """Take over the page mapping of another engine's requests."""
        self.world.req_to_token[:] = req_to_token
        self._sync_req_to_token()

    def overrun(self) -> GuardedBuffer | None:
        """A buffer of the backend that something was written around, or None."""
        return self._overrun or overrun(self._guarded)

    def modified_input(self) -> str | None:
        """The name of an input that the backend has written to, or None."""
        if not torch.equal(self._pool_on_device.cpu(), self._pool):
            return "req_to_token"
        return self.inputs.modified() or (None if self.layer is None else self.layer.modified_input())

    def _sync_req_to_token(self) -> None:
        self._pool[:, self._columns] = torch.from_numpy(self.world.req_to_token)
        self._pool_on_device.copy_(self._pool)

    def _check_guards(self, guard: GuardedAllocations, metadata: Sequence[Metadata]) -> None:
        """Check what a call allocated while it is there, and keep watching what the metadata still uses."""
        self._overrun = self._overrun or overrun(guard.buffers)
        held = {t.untyped_storage().data_ptr() for step in metadata for t in fields.tensors(step).values()}
        self._guarded += [buffer for buffer in guard.buffers if buffer.address in held]

    def capture(self, mode: ForwardMode, bs: int) -> None:
        """Capture the preparation, where the backend wants it in the graph, the layer, and the probes.

        On padding alone, as servers do.
        """
        padding = Batch(mode, (), (), (), ()).padded(bs, self.config.speculative_num_draft_tokens)
        forward_batch = self.inputs.load(padding)
        with GuardedAllocations(self.sentinel, self.device) as guard:
            self.driver.bind(forward_batch)
        metadata = tuple(step.forward_metadata for step in self.backend.attn_backends)
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
        read = [tensor for step_metadata in metadata for tensor in fields.tensors(step_metadata).values()]
        write = [probe.view(arena) for step_probes in probes for probe in step_probes.values()]

        kept: dict[int, AttentionOutputs] = {}
        rows = bs * self.config.rows_per_request(mode)
        if self.layer is not None:
            self.layer.load(LayerLoad((), dense_copy(self.cache_state.truth)))

        def forward() -> None:
            self.driver.prepare_in_graph(forward_batch)
            torch._foreach_copy_(write, read)  # what attention would read, at the addresses it would read it from
            for step, step_metadata in enumerate(metadata if self.layer is not None else ()):
                assert self.layer is not None
                outputs = self.layer.forward(step, step_metadata, rows)
                if step not in kept:  # the warm-up: these stay where they are
                    kept[step] = copied(outputs)
                for ours, theirs in zip(vars(kept[step]).values(), vars(outputs).values(), strict=True):
                    ours.copy_(theirs)  # now: the next pass may use the same memory

        assert forward_batch.seq_lens_cpu is not None
        graph = self.runner.capture(forward, host_tensors=[forward_batch.seq_lens_cpu])
        self.graphs[mode, bs] = BoundGraph(graph, metadata, tuple(probes), arena, tuple(kept.values()))

    def _poison(self, bound: BoundGraph) -> None:
        """Before a replay: nothing is left in the probes, nor in table cells that the graph's last batch had dead."""
        bound.arena.fill_(self.sentinel)
        for outputs in bound.outputs:
            for tensor in vars(outputs).values():
                as_bytes(tensor).fill_(NAN_BYTE)
        seen: set[int] = set()
        for metadata in bound.metadata:
            tensors = fields.tensors(metadata)
            lengths = tensors.get("seqlens_expanded")
            for name, page_size in (("page_table_1", 1), ("real_page_table", self.setup.page_size)):
                table = tensors.get(name)
                if lengths is None or table is None or len(table) != len(lengths) or 0 in table.stride():
                    continue  # not laid out as the contract says; the comparison will tell
                if table.data_ptr() not in seen:  # steps may share one buffer
                    seen.add(table.data_ptr())
                    fill_dead_cells(table, -(-lengths // page_size), self.sentinel)

    def _observe_graph(self, bound: BoundGraph) -> tuple[StepObservation, ...]:
        """What the probes of a replayed graph hold."""
        arena = bound.arena.cpu()
        return tuple(
            self._observe(step.forward_metadata, {name: probe.view(arena) for name, probe in probes.items()}, probes)
            for step, probes in zip(self.backend.attn_backends, bound.probes, strict=True)
        )

    def _observe(self, metadata: Metadata, seen: dict[str, torch.Tensor], probes: dict[str, Probe]) -> StepObservation:
        held = fields.tensors(metadata)
        return StepObservation(
            tensors=seen,
            dtypes={name: tensor.dtype for name, tensor in held.items()},
            devices={name: tensor.device for name, tensor in held.items()},
            host_scalars={name: getattr(metadata, name, None) for name in fields.HOST_SCALARS},
            moved=tuple(n for n, probe in probes.items() if n not in held or held[n].data_ptr() != probe.address),
        )


def copied(outputs: AttentionOutputs) -> AttentionOutputs:
    """A copy of all tensors, each in memory of its own."""
    return AttentionOutputs(**{name: tensor.contiguous().clone() for name, tensor in vars(outputs).items()})


def _far_pool(pool: torch.Tensor) -> torch.Tensor:
    """``pool`` with its last row 2**31 elements behind the first; as it is, if the GPU has no memory for that."""
    rows, device = len(pool), pool.device
    span = -(-(pool.element_size() << 31) // (rows - 1)) * rows
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 2 * span:
        return pool
    return far_apart(pool, span)


def _graph_mode(mode: ForwardMode) -> ForwardMode:
    """An idle rank replays the DECODE graph."""
    return ForwardMode.DECODE if mode is ForwardMode.IDLE else mode
