"""Late inputs: delivered as they were sent."""

from __future__ import annotations

import pytest
import torch

from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.engine.observations import Conditions
from nsa_oracle.harness.engine.stress import Delivery
from nsa_oracle.harness.subjects.default import optimized_layer
from tests.support.backends import clean
from tests.support.metadata_cases import TWO_REPLAYS, factory_of

CPU = torch.device("cpu")
SENTINEL = 0x5A5A5A5A


class TestDelivery:
    def test_arrives_at_once_unless_late(self, device: torch.device) -> None:
        target = torch.zeros(3, dtype=torch.int32, device=device)
        Delivery(device, late=False).send(target, torch.tensor([1, 2, 3], dtype=torch.int32))
        assert target.tolist() == [1, 2, 3]

    def test_late_arrives_with_the_delivery(self, device: torch.device) -> None:
        if device.type != "cuda":
            pytest.skip("a CPU has no streams, so nothing is late there")
        target, delivery = torch.zeros(3, dtype=torch.int32, device=device), Delivery(device, late=True)
        content = torch.tensor([1, 2, 3], dtype=torch.int32)
        delivery.send(target, content)
        content.fill_(7)
        assert target.tolist() == [0, 0, 0]
        delivery.send(target, content)
        delivery.deliver()
        assert target.tolist() == [7, 7, 7]


def test_stress_leaves_inputs_as_sent(device: torch.device) -> None:
    engine = Engine(
        TWO_REPLAYS, factory_of(clean.Clean), optimized_layer, device, Conditions(SENTINEL, 0xFF, stress=True)
    )
    for event in TWO_REPLAYS.events:
        list(engine.run(event))
        assert engine.modified_input() is None
