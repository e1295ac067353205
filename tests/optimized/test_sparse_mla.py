"""Sparse MLA: exact where arithmetic is exact, near the truth elsewhere, and never dependent on a row's neighbours.

Of small sizes and of production's latent and RoPE part, for which there is a kernel of its own.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from nsa_oracle.optimized import attention
from nsa_oracle.reference.attention import sparse_mla as reference_sparse_mla
from nsa_oracle.reference.kv_cache import load_kv, store_kv
from nsa_oracle.reference.types import AttentionConfig, KVCacheDtype

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS = 96
SMALL = AttentionConfig(num_heads=2, kv_lora_rank=64, qk_rope_head_dim=16, sm_scale=80**-0.5)
WIDE = AttentionConfig(num_heads=2, kv_lora_rank=512, qk_rope_head_dim=64, sm_scale=576**-0.5)
KINDS = [(sizes, dtype) for sizes in (SMALL, WIDE) for dtype in KVCacheDtype]
Result = tuple[torch.Tensor, torch.Tensor]


def config_of(kind: tuple[AttentionConfig, KVCacheDtype], heads: int = 2, exact: bool = False) -> AttentionConfig:
    sizes, dtype = kind
    return dataclasses.replace(
        sizes, kv_cache_dtype=dtype, num_heads=heads, sm_scale=math.log(2) if exact else sizes.sm_scale
    )


def named(kind: tuple[AttentionConfig, KVCacheDtype]) -> str:
    return f"{kind[0].kv_lora_rank}-{kind[1].value}"


def new_cache(config: AttentionConfig, keys: torch.Tensor) -> torch.Tensor:
    """A cache with ``keys`` [n, qk_head_dim] bf16 in its first n slots and NaN in the rest."""
    if config.kv_cache_dtype is KVCacheDtype.BF16:
        cache = torch.full((SLOTS, 1, config.qk_head_dim), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    else:
        cache = torch.full((SLOTS, 1, config.kv_token_bytes), 0xFF, dtype=torch.uint8, device=DEVICE)
    store_kv(config, cache, keys, torch.arange(keys.shape[0], device=DEVICE))
    return cache


def random_case(
    config: AttentionConfig, rows: int, num_indices: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, cache and indices: whole rows, short rows, empty rows, and rows with holes. Slot 0 and the last are NaN."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(SLOTS - 1, config.qk_head_dim, generator=generator).to(DEVICE, torch.bfloat16)
    cache = new_cache(config, keys)
    cache[0] = cache[-1]
    q = torch.randn(rows, config.num_heads, config.qk_head_dim, generator=generator).to(DEVICE, torch.bfloat16)
    indices = torch.randint(1, SLOTS - 1, (rows, num_indices), generator=generator)
    lengths = torch.randint(0, num_indices + 1, (rows, 1), generator=generator)
    lengths[: (rows + 1) // 2] = num_indices
    indices[torch.arange(num_indices) >= lengths] = -1
    holes = torch.rand(rows, num_indices, generator=generator) < torch.rand(rows, 1, generator=generator)
    holes[::2] = False
    indices[holes] = -7
    return q, cache, indices.to(DEVICE, torch.int32)


def exact_case(config: AttentionConfig, rows: int, num_indices: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integer scores within 8 of each other: what every sum gives is known exactly."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randint(-3, 4, (SLOTS - 1, config.qk_head_dim), generator=generator).to(DEVICE, torch.bfloat16)
    keys[:, : config.kv_lora_rank : config.quant_tile] = 3.5  # amax: the scale of the FP8 cache is then 2^-7
    q = torch.zeros(rows, config.num_heads, config.qk_head_dim, dtype=torch.bfloat16, device=DEVICE)
    q[:, :, 5], q[:, :, -1] = 1, -1
    cache = new_cache(config, keys)
    indices = torch.randint(0, SLOTS - 1, (rows, num_indices), generator=generator).to(DEVICE, torch.int32)
    indices[0, num_indices // 2 :] = -1
    return q, cache, indices


def both_ways(config: AttentionConfig, q: torch.Tensor, cache: torch.Tensor, indices: torch.Tensor) -> Result:
    """The result of one program per row, which must be that of one program per chunk."""
    results = []
    for splits in {1, -(-indices.shape[1] // attention.CHUNK)}:
        shape = (q.shape[0], config.num_heads)
        out = torch.full((*shape, config.kv_lora_rank), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        lse = torch.full(shape, torch.nan, dtype=torch.float32, device=DEVICE)
        attention.sparse_mla_into(config, out, lse, q, cache, indices, splits)
        results.append((out, lse))
    for other in results[1:]:
        assert_same(results[0], other)
    return results[0]


def assert_same(a: Result, b: Result) -> None:
    """Bit for bit."""
    assert torch.equal(a[0].view(torch.int16), b[0].view(torch.int16))
    assert torch.equal(a[1].view(torch.int32), b[1].view(torch.int32))


def assert_near(
    config: AttentionConfig, got: Result, q: torch.Tensor, cache: torch.Tensor, indices: torch.Tensor
) -> None:
    """Weights are rounded to bf16 before they meet the values, and the result is rounded to bf16."""
    expected, expected_lse = reference_sparse_mla(config, q, cache, indices)
    valid = indices >= 0
    largest = torch.zeros(q.shape[0], 1, 1, device=DEVICE)
    for row in range(q.shape[0]):
        values = load_kv(config, cache, indices[row][valid[row]])[:, : config.kv_lora_rank].float()
        largest[row] = values.abs().max() if len(values) else 0.0
    assert ((got[0].float() - expected.float()).abs() <= largest * 2**-7).all()
    torch.testing.assert_close(got[1], expected_lse, rtol=3e-7, atol=3e-6)


@pytest.mark.parametrize("kind", KINDS, ids=named)
@pytest.mark.parametrize(("heads", "num_indices"), [(1, 4), (2, 63), (3, 64), (4, 130)])
def test_random_rows(kind: tuple[AttentionConfig, KVCacheDtype], heads: int, num_indices: int) -> None:
    config = config_of(kind, heads)
    case = random_case(config, 4, num_indices)
    got = attention.sparse_mla(config, *case)
    assert_near(config, got, *case)
    assert_same(got, both_ways(config, *case))


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_one_program_or_one_per_chunk_give_the_same_bits(kind: tuple[AttentionConfig, KVCacheDtype]) -> None:
    config = config_of(kind)
    q, cache, indices = random_case(config, 4, 2 * attention.CHUNK + 100)
    indices[2, : attention.CHUNK] = -1  # an empty chunk before a full one
    indices[3, attention.CHUNK :] = -1  # and behind one
    assert_near(config, both_ways(config, q, cache, indices), q, cache, indices)


@pytest.mark.parametrize("kind", KINDS, ids=named)
@pytest.mark.parametrize("num_indices", [20, attention.CHUNK + 60])
def test_exact_where_arithmetic_is(kind: tuple[AttentionConfig, KVCacheDtype], num_indices: int) -> None:
    config = config_of(kind, exact=True)
    case = exact_case(config, 2, num_indices)
    got, expected = both_ways(config, *case), reference_sparse_mla(config, *case)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=3e-7, atol=0)


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_rows_do_not_see_each_other(kind: tuple[AttentionConfig, KVCacheDtype]) -> None:
    config = config_of(kind, heads=3)
    q, cache, indices = random_case(config, 12, 70)
    together = attention.sparse_mla(config, q, cache, indices)
    permutation = torch.randperm(12, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    permuted = attention.sparse_mla(config, q[permutation], cache, indices[permutation])
    assert_same(permuted, (together[0][permutation], together[1][permutation]))
    for row in (0, 5, 11):
        one = slice(row, row + 1)
        assert_same(attention.sparse_mla(config, q[one], cache, indices[one]), (together[0][one], together[1][one]))


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_row_without_a_key(kind: tuple[AttentionConfig, KVCacheDtype]) -> None:
    config = config_of(kind)
    q, cache, indices = random_case(config, 2, attention.CHUNK + 1)
    indices[1] = -1
    out, lse = both_ways(config, q, cache, indices)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(lse[1], torch.full_like(lse[1], -torch.inf))


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_no_rows(kind: tuple[AttentionConfig, KVCacheDtype]) -> None:
    config = config_of(kind)
    out, lse = attention.sparse_mla(config, *(x[:0] if x.shape[0] == 1 else x for x in random_case(config, 1, 8)))
    assert out.shape == (0, config.num_heads, config.kv_lora_rank)
    assert lse.shape == (0, config.num_heads)


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_strided_inputs(kind: tuple[AttentionConfig, KVCacheDtype]) -> None:
    config = config_of(kind)
    q, cache, indices = random_case(config, 3, 40)
    expected = attention.sparse_mla(config, q, cache, indices)
    width = q.shape[2]
    wide_q, wide_indices = q.new_full((3, 5, width + 16), torch.nan), indices.new_zeros(3, 47)
    wide_q[:, 1:3, 8 : 8 + width], wide_indices[:, 3:43] = q, indices
    padding = 8 if kind[0] is WIDE else 3  # the kernel for WIDE is for slots that start on 16 bytes
    padding = padding if config.kv_cache_dtype is KVCacheDtype.BF16 else 16
    wide_cache = torch.cat([cache, cache[:, :, :padding]], dim=2)
    strided = wide_q[:, 1:3, 8 : 8 + width], wide_cache[:, :, : cache.shape[2]], wide_indices[:, 3:43]
    assert_same(attention.sparse_mla(config, *strided), expected)


def apart(tensor: torch.Tensor, start: int, *steps: int) -> torch.Tensor:
    """What ``tensor`` holds, so many bytes behind one of 16, its rows and heads (or slots) so many more apart."""
    size, (rows, columns, width) = tensor.element_size(), tensor.shape
    column = width + (16 + steps[-1]) // size
    row = columns * column + -columns * column % 16 + steps[0] // size
    memory = tensor.new_zeros(rows * row + 16)
    return memory[start // size :].as_strided(tensor.shape, (row, column, 1)).copy_(tensor)


@pytest.mark.parametrize("places", [(4, 0, 0), (0, 4, 0), (0, 0, 4)], ids=["start", "rows", "heads"])
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_rows_that_start_anywhere(kind: tuple[AttentionConfig, KVCacheDtype], places: tuple[int, int, int]) -> None:
    """On 4 bytes: nothing moves as a vector of 16, and keys of production's sizes take the other kernel."""
    config = config_of(kind)
    q, cache, indices = random_case(config, 3, 40)
    for queries, slots in ((apart(q, *places), cache), (q, apart(cache, *places))):
        assert_near(config, both_ways(config, queries, slots, indices), q, cache, indices)


def test_slots_far_apart() -> None:
    """Byte offsets beyond 32 bits: a view of memory that is mostly never touched."""
    config = config_of((SMALL, KVCacheDtype.FP8))
    q, cache, indices = random_case(config, 1, 4)
    indices.clamp_(max=1)
    far = torch.empty(2**31 + 4096, dtype=torch.uint8, device=DEVICE).as_strided((2, 1, cache.shape[2]), (2**31, 1, 1))
    far.copy_(cache[1:3])
    near = attention.sparse_mla(config, q, cache[1:3], indices)
    assert_same(attention.sparse_mla(config, q, far, indices), near)


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_operators_say_what_they_mutate(kind: tuple[AttentionConfig, KVCacheDtype]) -> None:
    config = config_of(kind)
    q, cache, indices = random_case(config, 2, 8)
    out = torch.zeros(2, 2, config.kv_lora_rank, dtype=torch.bfloat16, device=DEVICE)
    lse, accs, stats = (
        torch.zeros(shape, device=DEVICE) for shape in ((2, 2), (2, 3, 8, config.kv_lora_rank), (2, 3, 2, 2))
    )
    torch.library.opcheck(
        attention.sparse_mla_op, (out, lse, accs[:, :1].contiguous(), stats, q, cache, indices, config.sm_scale)
    )
    torch.library.opcheck(attention.sparse_mla_combine_op, (out, lse, accs, stats, config.sm_scale))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs need a GPU")
@pytest.mark.parametrize("dtype", KVCacheDtype)
def test_graph_replay_equals_eager(dtype: KVCacheDtype) -> None:
    config = AttentionConfig(kv_cache_dtype=dtype)
    q, cache, indices = random_case(config, 3, 2048)
    attention.sparse_mla(config, q, cache, indices)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention.sparse_mla(config, q, cache, indices)
    _, _, others = random_case(config, 3, 2048, seed=1)
    indices.copy_(others)
    graph.replay()
    assert_same(captured, attention.sparse_mla(config, q, cache, indices))


@pytest.mark.parametrize("dtype", KVCacheDtype)
@pytest.mark.parametrize("heads", [16, 32, 64, 128] if DEVICE.type == "cuda" else [128])
def test_production_sizes(dtype: KVCacheDtype, heads: int) -> None:
    config = AttentionConfig(num_heads=heads, kv_cache_dtype=dtype)
    case = random_case(config, 4, 2048)
    assert_near(config, both_ways(config, *case), *case)
    config = dataclasses.replace(config, sm_scale=math.log(2))
    case = exact_case(config, 3, 2048)
    got, expected = both_ways(config, *case), reference_sparse_mla(config, *case)
    assert torch.equal(got[0], expected[0])
