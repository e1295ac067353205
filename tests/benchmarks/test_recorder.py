"""What a recorder adds to a call: host time, nothing waited for. Needs a GPU, for the copies that it begins.

``pytest tests/benchmarks/test_recorder.py --benchmark-only``; docs/from-production.md has the figures.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from nsa_oracle.harness import record
from nsa_oracle.reference.types import ForwardBatch, ForwardMode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU there are no copies to begin")

PAUSE = 0.0005  # seconds between two calls, as between two decode steps of a fast server


class Nothing:
    """A backend whose calls take no time."""

    def __init__(self) -> None:
        self.req_to_token = torch.zeros(256, 8192, dtype=torch.int32, device="cuda")

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: Any, bs: int) -> None: ...


@pytest.mark.parametrize(("calls", "pause"), [("looped", 0.0), ("paused", PAUSE)])
@pytest.mark.parametrize("bs", [1, 64, 256])
@pytest.mark.parametrize("name", ["not recorded", "recorded", "recorded, digest"])
def test_recorded_call(
    benchmark: BenchmarkFixture, tmp_path: Path, name: str, bs: int, calls: str, pause: float
) -> None:
    benchmark.group = f"recorder calls={calls} bs={bs}"
    backend: Any = Nothing()
    if name != "not recorded":
        backend = record(backend, tmp_path / "calls.jsonl", tables="digest" if "digest" in name else "none")
    rows, lengths = torch.arange(bs, device="cuda"), torch.full((bs,), 1000, device="cuda")
    batch = ForwardBatch(ForwardMode.DECODE, bs, rows, lengths, seq_lens_cpu=lengths.cpu())
    torch.cuda.synchronize()

    def call() -> None:
        backend.init_forward_metadata_replay_cuda_graph(batch, bs)

    benchmark.pedantic(call, setup=lambda: time.sleep(pause) if pause else None, rounds=500, warmup_rounds=20)
