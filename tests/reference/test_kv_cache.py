"""Both caches byte by byte, against bytes worked out by hand and against e4m3 as its definition has it."""

from __future__ import annotations

import dataclasses
import random
import struct
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from nsa_oracle.reference.kv_cache import (
    dequantize,
    load_index_k,
    load_kv,
    quantize,
    store_cache,
    store_index_k,
    store_kv,
)
from nsa_oracle.reference.types import AttentionCaches, AttentionConfig, AttentionInputs, KVCacheDtype
from tests.support.exact_numbers import to_bfloat16, to_float32

SMALL = AttentionConfig(num_heads=2, kv_lora_rank=16, qk_rope_head_dim=4, index_n_heads=2, index_head_dim=8)
SMALL_BF16 = dataclasses.replace(SMALL, kv_cache_dtype=KVCacheDtype.BF16)
UNTOUCHED = 0xAB

# One token of SMALL: tiles of 4 with amax 448, 0, 896 and 224, then the RoPE part; and its 16 + 16 + 8 bytes.
KEY = [448, 1, -2, 0, 0, 0, 0, 0, 896, 2, 4, -8, -224, 0.5, 0.25, 1, 1, -2, 0.5, 3]
KEY_BYTES = (
    "7E 38 C0 00"  # / 1: 448 = 1.75 * 2^8, 1, -2, 0
    " 00 00 00 00"
    " 7E 38 40 C8"  # / 2: 448, 1, 2, -4
    " FE 38 30 40"  # / 0.5: -448, 1, 0.5, 2
    " 00 00 80 3F 00 00 80 3F 00 00 00 40 00 00 00 3F"  # float32 1, 1, 2, 0.5
    " 80 3F 00 C0 00 3F 40 40"  # bf16 1, -2, 0.5, 3
)


def bf16(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)


def hex_of(x: torch.Tensor) -> str:
    return bytes(x.tolist()).hex(" ").upper()


def e4m3_table() -> dict[int, Fraction]:
    """Value of each byte but the two NaNs: sign, 4 bits of exponent (bias 7), 3 bits of mantissa, no infinities."""
    table = {}
    for byte in range(256):
        sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
        if (exponent, mantissa) == (15, 7):
            continue
        magnitude = Fraction(mantissa, 8) * Fraction(2) ** -6
        if exponent > 0:
            magnitude = (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)
        table[byte] = -magnitude if sign else magnitude
    return table


E4M3 = e4m3_table()


def encode(value: Fraction, negative: bool) -> int:
    """Byte of the nearest e4m3 value of that sign, of two equally near ones the even byte; the largest is the limit."""
    signed = [(abs(E4M3[byte] - value), byte % 2, byte) for byte in E4M3 if (byte >= 128) == negative]
    return min(signed)[2]


def bytes_by_search(tile: list[float]) -> list[int]:
    """Quantise a tile as the contract says, in exact arithmetic with the roundings where they belong."""
    amax = max(abs(Fraction(x)) for x in tile)
    scale = to_float32(amax / 448) if amax else Fraction(1)
    negative = [struct.pack(">d", x)[0] >= 128 for x in tile]
    return [encode(to_float32(Fraction(x) / scale), sign) for x, sign in zip(tile, negative, strict=True)]


def test_e4m3_table_is_the_one_of_torch() -> None:
    assert len(E4M3) == 254
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64).tolist()
    assert {byte: Fraction(values[byte]) for byte in E4M3} == E4M3
    assert values[0x7F] != values[0x7F]
    assert values[0xFF] != values[0xFF]


def test_quantize_rounds_to_nearest_even() -> None:
    """Every e4m3 value, the middle between each two, and the float32 on either side of both; 448 makes the scale 1."""
    positive = sorted(value for value in E4M3.values() if value >= 0)
    middles = [(a + b) / 2 for a, b in pairwise(positive)]
    points = torch.tensor([float(point) for point in sorted({*positive, *middles})], dtype=torch.float32)
    near = [points, points.nextafter(torch.tensor(0.0)), points.nextafter(torch.tensor(448.0))]
    x = torch.cat([*near, *[-p for p in near]])
    values, scales = quantize(torch.stack([x, torch.full_like(x, 448.0)], dim=1), 2)
    assert scales.tolist() == [[1.0]] * len(x)
    expected = [bytes_by_search([point, 448.0])[0] for point in x.tolist()]
    assert values[:, 0].contiguous().view(torch.uint8).tolist() == expected


def test_quantize_equals_search() -> None:
    """Random bf16 tiles of all magnitudes: the float32 scale is seldom exact."""
    rng = random.Random(0)
    for _ in range(200):
        magnitude = 2.0 ** rng.randint(-120, 120)
        tile = bf16([rng.uniform(-1, 1) * magnitude * 2.0 ** -rng.randint(0, 12) for _ in range(4)])
        values, scales = quantize(tile, 4)
        exact = [Fraction(x) for x in tile.tolist()]
        assert Fraction(scales.item()) == to_float32(max(map(abs, exact)) / 448)
        assert values.view(torch.uint8).tolist() == bytes_by_search(tile.tolist())


def test_quantize_scales_each_tile_alone() -> None:
    values, scales = quantize(bf16([[[448, 0, 0, 0], [0, -896, 224, 112]]]), 2)
    assert values.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.float32
    assert values.to(torch.float32).tolist() == [[[448, 0, 0, 0], [0, -448, 448, 224]]]
    assert scales.tolist() == [[[1.0, 1.0], [2.0, 0.5]]]  # amax 448 and 0; 896 and 224


def test_quantize_saturates() -> None:
    """The only quotients beyond 448 come from scales that are subnormal: 600 / 448 units of 2^-149 round to one."""
    unit = 2.0**-149
    values, scales = quantize(torch.tensor([600 * unit, -600 * unit, 460 * unit, 3 * unit]), 4)
    assert scales.tolist() == [unit]
    assert values.to(torch.float32).tolist() == [448.0, -448.0, 448.0, 3.0]


def test_quantize_keeps_nan_and_spares_the_other_tiles() -> None:
    values, scales = quantize(bf16([1, float("nan"), 448, 1]), 2)
    assert values.to(torch.float32).isnan().tolist() == [True, True, False, False]
    assert scales.isnan().tolist() == [True, False]
    back = dequantize(values, scales, 2)
    assert back.isnan().tolist() == [True, True, False, False]


def test_quantize_nothing() -> None:
    values, scales = quantize(torch.empty(0, 16, dtype=torch.bfloat16), 4)
    assert (tuple(values.shape), tuple(scales.shape)) == ((0, 16), (0, 4))


def test_dequantize_rounds_to_float32_first() -> None:
    """15/8 * m 2^-23 = 313/128 + 2^-26. That is float32 313/128, a tie that goes to 156/64; alone it would round up."""
    m = (313 * 2**19 + 1) // 15
    assert 15 * m == 313 * 2**19 + 1
    assert 2**23 <= m < 2**24
    values = torch.tensor([1.875]).to(torch.float8_e4m3fn)
    got = dequantize(values, torch.tensor([m * 2.0**-23]), 1)
    assert got.dtype == torch.bfloat16
    assert got.tolist() == [156 / 64]


def test_dequantize_equals_exact_product() -> None:
    rng = random.Random(1)
    table = [rng.choice(list(E4M3)) for _ in range(240)]
    values = torch.tensor(table, dtype=torch.uint8).view(torch.float8_e4m3fn).view(10, 24)
    scales = torch.tensor([[rng.uniform(0.001, 3) for _ in range(3)] for _ in range(10)])
    expected = [
        [to_bfloat16(to_float32(E4M3[table[24 * row + n]] * Fraction(scales[row, n // 8].item()))) for n in range(24)]
        for row in range(10)
    ]
    got = [[Fraction(x) for x in row] for row in dequantize(values, scales, 8).tolist()]
    assert got == expected


def test_fp8_token_by_hand() -> None:
    cache = torch.full((5, 1, 40), UNTOUCHED, dtype=torch.uint8)
    store_kv(SMALL, cache, bf16([KEY]), torch.tensor([3]))
    assert hex_of(cache[3, 0]) == KEY_BYTES
    assert (cache[[0, 1, 2, 4]] == UNTOUCHED).all()
    loaded = load_kv(SMALL, cache, torch.tensor([3]))
    assert loaded.dtype == torch.bfloat16
    assert loaded.tolist() == [KEY]  # every one of these values survives the cache


def test_fp8_token_of_production() -> None:
    """656 bytes: 512 values, scales from byte 512, RoPE from byte 528."""
    config = AttentionConfig()
    assert config.kv_token_bytes == 656
    k = torch.zeros(1, 576, dtype=torch.bfloat16)
    k[0, 0], k[0, 127], k[0, 128], k[0, 511] = 448, 1, 896, -224
    k[0, 512], k[0, 575] = 1, -2
    cache = torch.full((2, 1, 656), UNTOUCHED, dtype=torch.uint8)
    store_kv(config, cache, k, torch.tensor([1]))
    token = bytes(cache[1, 0].tolist())
    assert (token[0], token[127], token[128], token[511]) == (0x7E, 0x38, 0x7E, 0xFE)
    assert struct.unpack("<4f", token[512:528]) == (1.0, 2.0, 1.0, 0.5)  # values 0-127, 128-255, 256-383, 384-511
    assert token[528:530] == bytes.fromhex("803F")
    assert token[654:656] == bytes.fromhex("00C0")
    assert sum(byte != 0 for byte in token) == 4 + 2 + 1 + 2 + 1 + 2 + 1  # 1.0 has two bytes, 2.0 one, 0.5 one
    assert torch.equal(load_kv(config, cache, torch.tensor(1)), k[0])


def test_bf16_token() -> None:
    cache = torch.full((3, 1, 20), 7.0, dtype=torch.bfloat16)
    k = bf16([[1 / 3 * n for n in range(20)]])
    store_kv(SMALL_BF16, cache, k, torch.tensor([2]))
    assert torch.equal(cache[2], k)
    assert (cache[:2] == 7).all()
    assert torch.equal(load_kv(SMALL_BF16, cache, torch.tensor([[2], [2]])), k.expand(2, 1, 20))


@pytest.mark.parametrize("config", [SMALL, SMALL_BF16], ids=["dtype=fp8", "dtype=bf16"])
def test_kv_cache_may_be_strided(config: AttentionConfig) -> None:
    """Slots 1,000,001 elements apart (an odd number), within a page of other layers' tokens; nothing else changes."""
    is_fp8 = config.kv_cache_dtype is KVCacheDtype.FP8
    dtype, width = (torch.uint8, 40) if is_fp8 else (torch.bfloat16, 20)
    memory = torch.full((4_000_100,), UNTOUCHED, dtype=dtype)
    cache = memory.as_strided((4, 1, width), (1_000_001, 77, 1), storage_offset=3)
    slots = torch.tensor([2, 0])
    k = bf16([KEY, KEY[::-1]])
    store_kv(config, cache, k, slots)

    dense = torch.full((4, 1, width), UNTOUCHED, dtype=dtype)
    store_kv(config, dense, k, slots)
    assert torch.equal(cache, dense)
    assert torch.equal(load_kv(config, cache, slots), load_kv(config, dense, slots))
    assert int((memory != UNTOUCHED).sum()) == int((dense != UNTOUCHED).sum())


def test_load_kv_keeps_the_shape_of_slots() -> None:
    cache = torch.zeros(6, 1, 40, dtype=torch.uint8)
    keys = bf16([[n] * 20 for n in (7, 14, 28, 56, 112, 224)])
    store_kv(SMALL, cache, keys, torch.arange(6))
    assert load_kv(SMALL, cache, torch.tensor([[5, 0], [3, 3]], dtype=torch.int32))[..., 0].tolist() == [
        [224, 7],
        [56, 56],
    ]
    assert tuple(load_kv(SMALL, cache, torch.empty(0, dtype=torch.int64)).shape) == (0, 20)


def test_index_page_by_hand() -> None:
    """Pages of 4 tokens, 8 values each: 32 bytes of keys, 16 of scales. Slot 6 is token 2 of page 1."""
    cache = torch.full((3, 48), UNTOUCHED, dtype=torch.uint8)
    store_index_k(SMALL, cache, bf16([[896, 2, 4, -8, 0, 0, 0, 1]]), torch.tensor([6]))
    assert hex_of(cache[1, 16:24]) == "7E 38 40 C8 00 00 00 30"  # / 2: 448, 1, 2, -4, 0, 0, 0, 0.5
    assert hex_of(cache[1, 40:44]) == "00 00 00 40"  # byte 32 + 4 * 2: float32 2
    assert int((cache != UNTOUCHED).sum()) == 12
    values, scales = load_index_k(SMALL, cache, torch.tensor([[6]]))
    assert values.dtype == scales.dtype == torch.float32
    assert values.tolist() == [[[448, 1, 2, -4, 0, 0, 0, 0.5]]]  # not scaled
    assert scales.tolist() == [[2.0]]


def test_index_page_of_production() -> None:
    """8448 bytes for 64 tokens of 128 values; slot 197 = 3 * 64 + 5 has its key at 640 and its scale at 8212."""
    config = AttentionConfig()
    assert config.index_page_bytes(64) == 8448
    cache = torch.full((4, 8448), UNTOUCHED, dtype=torch.uint8)
    store_index_k(config, cache, torch.full((1, 128), -224, dtype=torch.bfloat16), torch.tensor([197]))
    assert (cache[3, 640:768] == 0xFE).all()
    assert hex_of(cache[3, 8212:8216]) == "00 00 00 3F"
    assert int((cache != UNTOUCHED).sum()) == 132


def test_index_cache_may_be_strided() -> None:
    memory = torch.full((3_000_100,), UNTOUCHED, dtype=torch.uint8)
    cache = memory.as_strided((3, 24), (1_000_001, 1), storage_offset=5)  # pages of 2 tokens
    keys = bf16([[n, *range(7)] for n in (7, 14, 28, 56)])
    slots = torch.tensor([5, 0, 3, 4])
    store_index_k(SMALL, cache, keys, slots)
    values, scales = load_index_k(SMALL, cache, slots)
    assert scales.tolist() == [2.0**-6, 2.0**-5, 2.0**-4, 2.0**-3]  # amax / 448
    assert torch.equal(values * scales[:, None], keys.to(torch.float32))
    dense = torch.full((3, 24), UNTOUCHED, dtype=torch.uint8)
    store_index_k(SMALL, dense, keys, slots)
    assert torch.equal(cache, dense)
    assert int((memory != UNTOUCHED).sum()) == int((dense != UNTOUCHED).sum())


def test_index_key_of_zeros_has_scale_1() -> None:
    cache = torch.full((1, 12), UNTOUCHED, dtype=torch.uint8)  # a page of one token
    store_index_k(SMALL, cache, torch.zeros(1, 8, dtype=torch.bfloat16), torch.tensor([0]))
    assert hex_of(cache[0]) == "00 00 00 00 00 00 00 00 00 00 80 3F"


def test_storing_nothing_changes_nothing() -> None:
    kv, index_k = torch.full((2, 1, 40), UNTOUCHED, dtype=torch.uint8), torch.full((2, 24), UNTOUCHED).to(torch.uint8)
    none = torch.empty(0, dtype=torch.bfloat16)
    slots = torch.empty(0, dtype=torch.int64)
    inputs = AttentionInputs(none, none.view(0, 20), none, none, none.view(0, 8), slots)
    store_cache(SMALL, AttentionCaches(kv, index_k), inputs)
    assert (kv == UNTOUCHED).all()
    assert (index_k == UNTOUCHED).all()
    values, scales = load_index_k(SMALL, index_k, slots)
    assert (tuple(values.shape), tuple(scales.shape)) == ((0, 8), (0,))


def test_store_cache_writes_both() -> None:
    caches = AttentionCaches(torch.zeros(4, 1, 40, dtype=torch.uint8), torch.zeros(2, 24, dtype=torch.uint8))
    k, index_k, slots = bf16([KEY, KEY[::-1]]), bf16([[7] * 8, [14] * 8]), torch.tensor([3, 1])
    none = torch.empty(0)
    store_cache(SMALL, caches, AttentionInputs(none, k, none, none, index_k, slots))
    kv, index = torch.zeros_like(caches.kv), torch.zeros_like(caches.index_k)
    store_kv(SMALL, kv, k, slots)
    store_index_k(SMALL, index, index_k, slots)
    assert torch.equal(caches.kv, kv)
    assert torch.equal(caches.index_k, index)
    assert load_index_k(SMALL, caches.index_k, slots)[1].tolist() == [2.0**-6, 2.0**-5]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("config", [SMALL, SMALL_BF16], ids=["fp8", "bf16"])
def test_a_row_of_slot_minus_1_is_written_nowhere(config: AttentionConfig, dtype: torch.dtype) -> None:
    kv_width, kv_dtype = (40, torch.uint8) if config is SMALL else (20, torch.bfloat16)
    with_it, without = (
        AttentionCaches(torch.zeros(8, 1, kv_width, dtype=kv_dtype), torch.zeros(2, 4 * 12, dtype=torch.uint8))
        for _ in range(2)
    )
    keys, index_keys = bf16([KEY, [7.0] * 20, [-1.0] * 20]), bf16([[1.0] * 8, [7.0] * 8, [-2.0] * 8])
    store_kv(config, with_it.kv, keys, torch.tensor([5, -1, 2], dtype=dtype))
    store_index_k(config, with_it.index_k, index_keys, torch.tensor([5, -1, 2], dtype=dtype))
    store_kv(config, without.kv, keys[[0, 2]], torch.tensor([5, 2], dtype=dtype))
    store_index_k(config, without.index_k, index_keys[[0, 2]], torch.tensor([5, 2], dtype=dtype))
    assert with_it.kv.equal(without.kv)
    assert with_it.index_k.equal(without.index_k)
    assert with_it.kv[[5, 2]].any(dim=-1).all()
    assert not with_it.kv[7].any(), "the last slot, which -1 names to Python"
