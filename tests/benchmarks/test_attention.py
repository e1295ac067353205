"""The stages of a sparse attention layer beside production kernels and floors, and a whole captured step.

Needs a GPU. Run with ``make bench``; ``tests/benchmarks/table.py`` turns the result into the tables in ``docs/``.
"""

from __future__ import annotations

import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from docs.examples.peers import FOLDER
from nsa_oracle.reference.types import ForwardMode, KVCacheDtype
from tests.benchmarks.attention_subjects import Call, Indexer, SparseMLA, Step, Store, TopK

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels take their time only on a GPU")

REPEATS = 100  # calls in one graph, so that its launch is a hundredth of each
FEW_REPEATS = 20  # of calls so long that this is enough

SPARSE_MLA = {
    "ours": SparseMLA.ours,
    "FlashMLA": SparseMLA.flash_mla,
    "copy floor": SparseMLA.copy_floor,
    "matmul floor": SparseMLA.matmul_floor,
}
TOP_K = {
    "ours": TopK.ours,
    "ours, paged": TopK.ours_paged,
    "fast_topk": TopK.fast_topk,
    "fast_topk, paged": TopK.fast_topk_paged,
    "torch.topk": TopK.torch_topk,
    "copy floor": TopK.copy_floor,
}
INDEXER = {"ours": Indexer.ours, "DeepGEMM": Indexer.deep_gemm, "copy floor": Indexer.copy_floor}
STORE = {"ours": Store.ours, "copy floor": Store.copy_floor}
STEP = {
    "whole step": Step.whole,
    "metadata": Step.metadata,
    "store": Step.store,
    "indexer": Step.indexer,
    "top-k": Step.top_k,
    "attention": Step.attention,
    "copy floor": Step.copy_floor,
    "matmul floor": Step.matmul_floor,
}


def in_graph(benchmark: BenchmarkFixture, call: Call | None, repeats: int = REPEATS) -> None:
    """Time of one call among ``repeats`` in a captured graph. Skips a peer that is not there."""
    if call is None:
        pytest.skip(f"{FOLDER} is not set, or the package is not there")
    torch.cuda.synchronize()  # the inputs are ready for any stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    benchmark._timer = lambda: time.perf_counter() / repeats
    benchmark.pedantic(replay, rounds=7, warmup_rounds=2)


@pytest.mark.parametrize("tokens", [8, 64, 128])
@pytest.mark.parametrize("heads", [128, 64])
@pytest.mark.parametrize("cache", KVCacheDtype, ids=lambda cache: cache.value)
@pytest.mark.parametrize("name", SPARSE_MLA)
def test_sparse_mla(benchmark: BenchmarkFixture, tokens: int, heads: int, cache: KVCacheDtype, name: str) -> None:
    benchmark.group = f"sparse MLA cache={cache.value} heads={heads} tokens={tokens}"
    in_graph(benchmark, SPARSE_MLA[name](SparseMLA(tokens, heads, cache)), REPEATS if tokens == 8 else FEW_REPEATS)


@pytest.mark.parametrize(("rows", "width"), [(8, 8192), (64, 32768), (8, 131_072)])
@pytest.mark.parametrize("name", TOP_K)
def test_top_k(benchmark: BenchmarkFixture, rows: int, width: int, name: str) -> None:
    benchmark.group = f"top-k rows={rows} width={width}"
    in_graph(benchmark, TOP_K[name](TopK(rows, width)), REPEATS if rows == 8 else FEW_REPEATS)


@pytest.mark.parametrize(
    ("requests", "tokens", "width"),
    [(1, 1, 131072), (8, 1, 8192), (8, 2, 65536), (8, 4, 65536), (64, 1, 8192), (64, 1, 32768)],
)
@pytest.mark.parametrize("name", INDEXER)
def test_indexer(benchmark: BenchmarkFixture, requests: int, tokens: int, width: int, name: str) -> None:
    benchmark.group = f"indexer requests={requests} tokens={tokens} width={width}"
    call = INDEXER[name](Indexer(requests, tokens, width))
    in_graph(benchmark, call, REPEATS if requests * width <= 1 << 17 else FEW_REPEATS)


@pytest.mark.parametrize("rows", [64, 512])
@pytest.mark.parametrize("cache", KVCacheDtype, ids=lambda cache: cache.value)
@pytest.mark.parametrize("name", STORE)
def test_store(benchmark: BenchmarkFixture, rows: int, cache: KVCacheDtype, name: str) -> None:
    benchmark.group = f"store cache={cache.value} rows={rows}"
    in_graph(benchmark, STORE[name](Store(rows, cache)))


@pytest.mark.parametrize(
    ("mode", "bs", "length"),
    [
        (ForwardMode.TARGET_VERIFY, 8, 8192),
        (ForwardMode.TARGET_VERIFY, 8, 65536),
        (ForwardMode.DECODE, 64, 8192),
    ],
    ids=lambda value: getattr(value, "value", None),
)
@pytest.mark.parametrize("name", STEP)
def test_step(benchmark: BenchmarkFixture, mode: ForwardMode, bs: int, length: int, name: str) -> None:
    benchmark.group = f"step mode={mode.value} bs={bs} length={length}"
    in_graph(benchmark, STEP[name](Step(mode, bs, length)))
