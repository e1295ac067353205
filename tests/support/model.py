"""World and caches of a scenario, as the engine has them."""

from __future__ import annotations

import torch

from nsa_oracle.harness.engine.cache_state import CacheState
from nsa_oracle.harness.engine.passes import Pass
from nsa_oracle.harness.judge import sentinels
from nsa_oracle.harness.memory.bits import as_bytes
from nsa_oracle.harness.memory.poison import POISON_BYTES
from nsa_oracle.harness.scenarios.scenario import Event, Scenario
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.reference import kv_cache

CPU = torch.device("cpu")
POISON = POISON_BYTES[0]


class Model:
    """World and caches of a scenario, event by event, as the engine has them."""

    def __init__(self, scenario: Scenario, poison: int = POISON) -> None:
        self.setup = scenario.setup
        self.config = scenario.setup.backend_config()
        self.world = World(scenario, sentinels(scenario.setup)[0])
        self.state = CacheState(scenario.setup, scenario.seed, poison, CPU)

    def run(self, *events: Event) -> list[Pass]:
        """The passes of the last call among ``events``; their keys are written."""
        passes: list[Pass] = []
        for event in events:
            batch = self.world.apply(event)
            if batch is not None:
                self.state.settle(self.world)
                passes = self.state.passes(self.world, batch, self.config)
                self.state.apply(passes)
        return passes

    def settle(self, *events: Event) -> None:
        self.run(*events)
        self.state.settle(self.world)

    def slots(self, request: int) -> list[int]:
        running = self.world.running[request]
        slots: list[int] = self.world.req_to_token[running.pool_row, : running.seq_len].tolist()
        return slots

    def version(self, slot: int) -> int | None:
        """Of the forward pass whose key lies in ``slot``, where keys tell; None where there is no key."""
        key = kv_cache.load_kv(self.state.config, self.state.truth.kv, torch.tensor([slot]))[0]
        origin = self.state.content.decode(key[: self.state.config.kv_lora_rank])
        assert origin is None or origin.slot == slot
        return None if origin is None else origin.version

    def is_poison(self, slot: int) -> bool:
        """Whether nothing but poison lies in ``slot``, in both caches."""
        config, size = self.state.config, self.setup.page_size
        page, offset = divmod(slot, size)
        index = self.state.truth.index_k[page]
        dim = config.index_head_dim
        parts = (
            as_bytes(self.state.truth.kv)[slot],
            index[offset * dim : (offset + 1) * dim],
            index[size * dim + 4 * offset : size * dim + 4 * offset + 4],
        )
        poisoned = {bool((part == self.state.poison).all()) for part in parts}
        assert len(poisoned) == 1, "either cache or none"
        return poisoned == {True}
