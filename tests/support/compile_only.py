"""Compiles every kernel for a GPU that is not there, through the real launch sites, and prints what came out as JSON.

A stand-in driver reports the target, and launches stop after compiling, so CPU tensors reach the compiler exactly as
the launch sites pass them. What is counted is therefore what production would compile. Supports Triton 3.6 and 3.7.

Usage: python -m tests.support.compile_only COMPUTE_CAPABILITY (80, 90, 100, ...)
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported, and before the kernels would choose the interpreter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from nsa_oracle.optimized import attention, indexer, kv_cache, topk
from nsa_oracle.optimized.multi_step import MultiStepBackend
from nsa_oracle.optimized.optimizations import Optimizations
from nsa_oracle.reference.types import (
    AttentionCaches,
    AttentionConfig,
    AttentionInputs,
    BackendConfig,
    ForwardBatch,
    ForwardMode,
    KVCacheDtype,
    SpecInfo,
    StepSemantics,
)


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
        self.fused: set[bool] = set()  # whether products and sums are contracted
        triton.runtime.driver.set_active(StandInDriver(capability))
        run = JITFunction.run

        def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
            name = compiled.metadata.name
            self.fused.add(compiled.metadata.enable_fp_fusion)
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


@dataclasses.dataclass(frozen=True)
class StageSizes:
    """What varies at run time for the stages before attention, and must not select a variant."""

    rows: int
    max_seq_len_k: int
    num_pages: int
    index_topk: int
    gap: int  # between slots and between pages, of as many bytes as the widest load


STAGE_WARM_UP = [  # every block that a row can be selected in, few and many tiles of the indexer
    StageSizes(1, 100, 1, 16, 0),
    StageSizes(1, 4096, 1, 2048, 0),
    StageSizes(1, 8192, 1, 2048, 0),
    StageSizes(1, 163840, 1, 2048, 0),
    StageSizes(2, 163840, 1, 2048, 0),
]
STAGE_SIZES = [
    StageSizes(3, 1021, 7, 64, 1),
    StageSizes(64, 4097, 9, 2048, 3),
    StageSizes(8, 50000, 33, 1024, 2),
]


def drive_stages(sizes: StageSizes, dtype: KVCacheDtype) -> None:
    """DeepSeek V3.2's store, indexer and selection, each transform of it."""
    config = AttentionConfig(kv_cache_dtype=dtype)
    rows, width, page_size = sizes.rows, sizes.max_seq_len_k, 64
    is_fp8 = dtype is KVCacheDtype.FP8
    slot_width = config.kv_token_bytes if is_fp8 else config.qk_head_dim
    kv = torch.zeros(2, 1, slot_width + 16 * sizes.gap, dtype=torch.uint8 if is_fp8 else torch.bfloat16)
    index_k_cache = torch.zeros(sizes.num_pages, config.index_page_bytes(page_size) + 16 * sizes.gap, dtype=torch.uint8)
    caches = AttentionCaches(kv[:, :, :slot_width], index_k_cache[:, : config.index_page_bytes(page_size)])
    inputs = AttentionInputs(
        q=torch.zeros(rows, config.num_heads, config.qk_head_dim, dtype=torch.bfloat16),
        k=torch.zeros(rows, config.qk_head_dim, dtype=torch.bfloat16),
        index_q=torch.zeros(rows, config.index_n_heads, config.index_head_dim).to(torch.float8_e4m3fn),
        index_weights=torch.zeros(rows, config.index_n_heads),
        index_k=torch.zeros(rows, config.index_head_dim, dtype=torch.bfloat16),
        out_cache_loc=torch.zeros(rows, dtype=torch.int64),
    )
    kv_cache.store_cache(config, caches, inputs)
    lengths = torch.zeros(rows, dtype=torch.int32)
    table = torch.zeros(rows, width, dtype=torch.int32)
    pages = table[:, : -(-width // page_size)]
    scorer = (inputs.index_q, inputs.index_weights)
    logits = indexer.indexer_logits(config, *scorer, caches.index_k, pages, lengths, width)
    some_heads = tuple(tensor[:, :32] for tensor in scorer)  # no size of the kernel for Hopper
    indexer.indexer_logits(config, *some_heads, caches.index_k, pages, lengths, width)
    topk.topk_indices(logits, lengths, sizes.index_topk)
    topk.topk_transform_paged(logits, lengths, table, sizes.index_topk)
    topk.topk_transform_ragged(logits, lengths, lengths, sizes.index_topk)


@dataclasses.dataclass(frozen=True)
class AttentionSizes:
    """What varies at run time for attention, and must not select a variant."""

    rows: int
    num_indices: int
    gap: int  # between slots, of as many bytes as the widest load


def drive_attention(sizes: AttentionSizes, dtype: KVCacheDtype, heads: int, rank: int) -> None:
    """Rows that one program has, and rows that several share."""
    config = AttentionConfig(num_heads=heads, kv_lora_rank=rank, kv_cache_dtype=dtype)
    is_fp8 = dtype is KVCacheDtype.FP8
    slot_width = config.kv_token_bytes if is_fp8 else config.qk_head_dim
    kv = torch.zeros(2, 1, slot_width + 16 * sizes.gap, dtype=torch.uint8 if is_fp8 else torch.bfloat16)
    q = torch.zeros(sizes.rows, heads, config.qk_head_dim, dtype=torch.bfloat16)
    indices = torch.zeros(sizes.rows, sizes.num_indices, dtype=torch.int32)
    out = torch.empty(sizes.rows, heads, rank, dtype=torch.bfloat16)
    lse = torch.empty(sizes.rows, heads)
    for splits in (1, -(-sizes.num_indices // attention.CHUNK)):
        attention.sparse_mla_into(config, out, lse, q, kv[:, :, :slot_width], indices, splits)


ATTENTION_WARM_UP = [AttentionSizes(1, 1024, 0)]
ATTENTION_SIZES = [AttentionSizes(3, 1030, 1), AttentionSizes(64, 2048, 2)]
ATTENTION_HEADS = [(128, 512), (16, 512), (20, 256)]  # and the latent part of a key: production's, and another


def main() -> None:
    compilations = Compilations(int(sys.argv[1]))
    choices = [
        Optimizations(one_launch=True),
        Optimizations(precompute=True, batched_copy=True, vectorized_seqlens=True),
    ]
    for sizes, flags, optimizations in itertools.product(WARM_UP, FLAGS, choices):
        drive(sizes, *flags, optimizations)
    for stage_sizes, dtype in itertools.product(STAGE_WARM_UP, KVCacheDtype):
        drive_stages(stage_sizes, dtype)
    for attention_sizes, dtype, heads in itertools.product(ATTENTION_WARM_UP, KVCacheDtype, ATTENTION_HEADS):
        drive_attention(attention_sizes, dtype, *heads)
    first = compilations.count()
    for sizes, flags, optimizations in itertools.product(SIZES, FLAGS, choices):
        drive(sizes, *flags, optimizations)
    for stage_sizes, dtype in itertools.product(STAGE_SIZES, KVCacheDtype):
        drive_stages(stage_sizes, dtype)
    for attention_sizes, dtype, heads in itertools.product(ATTENTION_SIZES, KVCacheDtype, ATTENTION_HEADS):
        drive_attention(attention_sizes, dtype, *heads)
    smallest = min(size for variants in compilations.cubins.values() for size in variants.values())
    result = {"first": first, "after": compilations.count(), "smallest_cubin": smallest}
    json.dump({**result, "fused": sorted(compilations.fused)}, sys.stdout)


if __name__ == "__main__":
    main()
