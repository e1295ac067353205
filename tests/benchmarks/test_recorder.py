"""What a recorder adds to a call: host time, nothing waited for. Needs a GPU, for the copies that it begins.

``pytest tests/benchmarks/test_recorder.py --benchmark-only``; docs/from-production.md has the figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from nsa_oracle.harness import record
from nsa_oracle.reference.types import ForwardBatch, ForwardMode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU there are no copies to begin")

PAUSE = 0.0005  # seconds between two calls, as between two decode steps of a fast server


def sleep() -> None:
    time.sleep(PAUSE)


def work() -> None:
    """What a server does meanwhile: Python, and memory that drives others out of the caches."""
    end, memory = time.perf_counter() + PAUSE, torch.zeros(1 << 16)
    while time.perf_counter() < end:
        memory.add_(sum(range(50)))


BETWEEN: dict[str, Callable[[], None] | None] = {"nothing": None, "sleep": sleep, "work": work}


class Nothing:
    """A backend whose calls take no time."""

    def __init__(self) -> None:
        self.req_to_token = torch.zeros(256, 8192, dtype=torch.int32, device="cuda")

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: Any, bs: int) -> None: ...


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("bs", [1, 64, 256])
@pytest.mark.parametrize("name", ["not recorded", "recorded", "recorded, digest"])
def test_recorded_call(benchmark: BenchmarkFixture, tmp_path: Path, name: str, bs: int, between: str) -> None:
    benchmark.group = f"recorder between={between} bs={bs}"
    backend: Any = Nothing()
    if name != "not recorded":
        backend = record(backend, tmp_path / "calls.jsonl", tables="digest" if "digest" in name else "none")
    rows, lengths = torch.arange(bs, device="cuda"), torch.full((bs,), 1000, device="cuda")
    batch = ForwardBatch(ForwardMode.DECODE, bs, rows, lengths, seq_lens_cpu=lengths.cpu())
    torch.cuda.synchronize()

    def call() -> None:
        backend.init_forward_metadata_replay_cuda_graph(batch, bs)

    benchmark.pedantic(call, setup=BETWEEN[between], rounds=1000, warmup_rounds=500)
