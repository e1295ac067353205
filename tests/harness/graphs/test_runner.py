"""Which runner captures on which device."""

from __future__ import annotations

import pytest
import torch

from nsa_oracle.harness.graphs.cuda import CudaGraphRunner
from nsa_oracle.harness.graphs.runner import graph_runner
from nsa_oracle.harness.graphs.simulated import SimulatedGraphRunner


def test_runner_by_device() -> None:
    assert isinstance(graph_runner(torch.device("cpu")), SimulatedGraphRunner)
    assert isinstance(graph_runner(torch.device("cuda", 0)), CudaGraphRunner)
    with pytest.raises(ValueError, match="meta"):
        graph_runner(torch.device("meta"))
