"""Metadata preparation, side by side in one run. Needs a GPU: elsewhere launch times would be those of a simulation.

Run with ``make bench``; ``tests/benchmarks/table.py`` turns the result into the table in ``docs/``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from nsa_oracle.reference.types import ForwardMode
from tests.benchmarks.subjects import EAGER, Workload, kernel, loop, vectorized_torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="launch times mean something only on a GPU")

BATCHES = (1, 8, 32, 128, 256)
LENGTHS = (8192, 65536)
STEPS = (1, 4, 8)
REPEATS = 100  # preparations in one graph, so that its launch is a hundredth of each


def wall(benchmark: BenchmarkFixture, prepare: Callable[[], object]) -> None:
    """Wall time of one call, launches included, until the device has finished."""

    def call() -> None:
        prepare()
        torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=20, warmup_rounds=3)


def in_graph(benchmark: BenchmarkFixture, prepare: Callable[[], object]) -> None:
    """Time of one preparation among many in a captured graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        prepare()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            prepare()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    benchmark._timer = lambda: time.perf_counter() / REPEATS
    benchmark.pedantic(replay, rounds=7, warmup_rounds=2)


@pytest.mark.parametrize("bs", BATCHES)
@pytest.mark.parametrize("mode", [ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND], ids=lambda mode: mode.value)
@pytest.mark.parametrize("subject", [loop, vectorized_torch, kernel], ids=lambda subject: subject.__name__)
def test_seqlens_expanded(
    benchmark: BenchmarkFixture, bs: int, mode: ForwardMode, subject: Callable[[Workload], Callable[[], object]]
) -> None:
    benchmark.group = f"seqlens_expanded {mode.value} bs={bs}"
    wall(benchmark, subject(Workload(bs, 8192, 1, mode)))


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("bs", BATCHES)
@pytest.mark.parametrize("name", [*EAGER, "SGLang"])
def test_eager(benchmark: BenchmarkFixture, bs: int, length: int, num_steps: int, name: str) -> None:
    benchmark.group = f"eager bs={bs} length={length} N={num_steps}"
    load = Workload(bs, length, num_steps)
    if name == "SGLang":
        prepare = load.peer()
        if prepare is None:
            pytest.skip("the peer's file is not given")
    else:
        backend = load.backend(*EAGER[name])
        prepare = lambda: backend.init_forward_metadata_replay_cuda_graph(load.batch, bs)  # noqa: E731
    wall(benchmark, prepare)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("bs", BATCHES)
@pytest.mark.parametrize("name", ["one launch", "one launch, aliased", "SGLang", "floor"])
def test_in_graph(benchmark: BenchmarkFixture, bs: int, length: int, num_steps: int, name: str) -> None:
    benchmark.group = f"in graph bs={bs} length={length} N={num_steps}"
    load = Workload(bs, length, num_steps)
    if name == "floor":
        prepare: Callable[[], object] | None = load.floor()
    elif name == "SGLang":
        prepare = load.peer()
        if prepare is None:
            pytest.skip("the peer's file is not given")
    else:
        backend = load.backend(*EAGER[name], "in_graph")
        prepare = lambda: backend.init_forward_metadata_in_graph(load.batch, bs)  # noqa: E731
    in_graph(benchmark, prepare)
