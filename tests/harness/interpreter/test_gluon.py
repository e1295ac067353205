"""Kernels in Gluon without a GPU: what their partitions have to do with each other is seen, whatever runs first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from triton.runtime.errors import InterpreterError

from nsa_oracle.harness.bugs.mutate import Mutation, mutated
from nsa_oracle.harness.interpreter.speed import without_warnings
from nsa_oracle.optimized import attention, indexer
from nsa_oracle.reference.attention import sparse_mla as reference_sparse_mla
from nsa_oracle.reference.indexer import indexer_logits as reference_logits
from nsa_oracle.reference.kv_cache import store_index_k, store_kv
from nsa_oracle.reference.types import AttentionConfig, KVCacheDtype
from tests.support.project import PROJECT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled where there is a GPU")

KERNELS = "nsa_oracle.optimized.kernels.attention_hopper"
INDEXER = "nsa_oracle.optimized.kernels.indexer_hopper"
UNTAUGHT = """
from nsa_oracle.optimized.kernels.attention_hopper import sparse_mla_hopper_kernel
from nsa_oracle.optimized.kernels.indexer_hopper import indexer_logits_hopper_kernel
from nsa_oracle.optimized.launch import runs_gluon
print(runs_gluon(sparse_mla_hopper_kernel), runs_gluon(indexer_logits_hopper_kernel))
"""
DEADLOCK = "deadlock: every partition waits"
UNFENCED = "written after the last fence"


Result = tuple[torch.Tensor, torch.Tensor]  # out and lse


def attend(dtype: KVCacheDtype, heads: int = 2) -> tuple[Result, Result]:
    """Two programs, one of them eager, of ten tiles in two chunks; and what the reference says."""
    config = AttentionConfig(num_heads=heads, kv_cache_dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    keys = torch.randn(700, config.qk_head_dim, generator=generator).bfloat16()
    fp8 = dtype is KVCacheDtype.FP8
    width, kind = (config.kv_token_bytes, torch.uint8) if fp8 else (config.qk_head_dim, torch.bfloat16)
    cache = torch.zeros(700, 1, width, dtype=kind)
    store_kv(config, cache, keys, torch.arange(700))
    q = torch.randn(2, heads, config.qk_head_dim, generator=generator).bfloat16()
    indices = torch.randint(0, 700, (2, 640), generator=generator, dtype=torch.int32)
    indices[1, 600:] = -1
    out, lse = torch.empty(2, heads, config.kv_lora_rank, dtype=torch.bfloat16), torch.empty(2, heads)
    with without_warnings():
        attention.sparse_mla_into(config, out, lse, q, cache, indices, 1)
    return (out, lse), reference_sparse_mla(config, q, cache, indices)


def is_near(got: Result, expected: Result) -> bool:
    """Weights are rounded to bf16 before they meet values of at most 4, and the result is rounded to bf16."""
    near_out = torch.allclose(got[0].float(), expected[0].float(), rtol=2**-8, atol=2**-7)
    return near_out and torch.allclose(got[1], expected[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", KVCacheDtype)
def test_the_kernel_of_a_gpu_is_what_runs(dtype: KVCacheDtype) -> None:
    assert is_near(*attend(dtype))
    scale = Mutation(f"{KERNELS}:attend", "natural_log(divisor)", "natural_log(divisor) + 1.0")
    with mutated(scale):
        (out, lse), expected = attend(dtype)
    assert is_near((out, lse - 1.0), expected)
    assert is_near(*attend(dtype))


@pytest.mark.parametrize(
    ("function", "old", "new", "dtype"),
    [
        ("fetch_keys", "mbarrier.wait(free.index(tile & 1), tile >> 1 & 1 ^ 1)", "pass", KVCacheDtype.BF16),
        ("fetch_quantised_keys", "mbarrier.wait(free.index(tile & 1), tile >> 1 & 1 ^ 1)", "pass", KVCacheDtype.FP8),
        ("fetch_quantised_keys", "async_copy.wait_group(0)", "pass", KVCacheDtype.FP8),
        ("fetch_quantised_keys", "async_copy.wait_group(0)", "async_copy.wait_group(1)", KVCacheDtype.FP8),
        ("fetch_quantised_keys", "async_copy.commit_group()", "pass", KVCacheDtype.FP8),
        ("attend", "mbarrier.wait(arrived.index(tile & 1), tile >> 1 & 1)", "pass", KVCacheDtype.BF16),
        ("attend", "mbarrier.wait(arrived.index(tile & 1), tile >> 1 & 1)", "pass", KVCacheDtype.FP8),
        ("dequantise", "mul.rn.f32 x2, x2, $3;", "mul.rn.f32 x2, x3, $3;", KVCacheDtype.FP8),
        ("dequantise", "cvt.rn.bf16x2.f32 $1, x3, x2;", "cvt.rn.bf16x2.f32 $1, x2, x3;", KVCacheDtype.FP8),
    ],
)
def test_a_defect_shows(function: str, old: str, new: str, dtype: KVCacheDtype) -> None:
    """In the numbers, or first in that a barrier no longer adds up."""
    mutation = Mutation(f"{KERNELS}:{function}", old, new)
    with mutated(mutation), pytest.raises((AssertionError, InterpreterError)):
        assert is_near(*attend(dtype))


@pytest.mark.parametrize(
    ("function", "old", "new", "dtype", "reported"),
    [
        ("attend", "mbarrier.arrive(free.index(tile & 1), count=1)", "pass", KVCacheDtype.BF16, DEADLOCK),
        ("attend", "mbarrier.wait(arrived.index(tile & 1), tile >> 1 & 1)",
         "mbarrier.wait(arrived.index(tile & 1), tile >> 1 & 1 ^ 1)", KVCacheDtype.BF16, DEADLOCK),
        ("fetch_quantised_keys", "mbarrier.arrive(arrived.index(tile & 1), count=1)", "pass", KVCacheDtype.FP8,
         DEADLOCK),
        ("fetch_keys", "range(begin, end, KEY_BLOCK)", "range(begin, end - 64, KEY_BLOCK)", KVCacheDtype.BF16,
         DEADLOCK),
        ("sparse_mla_hopper_kernel", "mbarrier.init(free.index(buffer), count=1)",
         "mbarrier.init(free.index(buffer), count=2)", KVCacheDtype.BF16, DEADLOCK),
        ("sparse_mla_hopper_kernel", "count=1 if FP8 else FETCH_THREADS", "count=1", KVCacheDtype.BF16, "arrivals"),
        ("sparse_mla_hopper_kernel", "mbarrier.init(free.index(buffer), count=1)", "pass", KVCacheDtype.BF16,
         "not initialised"),
        ("attend", "fence_async_shared()  # what has been copied", "pass  # what has been copied", KVCacheDtype.BF16,
         UNFENCED),
        ("attend", "            fence_async_shared()\n            barrier()\n", "            barrier()\n",
         KVCacheDtype.FP8, UNFENCED),
        ("attend", "scores = warpgroup_mma_wait(0, deps=(scores,))", "pass", KVCacheDtype.BF16, "Product"),
        ("attend", "acc = warpgroup_mma_wait(0, deps=(acc,))", "acc = warpgroup_mma_wait(1, deps=(acc,))",
         KVCacheDtype.BF16, "Product"),
        ("attend", "latents.index(tile & 1)", "latents.index(tile & 3)", KVCacheDtype.BF16, "no buffer 2 among 2"),
        ("max_of_rows", "shared.slice(1, 1, 1)", "shared.slice(2, 1, 1)", KVCacheDtype.BF16, "slice 2 to 3 exceeds"),
        ("as_words", "[tile.shape[0], tile.shape[1] // 2]", "[tile.shape[0], tile.shape[1]]", KVCacheDtype.FP8,
         "cannot be read as"),
        ("attend", "q_latent.store(result)", "q_rope.store(result)", KVCacheDtype.BF16, "does not fit a tile"),
        ("dequantise", "mov.b32 {bytes0, bytes1}, $2;", "prmt.b32 bytes0, $2, 0, 0;", KVCacheDtype.FP8, "prmt.b32"),
    ],
)  # fmt: skip
def test_a_defect_is_an_error(function: str, old: str, new: str, dtype: KVCacheDtype, reported: str) -> None:
    """And leaves nothing behind: the clean kernel runs after it."""
    with mutated(Mutation(f"{KERNELS}:{function}", old, new)), pytest.raises(InterpreterError, match=reported):
        attend(dtype)
    assert is_near(*attend(dtype))


def score() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two rows of nine and five tiles, by two programs, and what the reference says; both exact."""
    config, width, generator = AttentionConfig(), 570, torch.Generator().manual_seed(5)
    cache = torch.full((18, config.index_page_bytes(64)), 0xFF, dtype=torch.uint8)
    keys = torch.randint(-4, 5, (18 * 64, config.index_head_dim), generator=generator).bfloat16()
    keys[:, 0] = 4.0  # the largest of each: all scales are alike
    store_index_k(config, cache, keys, torch.arange(len(keys)))
    table = torch.randperm(18, generator=generator).int().view(2, 9)
    q = torch.randint(-4, 5, (2, config.index_n_heads, config.index_head_dim), generator=generator).float()
    weights = torch.randint(-8, 9, (2, config.index_n_heads), generator=generator).float()
    arguments = (
        *(config, q.to(torch.float8_e4m3fn), weights, cache, table),
        *(torch.tensor([570, 300], dtype=torch.int32), width),
    )
    return indexer.indexer_logits(*arguments), reference_logits(*arguments)


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("page_of", "gl.minimum(token, length - 1)", "gl.minimum(token + 64, length - 1)"),
        ("indexer_logits_hopper_kernel", "queries.store(in_order_of_reads(", "queries.store(("),
        ("copy_step", "begin < length", "begin < length - 64"),
        ("copy_step", "async_copy.commit_group()", "pass"),
        ("indexer_logits_hopper_kernel", "async_copy.wait_group(0)", "pass"),
        ("indexer_logits_hopper_kernel", "async_copy.wait_group(0)", "async_copy.wait_group(1)"),
        ("indexer_logits_hopper_kernel", "slot ^= 1", "pass"),
        ("indexer_logits_hopper_kernel", "keys.index(slot ^ 1)", "keys.index(slot)"),
        ("indexer_logits_hopper_kernel", "fence_async_shared()", "pass"),
        ("indexer_logits_hopper_kernel", "scores + gl.abs(scores)", "2.0 * scores"),
        ("indexer_logits_hopper_kernel", "in_tile < length - begin", "in_tile <= length - begin"),
    ],
)
def test_a_defect_of_the_indexer_shows(
    monkeypatch: pytest.MonkeyPatch, function: str, old: str, new: str, tiles: int
) -> None:
    monkeypatch.setattr(indexer, "HOPPER_PROGRAMS", 4)  # several steps each
    monkeypatch.setattr(indexer, "MANY_TILES", 1 if tiles == 2 else 100)
    assert torch.equal(*score())
    mutation = Mutation(f"{INDEXER}:{function}", old, new)
    with mutated(mutation), pytest.raises((AssertionError, InterpreterError)):
        assert torch.equal(*score())


def test_nobody_has_to_teach_the_interpreter() -> None:
    """What is imported without the harness takes the kernel for other GPUs."""
    reported = subprocess.run(
        [sys.executable, "-c", UNTAUGHT],
        cwd=PROJECT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert reported.stdout == "False False\n"
