"""Sparse attention against hand-worked values, exact rational softmax on a lattice, and float arithmetic in Python."""

from __future__ import annotations

import dataclasses
import math
import random
from fractions import Fraction

import pytest
import torch

from nsa_oracle.reference.attention import sparse_mla, unrounded
from nsa_oracle.reference.kv_cache import load_kv, store_kv
from nsa_oracle.reference.types import AttentionConfig, KVCacheDtype
from tests.support.exact_numbers import exact_attention, to_bfloat16, to_float32

LN2 = math.log(2.0)
CONFIG = AttentionConfig(
    num_heads=2,
    kv_lora_rank=16,
    qk_rope_head_dim=4,
    index_n_heads=2,
    index_head_dim=8,
    kv_cache_dtype=KVCacheDtype.BF16,
    sm_scale=LN2,
)
FP8_CONFIG = dataclasses.replace(CONFIG, kv_cache_dtype=KVCacheDtype.FP8)
ONE_HEAD = dataclasses.replace(CONFIG, num_heads=1, kv_lora_rank=4, qk_rope_head_dim=1)
EVERY_CACHE = pytest.mark.parametrize("config", [CONFIG, FP8_CONFIG], ids=["dtype=bf16", "dtype=fp8"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["in=float32", "in=float64"])


def bf16(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)


def int32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def float32(value: float) -> float:
    return float(to_float32(Fraction(value)))


def make_cache(config: AttentionConfig, num_slots: int) -> torch.Tensor:
    """Nothing but NaN: bytes 0xFF are NaN in e4m3, in bf16 and in float32."""
    if config.kv_cache_dtype is KVCacheDtype.FP8:
        return torch.full((num_slots, 1, config.kv_token_bytes), 0xFF, dtype=torch.uint8)
    return torch.full((num_slots, 1, config.qk_head_dim), float("nan"), dtype=torch.bfloat16)


@EVERY_DTYPE
def test_by_hand(dtype: torch.dtype) -> None:
    """Scores 1, 3 and 2 have weights 1/4, 1 and 1/2; the RoPE part takes part in the scores and not in the output."""
    cache = make_cache(ONE_HEAD, 8)
    cache[5, 0] = bf16([1, 0, 4, 7, 0])  # score 1
    cache[2, 0] = bf16([1, 8, -4, 7, 2])  # score 1 + 2
    cache[7, 0] = bf16([2, 2, 1, 7, 0])  # score 2
    out, lse = sparse_mla(ONE_HEAD, bf16([[[1, 0, 0, 0, 1]]]), cache, int32([[5, -1, 2, 7]]), dtype)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    # (1/4 * 1 + 1 * 1 + 1/2 * 2) / 1.75 = 9/7; (8 + 1) / 1.75 = 36/7; (1 - 4 + 1/2) / 1.75 = -10/7; 7
    # rounded to 8 bits: 164.57/128 -> 165, 164.57/32 -> 165, 182.86/128 -> 183
    assert out.tolist() == [[[165 / 128, 165 / 32, -183 / 128, 7.0]]]
    assert lse.tolist() == [[pytest.approx(3 * LN2 + math.log(1.75), rel=2.0**-22)]]


def test_rounds_to_float32_and_then_to_bf16() -> None:
    """Weights 1, 1, 2^-25 of values 1, 1 + 2^-7, 2: just above 1 + 2^-8, which is what float32 makes of it.

    That is a tie of bf16 and goes to 1; without the first rounding it would be 1 + 2^-7.
    """
    cache = make_cache(ONE_HEAD, 3)
    cache[:, 0] = bf16([[1, 0, 0, 0, 25], [1 + 2.0**-7, 0, 0, 0, 25], [2, 0, 0, 0, 0]])
    out, _lse = sparse_mla(ONE_HEAD, bf16([[[0, 0, 0, 0, 1]]]), cache, int32([[0, 1, 2]]))
    exact = (1 + (1 + Fraction(2) ** -7) + 2 * Fraction(2) ** -25) / (2 + Fraction(2) ** -25)
    assert 1 + Fraction(2) ** -8 < exact < 1 + Fraction(2) ** -8 + Fraction(2) ** -24
    assert out[0, 0, 0].item() == 1.0


def test_unrounded_is_what_is_rounded() -> None:
    """Two keys, and a row without any: float64 as it was computed."""
    cache = make_cache(ONE_HEAD, 2)
    cache[:, 0] = bf16([[1, 0, 0, 0, 2], [0, 1, 0, 0, 1]])  # weights 1 and 1/2
    out, lse = unrounded(ONE_HEAD, bf16([[[0, 0, 0, 0, 1]]] * 2), cache, int32([[0, 1], [-1, -1]]))
    assert out.dtype == lse.dtype == torch.float64
    assert out.tolist() == [[[1 / 1.5, 0.5 / 1.5, 0.0, 0.0]], [[0.0] * 4]]
    assert lse.tolist() == [[pytest.approx(2 * LN2 + math.log(1.5), rel=2.0**-50)], [-math.inf]]


def lattice_key(config: AttentionConfig, rng: random.Random) -> list[int]:
    """Integers up to 7; each tile has a 7, so that its scale is 2^-6 and FP8 holds them as they are."""
    key = [rng.randint(-4, 4) for _ in range(config.kv_lora_rank)]
    key[3 :: config.quant_tile] = [7] * len(key[3 :: config.quant_tile])
    key[0] = rng.randint(-2, 2)
    return key + [rng.randint(-2, 2) for _ in range(config.qk_rope_head_dim)]


def lattice_query(config: AttentionConfig, rng: random.Random) -> list[int]:
    """One latent and one RoPE value count, so that scores lie within -4..4."""
    query = [0] * config.qk_head_dim
    query[0], query[config.kv_lora_rank + rng.randrange(4)] = rng.choice([-1, 1]), rng.choice([-1, 1])
    return query


@EVERY_DTYPE
@EVERY_CACHE
def test_equals_exact_softmax(config: AttentionConfig, dtype: torch.dtype) -> None:
    """On the lattice every sum is exact, so both dtypes must give the one right bit pattern."""
    rng = random.Random(0)
    rows, slots, k = 12, 40, 24
    cache = make_cache(config, slots)
    selected = [sorted(rng.sample(range(slots), rng.choice([0, 1, 2, k]))) for _ in range(rows)]
    selected[0], selected[1] = [], [slots - 1, 0, *range(5, 20)]  # in no particular order
    keys = {slot: lattice_key(config, rng) for row in selected for slot in row}
    for slot, key in keys.items():
        store_kv(config, cache, bf16([key]), torch.tensor([slot]))
        assert load_kv(config, cache, torch.tensor(slot)).tolist() == key
    q = [[lattice_query(config, rng) for _ in range(2)] for _ in range(rows)]
    indices = []
    for row in selected:
        mixed = row + [-1] * (k - len(row))
        rng.shuffle(mixed)
        indices.append(mixed)
    out, lse = sparse_mla(config, bf16(q), cache, int32(indices), dtype)

    for row in range(rows):
        for head in range(2):
            exact, largest, total = exact_attention(q[row][head], [keys[slot] for slot in selected[row]], 16)
            assert [Fraction(x) for x in out[row, head].tolist()] == exact, f"row {row}, head {head}"
            log_sum = largest * LN2 + math.log(total) if total else -math.inf
            if dtype == torch.float64 or not total:
                assert lse[row, head].item() == (float32(log_sum) if total else -math.inf)
            else:
                assert lse[row, head].item() == pytest.approx(log_sum, abs=2.0**-20)


@EVERY_CACHE
def test_row_without_a_slot(config: AttentionConfig) -> None:
    out, lse = sparse_mla(config, bf16([[[1.0] * 20] * 2] * 2), make_cache(config, 3), int32([[-1, -1], [-1, -1]]))
    assert out.view(torch.int16).tolist() == [[[0] * 16] * 2] * 2  # +0.0
    assert lse.tolist() == [[-math.inf] * 2] * 2


def test_no_rows() -> None:
    out, lse = sparse_mla(CONFIG, bf16([]).view(0, 2, 20), make_cache(CONFIG, 3), torch.empty(0, 4, dtype=torch.int32))
    assert (tuple(out.shape), tuple(lse.shape)) == ((0, 2, 16), (0, 2))


def test_a_slot_named_twice_counts_twice() -> None:
    cache = make_cache(ONE_HEAD, 2)
    cache[:, 0] = bf16([[3, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    out, lse = sparse_mla(ONE_HEAD, bf16([[[0.0] * 5]]), cache, int32([[0, 1, 0, -1]]))
    assert out[0, 0, 0].item() == 2.0
    assert lse.item() == float32(math.log(3))


def test_slot_outside_the_cache_is_an_error() -> None:
    with pytest.raises(IndexError):
        sparse_mla(CONFIG, bf16([[[1.0] * 20] * 2]), make_cache(CONFIG, 3), int32([[3]]))


def test_scores_may_be_huge() -> None:
    """The largest score is subtracted before the exponential."""
    cache = make_cache(ONE_HEAD, 2)
    cache[:, 0] = bf16([[1, 5, 0, 0, 0], [-1, -5, 0, 0, 0]])
    out, lse = sparse_mla(ONE_HEAD, bf16([[[2.0**15, 0, 0, 0, 0]]]), cache, int32([[0, 1]]))
    assert out.tolist() == [[[1.0, 5.0, 0.0, 0.0]]]
    assert lse.item() == float32(2.0**15 * LN2)


def test_scale_is_a_float32() -> None:
    """Scores 0 and -192: lse = log(1 + 2^-(192 c)), small enough to show c's rounding; without it, 8 ulp elsewhere."""
    config = dataclasses.replace(ONE_HEAD, sm_scale=192**-0.5)
    cache = make_cache(config, 2)
    cache[:, 0] = bf16([[0, 0, 0, 0, 0], [0, 0, 0, 0, -192]])
    _out, lse = sparse_mla(config, bf16([[[0, 0, 0, 0, 1]]]), cache, int32([[1, 0]]))
    c = float32(192**-0.5 / LN2)
    assert lse.item() == float32(math.log1p(2.0 ** (-192 * c)))
    assert lse.item() != float32(math.log1p(2.0 ** (-192 * 192**-0.5 / LN2)))


@EVERY_CACHE
def test_ordinary_data(config: AttentionConfig) -> None:
    """Against Python's floats, in which the same sums round a little differently: never by a float32 ulp."""
    config = dataclasses.replace(config, sm_scale=192**-0.5)
    generator = torch.Generator().manual_seed(1)
    k, q = (torch.randn(n, 20, generator=generator).to(torch.bfloat16) * 3 for n in (9, 8))
    cache = make_cache(config, 12)
    store_kv(config, cache, k, torch.arange(9))
    keys = load_kv(config, cache, torch.arange(9)).tolist()
    indices = [[0, 1, 2, 3, 4, -1], [8, -1, 7, 6, -1, 5], [3, -1, -1, -1, -1, -1], [8, 7, 6, 5, 4, 3]]
    out, lse = sparse_mla(config, q.view(4, 2, 20), cache, int32(indices))
    for row, slots in enumerate(indices):
        seen = [keys[slot] for slot in slots if slot >= 0]
        for head, query in enumerate(q.view(4, 2, 20)[row].tolist()):
            scores = [math.fsum(a * b for a, b in zip(query, key, strict=True)) * config.sm_scale for key in seen]
            weights = [math.exp(score) for score in scores]
            assert lse[row, head].item() == pytest.approx(math.log(math.fsum(weights)), rel=2.0**-22)
            for column in range(16):
                mean = math.fsum(w * key[column] for w, key in zip(weights, seen, strict=True)) / math.fsum(weights)
                assert out[row, head, column].item() == bf16(mean).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp2_of_integers_is_exact(dtype: torch.dtype) -> None:
    """What the lattice rests on; many at once, so that vectorised code paths are taken."""
    exponents = list(range(-126, 1)) * 9
    powers = torch.exp2(torch.tensor(exponents, dtype=dtype))
    assert powers.tolist() == [2.0**exponent for exponent in exponents]


def test_exact_roundings_are_those_of_torch() -> None:
    """Ties to both sides, subnormals of both formats, and random numbers; float64 holds all of them."""
    ties = (
        [1 + n * 2.0**-24 for n in range(8)] + [1 + n * 2.0**-8 for n in range(8)] + [-n * 2.0**-134 for n in range(8)]
    )
    rng = random.Random(0)
    values = ties + [rng.gauss(0, 1) * 2.0 ** rng.randint(-150, 100) for _ in range(300)]
    x = torch.tensor(values, dtype=torch.float64)
    assert [to_float32(Fraction(value)) for value in values] == [Fraction(y) for y in x.to(torch.float32).tolist()]
    singles = x.to(torch.float32)
    halved = [Fraction(y) for y in singles.to(torch.bfloat16).tolist()]
    assert [to_bfloat16(Fraction(value)) for value in singles.tolist()] == halved
