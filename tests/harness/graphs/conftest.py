"""The graph runner that tests of captures use, and the driver that tests of the audit use."""

from __future__ import annotations

import pytest
import torch

from nsa_oracle.harness.graphs.capture import GraphRunner
from nsa_oracle.harness.graphs.runner import graph_runner
from tests.support.stand_in_driver import MEMORY, StandInDriver


@pytest.fixture
def runner(device: torch.device) -> GraphRunner:
    return graph_runner(device)


@pytest.fixture
def driver() -> StandInDriver:
    return StandInDriver(MEMORY)
