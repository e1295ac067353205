"""Storing and scoring equal the reference bit for bit wherever the true answer has one bit pattern."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from nsa_oracle.optimized import indexer, kv_cache
from nsa_oracle.optimized.kernels.fp8 import from_e4m3_bits, to_e4m3_bits
from nsa_oracle.reference import indexer as reference_indexer
from nsa_oracle.reference import kv_cache as reference_kv_cache
from nsa_oracle.reference.types import AttentionCaches, AttentionConfig, AttentionInputs, KVCacheDtype

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = AttentionConfig(num_heads=2, kv_lora_rank=48, qk_rope_head_dim=12, index_n_heads=3, index_head_dim=24)
PRODUCTION = AttentionConfig()
PAGE_SIZES = [1, 16, 32, 64, 128]
UNTOUCHED = 0xAB
NAN_BYTE = 0xFF  # NaN in e4m3, bf16 and float32 alike
GARBAGE = 0x7FFFFFFF  # in dead cells of a table: looking it up would fault


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def apart(shape: tuple[int, ...], stride: int, dtype: torch.dtype = torch.uint8) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of that shape whose first dimension has a stride of its own, and all of its memory."""
    memory = torch.full((shape[0] * stride * dtype.itemsize,), UNTOUCHED, dtype=torch.uint8, device=DEVICE)
    inner = [1]
    for size in reversed(shape[2:]):
        inner.insert(0, inner[0] * size)
    return torch.as_strided(memory.view(dtype), shape, (stride, *inner)), memory


# e4m3 ------------------------------------------------------------------------------------------------------------


@triton.jit
def to_e4m3_kernel(x: tl.tensor, out: tl.tensor, N: tl.constexpr) -> None:
    lanes = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + lanes, to_e4m3_bits(tl.load(x + lanes)))


@triton.jit
def from_e4m3_kernel(bits: tl.tensor, out: tl.tensor, half: tl.tensor) -> None:
    lanes = tl.arange(0, 256)
    tl.store(out + lanes, from_e4m3_bits(tl.load(bits + lanes), tl.float32))
    tl.store(half + lanes, from_e4m3_bits(tl.load(bits + lanes), tl.float16))


def test_rounding_to_e4m3_at_every_value_and_midpoint() -> None:
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 .. 448
    midpoints = (values[1:] + values[:-1]) / 2
    extremes = torch.tensor([2.0**-149, 2.0**-126, 449, 463, 464, 465, 480, 3e38, torch.inf, torch.nan])
    points = torch.cat([values, midpoints, extremes])
    below, above = points.nextafter(torch.tensor(-torch.inf)), points.nextafter(torch.tensor(torch.inf))
    random = torch.randn(4096) * 2.0 ** torch.randint(-12, 10, (4096,))
    x = torch.cat([points, below, above, random])
    x = torch.cat([x, -x, torch.zeros(-2 * len(x) % 1024)]).to(DEVICE)
    got = torch.empty(len(x), dtype=torch.uint8, device=DEVICE)
    to_e4m3_kernel[(len(x) // 1024,)](x, got, 1024)
    assert_same_bits(got, x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


def test_reading_every_e4m3_value() -> None:
    bits = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    got = torch.empty(256, dtype=torch.float32, device=DEVICE)
    half = torch.empty(256, dtype=torch.float16, device=DEVICE)
    from_e4m3_kernel[(1,)](bits, got, half)
    expected = bits.view(torch.float8_e4m3fn).float()
    number = ~expected.isnan()
    assert_same_bits(got[number], expected[number])
    assert_same_bits(half[number], expected[number].half())
    assert got[~number].isnan().all()
    assert half[~number].isnan().all()


# The caches ------------------------------------------------------------------------------------------------------


def empty_caches(
    config: AttentionConfig, num_slots: int, page_size: int, gap: int
) -> tuple[AttentionCaches, tuple[torch.Tensor, torch.Tensor]]:
    """Caches, with ``gap`` elements between slots and between pages (4-byte words, of pages); and all their memory."""
    is_fp8 = config.kv_cache_dtype is KVCacheDtype.FP8
    width, dtype = (config.kv_token_bytes, torch.uint8) if is_fp8 else (config.qk_head_dim, torch.bfloat16)
    page_bytes = config.index_page_bytes(page_size)
    kv, kv_memory = apart((num_slots, 1, width), width + gap, dtype)
    index_k, index_memory = apart((num_slots // page_size, page_bytes), page_bytes + 4 * gap)
    return AttentionCaches(kv, index_k), (kv_memory, index_memory)


def key_inputs(config: AttentionConfig, k: torch.Tensor, index_k: torch.Tensor, slots: torch.Tensor) -> AttentionInputs:
    nothing = torch.empty(0, device=DEVICE)
    return AttentionInputs(nothing, k, nothing, nothing, index_k, slots)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("dtype", KVCacheDtype)
@pytest.mark.parametrize(("config", "gap"), [(SMALL, 0), (SMALL, 5), (PRODUCTION, 0), (PRODUCTION, 1001)])
def test_store_cache(config: AttentionConfig, gap: int, dtype: KVCacheDtype, page_size: int) -> None:
    """Every byte of both caches, those of other slots and between slots included."""
    config = dataclasses.replace(config, kv_cache_dtype=dtype)
    rows, num_slots = 5, 128
    k = torch.randn(rows, 2, config.qk_head_dim, generator=generator(1), device=DEVICE)[:, 1].bfloat16()
    index_k = torch.randn(rows, config.index_head_dim + 3, generator=generator(2), device=DEVICE).bfloat16()
    index_k = index_k[:, 3:]  # rows apart and not aligned
    k[1, : config.quant_tile] = 0
    k[2, ::2] *= 1e-39
    k[3, ::3] *= 2.0**120
    index_k[1] = 0
    index_k[2] *= 2.0**-130
    slots = torch.randperm(num_slots, generator=generator(3), device=DEVICE)[: 2 * rows]
    slots = (slots if gap else slots.int())[::2]
    inputs = key_inputs(config, k, index_k, slots)
    got, got_memory = empty_caches(config, num_slots, page_size, gap)
    expected, expected_memory = empty_caches(config, num_slots, page_size, gap)
    kv_cache.store_cache(config, got, inputs)
    reference_kv_cache.store_cache(config, expected, inputs)
    for mine, theirs in zip(got_memory, expected_memory, strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf / inf, in the interpreter
def test_nan_and_infinity_reach_the_caches() -> None:
    """NaN makes its whole tile NaN; infinity becomes NaN, and what is finite beside it 0. NaN may have either sign."""
    k = torch.randn(4, SMALL.qk_head_dim, generator=generator(), device=DEVICE).bfloat16()
    index_k = torch.randn(4, SMALL.index_head_dim, generator=generator(), device=DEVICE).bfloat16()
    k[0, 3], k[1, 14], k[2, -1], k[3, 40] = torch.nan, torch.inf, torch.nan, -torch.inf
    index_k[1, 0], index_k[2, 5] = -torch.nan, -torch.inf
    slots = torch.arange(4, device=DEVICE)
    caches, _ = empty_caches(SMALL, 16, 16, 0)
    expected, _ = empty_caches(SMALL, 16, 16, 0)
    inputs = key_inputs(SMALL, k, index_k, slots)
    kv_cache.store_cache(SMALL, caches, inputs)
    reference_kv_cache.store_cache(SMALL, expected, inputs)
    loads = [reference_kv_cache.load_kv(SMALL, side.kv, slots) for side in (caches, expected)]
    torch.testing.assert_close(*loads, rtol=0, atol=0, equal_nan=True)
    (keys, scales), (expected_keys, expected_scales) = (
        reference_kv_cache.load_index_k(SMALL, side.index_k, slots) for side in (caches, expected)
    )
    torch.testing.assert_close(keys, expected_keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)


def test_storing_nothing() -> None:
    caches, _ = empty_caches(SMALL, 16, 16, 0)
    empty = torch.empty(0, SMALL.qk_head_dim, dtype=torch.bfloat16, device=DEVICE)
    index_k = torch.empty(0, SMALL.index_head_dim, dtype=torch.bfloat16, device=DEVICE)
    kv_cache.store_cache(SMALL, caches, key_inputs(SMALL, empty, index_k, torch.arange(0, device=DEVICE)))


# The indexer -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Scoring:
    """Arguments of ``indexer_logits``."""

    config: AttentionConfig
    index_q: torch.Tensor
    index_weights: torch.Tensor
    index_k_cache: torch.Tensor
    real_page_table: torch.Tensor
    seqlens_expanded: torch.Tensor
    width: int

    def logits(self, rows: slice = slice(None)) -> torch.Tensor:
        return indexer.indexer_logits(
            self.config, self.index_q[rows], self.index_weights[rows], self.index_k_cache, self.real_page_table[rows],
            self.seqlens_expanded[rows], self.width,
        )  # fmt: skip

    def expected(self) -> torch.Tensor:
        return reference_indexer.indexer_logits(
            self.config, self.index_q, self.index_weights, self.index_k_cache, self.real_page_table,
            self.seqlens_expanded.clamp(0, self.width), self.width,
        )  # fmt: skip


def scoring(
    config: AttentionConfig, page_size: int, lengths: list[int], width: int, exact: bool, gap: int = 0
) -> Scoring:
    """Rows of these lengths, each with pages of its own; NaN wherever no row may read, garbage in dead table cells.

    exact: small integers, and scales that are powers of two: every sum is exact in float32, in any order.
    """
    random = generator(page_size)
    rows, heads, dim = len(lengths), config.index_n_heads, config.index_head_dim
    live_pages = [-(-max(min(length, width), 0) // page_size) for length in lengths]
    num_pages = sum(live_pages) + 1
    cache, memory = apart((num_pages, config.index_page_bytes(page_size)), config.index_page_bytes(page_size) + gap)
    memory.fill_(NAN_BYTE)
    order = torch.randperm(num_pages - 1, generator=random, device=DEVICE) + 1
    table = torch.full((rows, -(-width // page_size) + 3), GARBAGE, dtype=torch.int32, device=DEVICE)
    table[:, 1::2] = -1
    begin = 0
    for row, count in enumerate(live_pages):
        pages = order[begin : begin + count]
        table[row, :count] = pages
        begin += count
        tokens = torch.arange(max(min(lengths[row], width), 0), device=DEVICE)
        if exact:
            keys = torch.randint(-4, 5, (len(tokens), dim), generator=random, device=DEVICE).float()
            scales = 2.0 ** torch.randint(-3, 3, (len(tokens), 1), generator=random, device=DEVICE)
        else:
            keys = torch.randn(len(tokens), dim, generator=random, device=DEVICE)
            scales = torch.rand(len(tokens), 1, generator=random, device=DEVICE)
        key_bytes = keys.to(torch.float8_e4m3fn).view(torch.uint8)
        key_places = (tokens % page_size)[:, None] * dim + torch.arange(dim, device=DEVICE)
        cache[pages[tokens // page_size][:, None], key_places] = key_bytes
        scale_places = page_size * dim + (tokens % page_size)[:, None] * 4 + torch.arange(4, device=DEVICE)
        cache[pages[tokens // page_size][:, None], scale_places] = scales.float().view(torch.uint8)
    if exact:
        q = torch.randint(-4, 5, (rows, heads, dim), generator=random, device=DEVICE).float()
        weights = torch.randint(-8, 9, (rows, heads), generator=random, device=DEVICE).float()
    else:
        q = torch.randn(rows, heads, dim, generator=random, device=DEVICE)
        weights = torch.randn(rows, heads, generator=random, device=DEVICE)
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return Scoring(config, q.to(torch.float8_e4m3fn), weights, cache, table, seqlens, width)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize(("config", "gap"), [(SMALL, 0), (SMALL, 36), (PRODUCTION, 0), (PRODUCTION, 112)])
def test_logits_are_exact_where_sums_are(config: AttentionConfig, gap: int, page_size: int) -> None:
    case = scoring(config, page_size, [0, 1, 64, 65, 300, 331, 999], 331, exact=True, gap=gap)
    got = case.logits()
    assert not got.isnan().any(), "a byte was read that no row may read"
    assert_same_bits(got + 0.0, case.expected() + 0.0)  # the sign of a zero says nothing


@pytest.mark.parametrize("programs", [1, 3, 10**6])
@pytest.mark.parametrize(
    ("config", "page_size"), [(dataclasses.replace(SMALL, index_n_heads=16), 16), (PRODUCTION, 64), (PRODUCTION, 128)]
)
def test_a_logit_does_not_depend_on_who_else_is_scored(
    monkeypatch: pytest.MonkeyPatch, config: AttentionConfig, page_size: int, programs: int
) -> None:
    case = scoring(config, page_size, [150, 0, 301, 7], 310, exact=False)
    together = case.logits()
    monkeypatch.setattr(indexer, "PROGRAMS", programs)
    monkeypatch.setattr(indexer, "HOPPER_PROGRAMS", programs)
    for many_tiles in (1, 10**6):  # steps of two tiles, steps of one
        monkeypatch.setattr(indexer, "MANY_TILES", many_tiles)
        for row in range(4):
            assert_same_bits(case.logits(slice(row, row + 1)), together[row : row + 1])
        case.width = 1000
        assert_same_bits(case.logits()[:, :310].contiguous(), together)
        case.width = 310


def test_random_logits_are_close() -> None:
    """Within the rounding of the sums: 2^-23 of the sum of magnitudes a term, and as many terms as there are."""
    case = scoring(SMALL, 16, [100, 37], 100, exact=False)
    magnitudes = dataclasses.replace(case, index_weights=case.index_weights.abs())
    magnitudes.index_q = case.index_q.float().abs().to(torch.float8_e4m3fn)
    magnitudes.index_k_cache = case.index_k_cache.clone()
    magnitudes.index_k_cache[:, : 16 * SMALL.index_head_dim] &= 0x7F
    terms = SMALL.index_n_heads + SMALL.index_head_dim + 2
    live = case.expected() > -torch.inf
    bound = magnitudes.expected() * terms * 2.0**-23
    assert ((case.logits() - case.expected()).abs() <= bound)[live].all()


@pytest.mark.parametrize(("config", "page_size"), [(SMALL, 16), (PRODUCTION, 64)])
def test_a_nan_key_has_a_nan_logit(config: AttentionConfig, page_size: int) -> None:
    case = scoring(config, page_size, [100], 120, exact=True)
    page = int(case.real_page_table[0, 1])
    case.index_k_cache[page, 3 * config.index_head_dim] = NAN_BYTE
    got = case.logits()
    assert got.isnan().nonzero().tolist() == [[0, page_size + 3]]


@pytest.mark.parametrize(("rows", "width"), [(0, 16), (2, 0)])
def test_no_logits(rows: int, width: int) -> None:
    case = scoring(SMALL, 16, [0] * rows, width, exact=True)
    assert case.logits().shape == (rows, width)
