"""Chooses the graph runner of a device."""

from __future__ import annotations

import torch

from nsa_oracle.harness.graphs.capture import GraphRunner
from nsa_oracle.harness.graphs.cuda import CudaGraphRunner


def graph_runner(device: torch.device) -> GraphRunner:
    """The runner for tensors on `device`."""
    if device.type == "cuda":
        return CudaGraphRunner(device)
    if device.type == "cpu":
        # Imported late: only a run on a CPU needs the simulation.
        from nsa_oracle.harness.graphs.simulated import SimulatedGraphRunner

        return SimulatedGraphRunner()
    raise ValueError(f"no graph runner for device {device}")
