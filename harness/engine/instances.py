"""The instances of a backend that one engine drives: one per declared role, and each with its driver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from nsa_oracle.harness.engine.drivers import Act, Driver, driver_for, prepares_in_graph
from nsa_oracle.harness.engine.shown_metadata import shown_metadata, steps_of
from nsa_oracle.harness.graphs.written_inputs import WrittenInputs
from nsa_oracle.harness.protocol import BackendFactory
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Event, Replay
from nsa_oracle.harness.scenarios.setup import Setup
from nsa_oracle.harness.subjects.declarations import Declarations, Role
from nsa_oracle.harness.subjects.names import BuiltBackend
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata


@dataclass(frozen=True)
class Instance:
    """One instance. num_steps: the number of single-step backends that it must have. written: watched in its calls."""

    role: Role
    backend: BuiltBackend
    driver: Driver
    num_steps: int
    declarations: Declarations
    device: torch.device
    written: WrittenInputs

    def steps(self) -> Sequence[object]:
        """The single-step backends. Raises WrongResult unless there are ``num_steps``."""
        return steps_of(self.backend, self.num_steps)

    def running(self, batch: Batch) -> int:
        """The number of steps that run in a call of ``batch``: the first ones."""
        return self.num_steps if batch.draft_steps is None else min(batch.draft_steps, self.num_steps)

    def prepare_eagerly(self, given: ForwardBatch, batch: Batch, times: int) -> None:
        """Prepare the same batch ``times`` times, as the backend is ``given`` it."""
        with self.written.watching():
            for _ in range(times):
                self.driver.prepare_eagerly(given, self.running(batch))

    def bind(self, given: ForwardBatch) -> None:
        """Bind to the buffers of the mode and bucket of the batch."""
        with self.written.watching():
            self.driver.bind(given)

    def prepare_in_graph(self, given: ForwardBatch) -> None:
        """Record the preparation, if there is one. A real capture gets no dispatch mode that it would not have."""
        with self.written.watching() if self.device.type == "cpu" else nullcontext():
            self.driver.prepare_in_graph(given)

    def prepare_replay(self, given: ForwardBatch, batch: Batch, times: int) -> None:
        """Prepare the same padded batch ``times`` times, as the backend is ``given`` it."""
        with self.written.watching():
            for _ in range(times):
                self.driver.prepare_replay(given, self.running(batch))

    def shown_metadata(self, after: Act, batch: Batch) -> list[Metadata]:
        """The metadata that each single-step backend that runs exposes after an act of its driver for ``batch``.

        Raises WrongResult.
        """
        steps, method = self.steps()[: self.running(batch)], self.driver.names[after]
        return shown_metadata(self.backend, steps, method, self.declarations, batch.mode, self.device)


class Instances:
    """All instances of the backend. Each has the right number of steps when it has been built.

    inputs: gives the names and tensors that they must not write to; ``written`` tells whether they have.
    """

    def __init__(
        self,
        factory: BackendFactory,
        declarations: Declarations,
        setup: Setup,
        config: BackendConfig,
        pool: torch.Tensor,
        switches: tuple[str, ...],
        inputs: Callable[[], Iterable[tuple[str, torch.Tensor]]] = tuple,
    ) -> None:
        self.all: list[Instance] = []
        self.written = WrittenInputs(inputs)
        for role in declarations.roles:
            with self.written.watching():
                backend = declarations.build(factory, role, config, pool, switches)
            driver, count = driver_for(setup.drive, backend, config), role.count(config.speculative_num_steps)
            self.all.append(Instance(role, backend, driver, count, declarations, pool.device, self.written))
            self.all[-1].steps()

    def allocate(self, max_bs: int, max_num_tokens: int) -> None:
        for instance in self.all:
            with self.written.watching():
                instance.driver.allocate(max_bs, max_num_tokens)

    def serving(self, mode: ForwardMode) -> Instance:
        """The instance that serves ``mode``. An idle rank replays the graph of DECODE, so both have one instance."""
        return next(instance for instance in self.all if mode in instance.role.modes)

    def called_in(self, event: Event | None) -> str:
        """The backend's method that is called in ``event``, and what else may run then; "" if none is."""
        match event:
            case Capture():
                act = Act.CAPTURE
            case Replay():
                act = Act.REPLAY
            case Eager():
                act = Act.EAGER
            case _:
                return ""
        serving = self.serving(event.mode)
        in_graph = " or in the graph" if act is not Act.EAGER and prepares_in_graph(serving.backend) else ""
        return f"{type(serving.backend).__name__}.{serving.driver.names[act]}{in_graph}"
