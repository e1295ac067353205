"""Indexer logits against hand-worked values and against exact rational arithmetic.

Every byte of the cache that no visible token owns is 0xFF: NaN, as a key and as a scale.
"""

from __future__ import annotations

import random
import struct
from fractions import Fraction

import pytest
import torch

from nsa_oracle.reference.indexer import indexer_logits
from nsa_oracle.reference.types import AttentionConfig
from tests.support.exact_numbers import to_float32

CONFIG = AttentionConfig(num_heads=2, kv_lora_rank=16, qk_rope_head_dim=4, index_n_heads=2, index_head_dim=8)
DEAD_PAGE = 0x5A5A5A5A
NEVER = float("-inf")


def e4m3(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).to(torch.float8_e4m3fn)


def make_cache(pages: int, page_size: int) -> torch.Tensor:
    return torch.full((pages, page_size * 12), 0xFF, dtype=torch.uint8)


def put(cache: torch.Tensor, page_size: int, slot: int, key: list[float], scale: float) -> None:
    """Write one token where the layout has it, without the help of ``kv_cache``."""
    page, token = divmod(slot, page_size)
    cache[page, 8 * token : 8 * token + 8] = e4m3(key).view(torch.uint8)
    begin = 8 * page_size + 4 * token
    cache[page, begin : begin + 4] = torch.tensor(list(struct.pack("<f", scale)), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["dtype=float32", "dtype=float64"])
def test_by_hand(dtype: torch.dtype) -> None:
    """Two rows over pages of 2 tokens; row 0 sees three tokens on pages 2 and 1, row 1 none, row 2 one on page 1."""
    cache = make_cache(4, 2)
    put(cache, 2, 4, [1, 2, 0, 0, 0, 0, 0, 0], 0.5)
    put(cache, 2, 5, [-1, 0, 0, 0, 0, 0, 0, 3], 2.0)
    put(cache, 2, 2, [0, 0, 0, 0, 0, 0, 0, 8], 1.0)
    q = e4m3([[[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]] * 2 + [[[0, 0, 0, 0, 0, 0, 0, -1]] * 2])
    weights = torch.tensor([[10.0, -1.0], [1.0, 1.0], [1.0, 1.0]])
    table = torch.tensor([[2, 1, DEAD_PAGE], [DEAD_PAGE] * 3, [1, -DEAD_PAGE, 3]], dtype=torch.int32)
    lengths = torch.tensor([3, 0, 1], dtype=torch.int32)
    logits = indexer_logits(CONFIG, q, weights, cache, table, lengths, 5, dtype)
    assert logits.dtype == torch.float32
    assert logits.tolist() == [
        # 0.5 * (10 * relu(1+2) - relu(0)); 2 * (10 * relu(-1) - relu(3)); 1 * (10 * relu(0) - relu(8))
        [15.0, -6.0, -8.0, NEVER, NEVER],
        [NEVER] * 5,
        [0.0, NEVER, NEVER, NEVER, NEVER],  # relu(-8) twice
    ]


def test_each_head_is_rectified_alone() -> None:
    """Each head is rectified by itself: its negative product must not take from another head's."""
    cache = make_cache(1, 1)
    put(cache, 1, 0, [1, 0, 0, 0, 0, 0, 0, 0], 1.0)
    q = e4m3([[[5, 0, 0, 0, 0, 0, 0, 0], [-3, 0, 0, 0, 0, 0, 0, 0]]])
    table, length = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    assert indexer_logits(CONFIG, q, torch.tensor([[1.0, 1.0]]), cache, table, length, 1).tolist() == [[5.0]]
    assert indexer_logits(CONFIG, q, torch.tensor([[-1.0, 1.0]]), cache, table, length, 1).tolist() == [[-5.0]]


def test_nan_of_a_visible_token_is_its_logit() -> None:
    cache = make_cache(1, 4)
    put(cache, 4, 0, [1] * 8, 1.0)
    put(cache, 4, 1, [1] * 7 + [float("nan")], 1.0)
    put(cache, 4, 2, [1] * 8, float("nan"))
    table, length = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    logits = indexer_logits(CONFIG, e4m3([[[1] * 8] * 2]), torch.ones(1, 2), cache, table, length, 4)
    assert logits.isnan().tolist() == [[False, True, True, False]]
    assert logits[0, 0] == 16.0


@pytest.mark.parametrize("page_size", [1, 2, 4, 16])
def test_equals_exact_arithmetic(page_size: int) -> None:
    """Random keys, scales and weights of 24 bits: float64 rounded once, so the float32 nearest to the true value."""
    rng = random.Random(page_size)
    width, rows = 19, 6
    num_pages = -(-width // page_size)
    cache = make_cache(rows * num_pages + 1, page_size)
    free = rng.sample(range(1, rows * num_pages + 1), rows * num_pages)
    levels = [Fraction(n, 4) for n in range(-15, 16)]
    lengths = [width, 0, 1, *(rng.randint(2, width) for _ in range(rows - 3))]
    table = [[DEAD_PAGE] * num_pages for _ in lengths]
    q = [[[float(rng.choice(levels)) for _ in range(8)] for _ in range(2)] for _ in lengths]
    weights = torch.tensor([[rng.uniform(-2, 2) for _ in range(2)] for _ in lengths])
    expected = [[NEVER] * width for _ in lengths]
    for row, length in enumerate(lengths):
        for position in range(length):
            if position % page_size == 0:
                table[row][position // page_size] = free.pop()
            key = [float(rng.choice(levels)) for _ in range(8)]
            scale = torch.tensor(rng.uniform(0.001, 3)).item()
            put(cache, page_size, table[row][position // page_size] * page_size + position % page_size, key, scale)
            total = Fraction(0)
            for head in range(2):
                product = sum(Fraction(a) * Fraction(b) for a, b in zip(q[row][head], key, strict=True))
                total += Fraction(weights[row, head].item()) * max(product, 0)
            expected[row][position] = float(to_float32(Fraction(scale) * total))
    page_table, seqlens = torch.tensor(table, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    logits = indexer_logits(CONFIG, e4m3(q), weights, cache, page_table, seqlens, width)
    assert logits.tolist() == expected

    in_float32 = indexer_logits(CONFIG, e4m3(q), weights, cache, page_table, seqlens, width, torch.float32)
    assert in_float32.tolist() != expected  # the comparison above can tell a float32 computation
    torch.testing.assert_close(in_float32, logits, rtol=2.0**-20, atol=2.0**-14)


def test_cache_may_be_strided() -> None:
    cache = make_cache(3, 2)
    for slot in range(2, 6):
        put(cache, 2, slot, [slot, 1, 0, 0, 0, 0, 0, 0], 0.25)
    memory = torch.full((300,), 0xFF, dtype=torch.uint8)
    strided = memory.as_strided((3, 24), (101, 1), storage_offset=7)
    strided.copy_(cache)
    q, weights = e4m3([[[1, 0, 0, 0, 0, 0, 0, 0]] * 2]), torch.ones(1, 2)
    table, length = torch.tensor([[2, 1]], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    logits = indexer_logits(CONFIG, q, weights, strided, table, length, 4)
    assert logits.tolist() == [[2.0, 2.5, 1.0, 1.5]]  # 2 heads * 0.25 * slots 4, 5, 2, 3


def test_no_rows() -> None:
    empty = torch.empty(0, dtype=torch.int32)
    logits = indexer_logits(
        CONFIG, e4m3([]).view(0, 2, 8), torch.empty(0, 2), make_cache(1, 2), empty.view(0, 0), empty, 0
    )
    assert tuple(logits.shape) == (0, 0)
