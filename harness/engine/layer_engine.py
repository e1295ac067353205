"""The layer's part of an engine: expected caches, isolated stages, the eager chain, and capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from nsa_oracle.harness.content.edge_keys import edge_keys
from nsa_oracle.harness.content.edge_logits import edge_logits
from nsa_oracle.harness.content.edge_scores import edge_scores
from nsa_oracle.harness.engine.cache_state import CacheState
from nsa_oracle.harness.engine.expected import ExpectedLayer, expected_metadata
from nsa_oracle.harness.engine.guards import GuardWatch
from nsa_oracle.harness.engine.isolated import IsolatedStages
from nsa_oracle.harness.engine.judged_layer import JudgedLayer
from nsa_oracle.harness.engine.layer_driver import LayerDriver
from nsa_oracle.harness.engine.observations import (
    Conditions,
    Feed,
    LayerLoad,
    LayerObservation,
    LayerStep,
    copied,
    dense_copy,
)
from nsa_oracle.harness.errors import building
from nsa_oracle.harness.memory.poison import POISON_BYTES, GuardedAllocations
from nsa_oracle.harness.protocol import LayerFactory
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.scenarios.setup import Layer
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.harness.subjects.calls import MethodCalls
from nsa_oracle.reference.types import ForwardMode, Metadata


class LayerEngine:
    """Serves the batches of one scenario with one layer.

    max_rows: largest number of rows of a graph. num_steps: number of passes in a call of a batch.
    """

    def __init__(
        self,
        scenario: Scenario,
        layer: Layer,
        factory: LayerFactory,
        world: World,
        device: torch.device,
        conditions: Conditions,
        max_rows: int,
        num_steps: Callable[[Batch], int],
    ) -> None:
        setup, attention = scenario.setup, layer.attention_config()
        self.setup = setup
        self.seed = scenario.seed
        self.world = world
        self.device = device
        self.conditions = conditions
        self.config = setup.backend_config()
        with building():
            built = factory(setup.backend_config(), layer.attention_config())  # copies, as it may change them
        self.driver = LayerDriver(setup, built, device, conditions.poison, max_rows, setup.num_steps)
        self.cache_state = CacheState(setup, scenario.seed, conditions.poison, device)
        self.expected = ExpectedLayer(self.config, attention)
        self.num_steps = num_steps
        self._skips_padding = layer.padding_slot < 0
        # Once in the first run of one case of four, and of those whose wide rows take a kernel several tiles. A layer
        # in plain PyTorch takes seconds for so many rows.
        is_chosen = scenario.seed % 4 == 1 or setup.max_context_len > 1000
        self._repeats = is_chosen and conditions.poison == POISON_BYTES[0]
        self._edge_sets = 0  # number of sets of edge-case rows used so far

    def judged(self) -> JudgedLayer:
        """The properties of this layer that checks use."""
        return JudgedLayer(
            setup=self.setup,
            config=self.driver.config,
            expected=self.expected,
            content=self.cache_state.content,
            world=self.world,
            device=self.device,
            weaker=getattr(self.driver.layer, "weaker", {}),
        )

    @property
    def method_calls(self) -> MethodCalls:
        """Of the methods that the judged layer brings itself; of none, if it was not loaded by name."""
        calls: MethodCalls = getattr(self.driver.layer, "method_calls", MethodCalls(()))
        return calls

    def has_unjudged_stages(self) -> bool:
        """Whether a stage that the judged layer brings itself has not been run in isolation yet."""
        unjudged = self.method_calls.without(Feed.ISOLATED.value)
        return any(name != "forward" for name in unjudged)

    def modified_input(self) -> str | None:
        """The name of an input that the layer has modified, or None."""
        written = self.driver.modified_input()
        return None if written is None else written.name

    def load(self, batch: Batch) -> LayerLoad:
        """The passes of one call of ``batch`` (not padded), with new keys, and the caches before the first pass."""
        self.cache_state.settle(self.world)
        passes = tuple(self.cache_state.passes(self.world, batch, self.config, self.num_steps(batch)))
        load = LayerLoad(passes, dense_copy(self.cache_state.truth))
        self.cache_state.apply(passes)
        return load

    def run_stages(
        self, batch: Batch, raw_bs: int, load: LayerLoad, in_graph: bool, guards: GuardWatch
    ) -> LayerObservation:
        """Run each stage of each pass on the reference's result of the stage before.

        Then run the store, the indexer and top-k on edge-case rows, which differ between calls and between the runs of
        a scenario. The metadata of ``batch`` is the reference's, as in a graph or as eagerly; its first ``raw_bs``
        requests are real.
        """
        self._edge_sets += 1
        sentinel, poison, call = self.conditions.sentinel, self.conditions.poison, self._edge_sets
        stages = IsolatedStages(self.driver, self.expected, sentinel, self._repeats)
        count = self.num_steps(batch)
        steps = stages.run(load, expected_metadata(self.config, self.world.req_to_token, batch, in_graph, count))
        where = self.setup, self.driver.config, self.seed, poison, call
        self._repeats = self._repeats and stages.many is None
        keys = edge_keys(*where)
        stored = stages.store(keys.with_padding() if self._skips_padding else keys)
        scored = stages.score(edge_scores(keys.kinds, keys.inputs.index_k, *where))
        is_ragged = batch.mode is ForwardMode.EXTEND
        brings_ragged = "topk_transform_ragged" in self.method_calls.names
        logits = edge_logits(self.setup, self.seed, poison, call, sentinel)
        selected = stages.select(logits, paged=not is_ragged, ragged=is_ragged or brings_ragged)
        guards.check(stages.guard.buffers)
        return LayerObservation(
            batch, raw_bs, Feed.ISOLATED, None, load, steps, stages.modified, selected, stored, scored, stages.many
        )

    def run_chain(
        self, batch: Batch, load: LayerLoad, metadata: Sequence[Metadata], guards: GuardWatch
    ) -> LayerObservation:
        """Run every pass as a whole, on the backend's own ``metadata``."""
        self.driver.load_caches(load.caches)
        guard = GuardedAllocations(self.conditions.sentinel, self.device)
        shown = [
            self.driver.forward_eagerly(a_pass, step_metadata, guard)
            for a_pass, step_metadata in zip(load.passes, metadata, strict=True)
        ]
        guards.check(guard.buffers)
        modified = next((modified for _, modified in shown if modified is not None), None)
        steps = tuple(step for step, _ in shown)
        return LayerObservation(batch, batch.size, Feed.CHAIN, None, load, steps, modified)

    def prepare_capture(self, rows: int) -> CapturedPasses:
        """Prepare a capture of ``rows`` rows per pass: allocate memory, and load inputs of padding alone."""
        self.driver.reserve()
        self.driver.load(LayerLoad((), dense_copy(self.cache_state.truth)), rows)
        return CapturedPasses(self.driver, rows)


class CapturedPasses:
    """The passes that a graph records, and the graph's copies of their results."""

    def __init__(self, driver: LayerDriver, rows: int) -> None:
        self.driver = driver
        self.rows = rows
        self._steps: dict[int, LayerStep] = {}

    def forward(self, metadata: Sequence[Metadata]) -> None:
        """Run one pass per step. The warm-up run allocates the copies; the capture records copies into them."""
        for step, step_metadata in enumerate(metadata):
            shown = self.driver.forward(step, step_metadata, self.rows)
            first = step not in self._steps
            if first:
                self._steps[step] = LayerStep(copied(shown.outputs), shown.caches)
            copies, outputs = vars(self._steps[step].outputs).values(), vars(shown.outputs).values()
            for copy, output in zip(copies, outputs, strict=True):
                copy.copy_(output)  # at once, because the next pass may reuse the memory
            positions = self.driver.positions(step, self._steps[step].outputs.logits, step_metadata)
            if positions is not None:
                if first:
                    self._steps[step] = replace(self._steps[step], positions=positions.clone())
                kept = self._steps[step].positions
                assert kept is not None
                kept.copy_(positions)

    @property
    def steps(self) -> tuple[LayerStep, ...]:
        return tuple(self._steps.values())
