"""A second backend in the process, as a server has one for the draft model and one for the target model.

It prepares batches of its own just after the judged backend has, before anything reads what the judged one prepared.
What it prepares is not compared: the judged backend must give the same metadata as without it.
"""

from __future__ import annotations

import torch

from nsa_oracle.harness.engine.inputs import StaticInputs
from nsa_oracle.harness.engine.instances import Instances
from nsa_oracle.harness.engine.stress import Delivery
from nsa_oracle.harness.protocol import BackendFactory
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.subjects.declarations import Declarations
from nsa_oracle.reference.types import ForwardMode


class SecondBackend:
    """A backend that differs from that of ``scenario`` in its context length, its pool and its inputs.

    Does nothing if the scenario has none. max_bs: size of the largest bucket.
    """

    def __init__(
        self,
        factory: BackendFactory,
        declarations: Declarations,
        scenario: Scenario,
        max_bs: int,
        sentinel: int,
        device: torch.device,
    ) -> None:
        setup, switches = scenario.setup, scenario.optimizations
        capacity = max(max_bs, setup.pool_size + setup.eager_padding)
        self._is_there = setup.neighbour_context_len > 0
        if not self._is_there:
            return
        self.setup = setup.model_copy(update={"max_context_len": setup.neighbour_context_len})
        config = self.setup.backend_config()
        shape = (setup.pool_size, config.max_context_len)
        slots = setup.pool_size * setup.page_size * self.setup.pages_per_request
        table = torch.arange(shape[0] * shape[1], dtype=torch.int32).view(shape) % slots
        self._pool = table.to(device)
        self._delivery = Delivery(device, late=False)
        self._inputs = StaticInputs(setup.inputs, capacity, sentinel, self._delivery, setup.num_draft_tokens)
        self._instances = Instances(factory, declarations, self.setup, config, self._pool, switches)
        self._instances.allocate(max_bs, max_bs * setup.num_draft_tokens)

    def bind(self, batch: Batch) -> None:
        """Bind to the bucket of the padded ``batch``, as if to capture a graph of its own."""
        if self._is_there:
            self._instances.serving(batch.mode).driver.bind(self._inputs.load(self._other(batch)))

    def prepare(self, batch: Batch, in_graph: bool) -> None:
        """Prepare a batch of the mode and size of ``batch``, for a replay or eagerly, with other lengths and rows."""
        if not self._is_there:
            return
        driver = self._instances.serving(batch.mode).driver
        given = self._inputs.load(self._other(batch))
        if in_graph:
            driver.prepare_replay(given)
        else:
            driver.prepare_eagerly(given)

    def _other(self, batch: Batch) -> Batch:
        lengths = tuple((length + 2) % self.setup.max_seq_len + 1 for length in batch.seq_lens)
        accepts = batch.accept_lengths
        if batch.mode is ForwardMode.DRAFT_EXTEND:
            most = self.setup.num_draft_tokens
            accepts = tuple(min(most - n, length) for n, length in zip(accepts, lengths, strict=True))
        extends = tuple(min(new, length) for new, length in zip(batch.extend_lens, lengths, strict=False))
        return Batch(batch.mode, batch.pool_rows[::-1], lengths, lengths, accepts, extends)
