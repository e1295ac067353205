"""Compiles every kernel for a GPU that is not there, through the real launch sites, and prints what came out as JSON.

A stand-in driver reports the target, and launches stop after compiling, so CPU tensors reach the compiler exactly as
the launch sites pass them. What is counted is therefore what production would compile. Supports Triton 3.6 and 3.7.

Usage: python compile_only.py COMPUTE_CAPABILITY (80, 90, 100, ...)
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported, and before the kernels would choose the interpreter

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from optimized.multi_step import MultiStepBackend
from optimized.optimizations import Optimizations
from reference.types import BackendConfig, ForwardBatch, ForwardMode, SpecInfo, StepSemantics


class StandInDriver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Compilations:
    """Every variant compiled so far, by kernel: source signature and flags to the size of its cubin."""

    def __init__(self, capability: int) -> None:
        self.cubins: dict[str, dict[str, int]] = {}
        triton.runtime.driver.set_active(StandInDriver(capability))
        run = JITFunction.run

        def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
            name = compiled.metadata.name
            self.cubins.setdefault(name, {})[compiled.hash] = len(compiled.asm["cubin"])
            return  # nothing that a launch site could launch

        JITFunction.run = compile_only  # type: ignore[method-assign]

    def count(self) -> dict[str, int]:
        return {name: len(variants) for name, variants in sorted(self.cubins.items())}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What varies at run time in production, and must not select a variant."""

    bs: int
    max_context_len: int
    pool_rows: int
    length: int
    num_draft_tokens: int
    num_steps: int
    index_topk: int


WARM_UP = [  # between them they set every flag that a batch can: aligned rows or not, a cached prefix or not
    Sizes(1, 256, 2, 4, 2, 2, 16),
    Sizes(2, 255, 3, 5, 2, 2, 16),
    Sizes(2, 256, 3, 1, 1, 2, 16),
    Sizes(3, 255, 3, 1, 1, 2, 16),
]
SIZES = [
    Sizes(3, 1021, 16, 17, 3, 4, 64),
    Sizes(16, 4096, 17, 1600, 4, 3, 2048),
    Sizes(31, 1028, 40, 1000, 8, 5, 1024),
    Sizes(256, 2052, 256, 64, 4, 1, 512),
]
FLAGS: list[tuple[StepSemantics, int, int]] = [(StepSemantics.SHARED, 64, 5), (StepSemantics.ADVANCING, 1, 0)]


def drive(sizes: Sizes, semantics: StepSemantics, page_size: int, schedules: int, optimizations: Optimizations) -> None:
    """Every mode, eager and in a graph."""
    config = BackendConfig(
        page_size, sizes.max_context_len, sizes.index_topk, sizes.num_steps, sizes.num_draft_tokens, semantics,
        schedules, schedules,
    )  # fmt: skip
    req_to_token = torch.zeros(sizes.pool_rows, sizes.max_context_len, dtype=torch.int32)
    backend = MultiStepBackend(config, req_to_token, optimizations)
    backend.init_cuda_graph_state(sizes.bs, sizes.bs * sizes.num_draft_tokens)
    for batch in batches(sizes):
        if optimizations.one_launch or optimizations.vectorized_seqlens:
            backend.init_forward_metadata(batch)
        if batch.forward_mode is not ForwardMode.EXTEND:
            backend.init_forward_metadata_capture_cuda_graph(batch)
            backend.init_forward_metadata_replay_cuda_graph(batch, batch.batch_size)


def batches(sizes: Sizes) -> Iterator[ForwardBatch]:
    ones = torch.ones(sizes.bs, dtype=torch.int64)
    for mode in ForwardMode:
        batch = ForwardBatch(mode, sizes.bs, ones, ones * sizes.length, spec_info=SpecInfo(ones))
        if mode is ForwardMode.EXTEND:
            batch = dataclasses.replace(batch, extend_seq_lens=ones, extend_prefix_lens=batch.seq_lens - ones)
        yield batch


def main() -> None:
    compilations = Compilations(int(sys.argv[1]))
    choices = [
        Optimizations(one_launch=True),
        Optimizations(precompute=True, batched_copy=True, vectorized_seqlens=True),
    ]
    for sizes, flags, optimizations in itertools.product(WARM_UP, FLAGS, choices):
        drive(sizes, *flags, optimizations)
    first = compilations.count()
    for sizes, flags, optimizations in itertools.product(SIZES, FLAGS, choices):
        drive(sizes, *flags, optimizations)
    smallest = min(size for variants in compilations.cubins.values() for size in variants.values())
    json.dump({"first": first, "after": compilations.count(), "smallest_cubin": smallest}, sys.stdout)


if __name__ == "__main__":
    main()
