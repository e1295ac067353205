"""Each operation of a kernel that runs as C gives what torch and numpy give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

pytestmark = pytest.mark.usefixtures("all_are_compiled")

SPECIAL = [0.0, -0.0, 1.0, -1.5, 3e38, 1e-40, -1e-45, float("inf"), float("-inf"), float("nan"), 448.0, 449.0, 65520.0]


@triton.jit
def integers_kernel(x, y, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    a = tl.load(x + lanes)
    b = tl.load(y + lanes)
    tl.store(out + lanes, a + b)
    tl.store(out + N + lanes, a - b)
    tl.store(out + 2 * N + lanes, a * b)
    tl.store(out + 3 * N + lanes, a // b)
    tl.store(out + 4 * N + lanes, a % b)
    tl.store(out + 5 * N + lanes, a & b)
    tl.store(out + 6 * N + lanes, a | b)
    tl.store(out + 7 * N + lanes, a ^ b)
    tl.store(out + 8 * N + lanes, a >> 3)
    tl.store(out + 9 * N + lanes, a << 3)
    tl.store(out + 10 * N + lanes, tl.minimum(a, b))
    tl.store(out + 11 * N + lanes, tl.maximum(a, b))
    tl.store(out + 12 * N + lanes, tl.where(a < b, a, b))
    tl.store(out + 13 * N + lanes, -a)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_integers(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    values = [limits.min, limits.max, 1, 7, limits.max // 2, 100, limits.min + 1, 3]
    others = [3, 7, limits.max, 5, 2, 11, 13, 1]
    if dtype is not torch.uint8:
        others[1::2] = [-other for other in others[1::2]]
    a, b = torch.tensor(values, dtype=dtype), torch.tensor(others, dtype=dtype)
    out = torch.zeros(14, 8, dtype=dtype)
    integers_kernel[(1,)](a, b, out, N=8)
    quotient = torch.div(a, b, rounding_mode="trunc")
    expected = [
        a + b, a - b, a * b, quotient, a - quotient * b, a & b, a | b, a ^ b, a >> 3, a << 3, torch.minimum(a, b),
        torch.maximum(a, b), torch.minimum(a, b), -a,
    ]  # fmt: skip
    assert torch.equal(out, torch.stack(expected))


@triton.jit
def floats_kernel(x, y, z, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    a = tl.load(x + lanes)
    b = tl.load(y + lanes)
    c = tl.load(z + lanes)
    tl.store(out + lanes, a + b)
    tl.store(out + N + lanes, a - b)
    tl.store(out + 2 * N + lanes, a * b)
    tl.store(out + 3 * N + lanes, a / b)
    tl.store(out + 4 * N + lanes, a * b + c)
    tl.store(out + 5 * N + lanes, tl.abs(a))
    tl.store(out + 6 * N + lanes, tl.where(a < b, 1.0, tl.where(a != b, 2.0, 3.0)))
    tl.store(out + 7 * N + lanes, -a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_floats_are_rounded_one_operation_at_a_time(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(3, 64, generator=generator, dtype=torch.float64) * 3).to(dtype)
    a[: len(SPECIAL)] = torch.tensor(SPECIAL).to(dtype)
    b[5 : 5 + len(SPECIAL)] = torch.tensor(SPECIAL).to(dtype)
    out = torch.zeros(8, 64, dtype=dtype)
    floats_kernel[(1,)](a, b, c, out, N=64)
    compared = torch.where(a < b, 1.0, torch.where(a != b, 2.0, 3.0)).to(dtype)
    negated = torch.where(a == 0, out[7], -a)  # -0.0 in some versions of Triton, which subtract from 0 in others
    assert_same(out, torch.stack([a + b, a - b, a * b, a / b, a * b + c, a.abs(), compared, negated]))


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits, of any NaN too, but for the bits of the NaN."""
    assert got.dtype is expected.dtype
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(got), nan)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    assert torch.equal(got.view(bits)[~nan], expected.view(bits)[~nan])


@triton.jit
def extremes_kernel(x, y, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    a = tl.load(x + lanes)
    b = tl.load(y + lanes)
    tl.store(out + lanes, tl.maximum(a, b))
    tl.store(out + N + lanes, tl.minimum(a, b))
    tl.store(out + 2 * N + lanes, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + 3 * N + lanes, tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + 4 * N + lanes, tl.clamp(a, -1.0, 1.0))


def test_extremes_of_nan_and_zeros() -> None:
    nan, inf = float("nan"), float("inf")
    a = torch.tensor([nan, 1.0, nan, 0.0, -0.0, inf, -3.0, 2.0])
    b = torch.tensor([1.0, nan, nan, -0.0, 0.0, 1.0, 4.0, -inf])
    out = torch.zeros(5, 8)
    extremes_kernel[(1,)](a, b, out, N=8)
    expected = [
        [1.0, 1.0, nan, 0.0, 0.0, inf, 4.0, 2.0],
        [1.0, 1.0, nan, -0.0, -0.0, 1.0, -3.0, -inf],
        [nan, nan, nan, 0.0, 0.0, inf, 4.0, 2.0],
        [nan, nan, nan, -0.0, -0.0, 1.0, -3.0, -inf],
        [-1.0, 1.0, -1.0, 0.0, -0.0, 1.0, -1.0, 1.0],
    ]
    assert_same(out, torch.tensor(expected))


@triton.jit
def fma_kernel(x, y, z, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out + lanes, tl.fma(tl.load(x + lanes), tl.load(y + lanes), tl.load(z + lanes)))


def test_fma_rounds_once() -> None:
    a = torch.full((4,), 1 + 2.0**-12)
    out = torch.zeros(4)
    fma_kernel[(1,)](a, a, torch.full((4,), -1 - 2.0**-11), out, N=4)
    assert out.tolist() == [2.0**-24] * 4  # rounded twice it is 0


@triton.jit
def functions_kernel(x, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    a = tl.load(x + lanes)
    tl.store(out + lanes, tl.exp(a))
    tl.store(out + N + lanes, tl.exp2(a))
    tl.store(out + 2 * N + lanes, tl.log(a))
    tl.store(out + 3 * N + lanes, tl.log2(a))
    tl.store(out + 4 * N + lanes, tl.sin(a))
    tl.store(out + 5 * N + lanes, tl.cos(a))
    tl.store(out + 6 * N + lanes, tl.sqrt(a))
    tl.store(out + 7 * N + lanes, tl.rsqrt(a))
    tl.store(out + 8 * N + lanes, tl.floor(a))
    tl.store(out + 9 * N + lanes, tl.ceil(a))
    tl.store(out + 10 * N + lanes, libdevice.log(a))
    tl.store(out + 11 * N + lanes, tl.sqrt_rn(a))
    tl.store(out + 12 * N + lanes, tl.div_rn(a, a + 1.0))


def test_functions_are_those_of_the_c_library() -> None:
    x = torch.linspace(0.01, 20, 64)
    out = torch.zeros(13, 64)
    functions_kernel[(1,)](x, out, N=64)
    wide = x.double()
    exact = [
        wide.exp(), wide.exp2(), wide.log(), wide.log2(), wide.sin(), wide.cos(), wide.sqrt(), wide.rsqrt(),
        wide.floor(), wide.ceil(), wide.log(), wide.sqrt(), wide / (x + 1).double(),
    ]  # fmt: skip
    expected = torch.stack(exact)
    spacing = torch.from_numpy(np.spacing(np.abs(expected.float().numpy())).astype(np.float64))
    ulps = ((out.double() - expected).abs() / spacing).amax(1)
    assert ulps.max() <= 2
    assert ulps[[8, 9, 6, 11, 12]].max() <= 0.5


@triton.jit
def to_kernel(x, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out + lanes, tl.load(x + lanes).to(out.dtype.element_ty))


NARROW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_floats_widen(dtype: torch.dtype) -> None:
    wide = torch.int16 if dtype.itemsize == 2 else torch.uint8
    codes = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32).to(wide).view(dtype)
    out = torch.zeros(codes.numel())
    to_kernel[(1,)](codes, out, N=codes.numel())
    assert_same(out, codes.float())


@pytest.mark.parametrize("dtype", NARROW)
def test_floats_are_narrowed_to_nearest_even(dtype: torch.dtype) -> None:
    wide = torch.int16 if dtype.itemsize == 2 else torch.uint8
    codes = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32).to(wide).view(dtype).float()
    ordered = codes[torch.isfinite(codes)].unique()
    middles = (ordered[1:].double() + ordered[:-1].double()).float() / 2  # ties, and their neighbours
    x = torch.cat([ordered, middles, *(torch.nextafter(middles, torch.tensor(end)) for end in (9e37, -9e37))])
    x = torch.cat([x, torch.tensor([1e-40, -0.0, float("nan")])])
    padded = torch.zeros(triton.next_power_of_2(x.numel()))
    padded[: x.numel()] = x
    out = torch.zeros(padded.numel(), dtype=dtype)
    to_kernel[(1,)](padded, out, N=padded.numel())
    expected = padded.to(dtype)
    assert torch.equal(torch.isnan(out.float()), torch.isnan(expected.float()))
    finite = ~torch.isnan(expected.float())
    assert torch.equal(out.view(wide)[finite], expected.view(wide)[finite])


def test_e4m3_saturates() -> None:
    x = torch.tensor([449.0, 1e30, float("inf"), float("-inf")])
    out = torch.zeros(4, dtype=torch.float8_e4m3fn)
    to_kernel[(1,)](x, out, N=4)
    assert out.float().tolist() == [448.0, 448.0, 448.0, -448.0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8])
def test_numbers_convert_to_integers_and_back(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1.9, -1.9 if dtype is not torch.uint8 else 2.5, 100.7])
    whole = torch.zeros(4, dtype=dtype)
    to_kernel[(1,)](x, whole, N=4)
    assert torch.equal(whole, x.trunc().to(dtype))
    back = torch.zeros(4)
    to_kernel[(1,)](whole, back, N=4)
    assert torch.equal(back, whole.float())


def test_what_does_not_fit_an_integer_saturates_as_on_a_gpu() -> None:
    out = torch.zeros(4, dtype=torch.int32)
    to_kernel[(1,)](torch.tensor([3e9, -3e9, float("nan"), float("inf")]), out, N=4)
    assert out.tolist() == [2**31 - 1, -(2**31), 0, 2**31 - 1]


@triton.jit
def shapes_kernel(x, out, M: tl.constexpr, N: tl.constexpr):
    rows = tl.arange(0, M)[:, None]
    columns = tl.arange(0, N)[None, :]
    a = tl.load(x + rows * N + columns)
    flat = tl.arange(0, M * N)
    tl.store(out + columns * M + rows, a)
    tl.store(out + M * N + flat, tl.reshape(tl.trans(a), [M * N]))
    tl.store(
        out + 2 * M * N + flat, tl.reshape(tl.join(a, a + 100), [2 * M * N]).reshape([M, N, 2]).sum(2).reshape([M * N])
    )
    low, high = tl.split(tl.reshape(a, [M, N // 2, 2]))
    tl.store(out + 3 * M * N + flat, tl.reshape(tl.join(high, low), [M * N]))
    tl.store(out + 4 * M * N + flat, tl.reshape(tl.permute(tl.reshape(a, [M, N // 2, 2]), [2, 0, 1]), [M * N]))
    tl.store(out + 5 * M * N + flat, tl.reshape(tl.gather(a, tl.broadcast_to(N - 1 - columns, [M, N]), 1), [M * N]))
    tl.store(out + 6 * M * N + flat, tl.reshape(tl.flip(a, 1), [M * N]))
    tl.store(out + 7 * M * N + flat, tl.reshape(tl.sort(a, 1, descending=True), [M * N]))


def test_shapes() -> None:
    x = torch.randperm(32, generator=torch.Generator().manual_seed(1)).to(torch.int32).reshape(4, 8)
    out = torch.zeros(8, 32, dtype=torch.int32)
    shapes_kernel[(1,)](x, out, M=4, N=8)
    pairs = x.reshape(4, 4, 2)
    expected = [
        x.T, x.T, 2 * x + 100, pairs.flip(2), pairs.permute(2, 0, 1), x.flip(1), x.flip(1),
        x.sort(1, descending=True).values,
    ]  # fmt: skip
    for number, tensor in enumerate(expected):
        assert torch.equal(out[number], tensor.flatten()), number


@triton.jit
def combine_pairs(a_value, a_index, b_value, b_index):
    return a_value ^ b_value, tl.maximum(a_index, b_index)


@triton.jit
def reductions_kernel(x, out, M: tl.constexpr, N: tl.constexpr):
    rows = tl.arange(0, M)
    columns = tl.arange(0, N)
    a = tl.load(x + rows[:, None] * N + columns[None, :])
    tl.store(out + rows, tl.sum(a, 1))
    tl.store(out + M + rows, tl.max(a, 1))
    tl.store(out + 2 * M + rows, tl.argmax(a, 1))
    tl.store(out + 3 * M + rows, tl.argmin(a, 1))
    tl.store(out + 4 * M + rows, tl.xor_sum(a, 1))
    value, index = tl.reduce((a, tl.broadcast_to(columns[None, :], [M, N])), 1, combine_pairs)
    tl.store(out + 5 * M + rows, value)
    tl.store(out + 6 * M + rows, index)
    tl.store(out + 7 * M + rows, tl.sum(tl.cumsum(a, 1), 1))
    tl.store(out + 8 * M + rows, tl.sum(tl.cumsum(a, 1, reverse=True) * columns[None, :], 1))
    tl.store(out + 9 * M, tl.sum(a))
    tl.store(out + 10 * M + rows, tl.histogram(tl.reshape(a, [M * N]), M))
    total = tl.sum(a, 0)
    tl.store(out + 11 * M + columns, total)


def test_reductions() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 50, (8, 4), generator=generator, dtype=torch.int32)
    out = torch.zeros(12, 8, dtype=torch.int32)
    reductions_kernel[(1,)](x, out, M=8, N=4)
    xor = x[:, 0] ^ x[:, 1] ^ x[:, 2] ^ x[:, 3]
    columns = torch.arange(4)
    sums = x.cumsum(1)
    backwards = x.flip(1).cumsum(1).flip(1)
    whole = torch.zeros(8, dtype=torch.int64)
    whole[0] = x.sum()
    last = torch.zeros(8, dtype=torch.int64)
    last[:4] = x.sum(0)
    expected = [
        x.sum(1), x.amax(1), x.argmax(1), x.argmin(1), xor, xor,
        torch.full((8,), 3), sums.sum(1), (backwards * columns).sum(1), whole,
        torch.bincount(x.flatten(), minlength=64)[:8], last,
    ]  # fmt: skip
    for number, tensor in enumerate(expected):
        assert out[number].tolist() == tensor.tolist(), number


@triton.jit
def dot_kernel(x, y, z, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(x + m[:, None] * K + k[None, :])
    b = tl.load(y + k[:, None] * N + n[None, :])
    c = tl.load(z + m[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(a, b, c, PRECISION, out_dtype=z.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8])
def test_products(dtype: torch.dtype) -> None:
    """Small whole numbers, of which all sums are exact."""
    generator = torch.Generator().manual_seed(3)
    a, b = (
        torch.randint(-8, 8, (16 * 32,), generator=generator).to(dtype).reshape(shape) for shape in ((16, 32), (32, 16))
    )
    total = torch.int32 if dtype is torch.int8 else torch.float32
    c = torch.arange(256).reshape(16, 16).to(total)
    out = torch.zeros(16, 16, dtype=total)
    dot_kernel[(1,)](a, b, c, out, M=16, N=16, K=32, PRECISION="ieee" if dtype is torch.float32 else None)
    assert torch.equal(out.double(), a.double() @ b.double() + c.double())


@pytest.mark.parametrize(("precision", "product"), [("ieee", 1 + 2.0**-12), ("tf32", 1.0)])
def test_the_precision_of_a_product_of_floats(precision: str, product: float) -> None:
    a, b = torch.zeros(2, 16, 16)
    a[0, 0], b[0, 0] = 1 + 2.0**-12, 1.0
    out = torch.zeros(16, 16)
    dot_kernel[(1,)](a, b, torch.zeros(16, 16), out, M=16, N=16, K=16, PRECISION=precision)
    assert out[0, 0].item() == product


@triton.jit
def control_kernel(out, n, N: tl.constexpr):
    lanes = tl.arange(0, N)
    first = lanes
    second = lanes * 10
    for step in range(n):
        first, second = second, first + step
    tl.store(out + lanes, first)
    tl.store(out + N + lanes, second)
    number = n
    steps = 0
    while (number != 1) & (steps < 1000):
        number = number // 2 if number % 2 == 0 else 3 * number + 1
        steps += 1
    tl.store(out + 2 * N, steps)
    chosen = lanes + 7 if n > 5 else lanes * 3
    tl.store(out + 3 * N + lanes, chosen)
    total = tl.zeros([N], tl.int32)
    for row in range(n, 0, -2):
        for column in range(row):
            total += row * column + lanes
    tl.store(out + 4 * N + lanes, total)


@pytest.mark.parametrize("n", [0, 1, 5, 6, 27])
def test_control_flow(n: int) -> None:
    lanes = torch.arange(4)
    out = torch.zeros(5, 4, dtype=torch.int32)
    control_kernel[(1,)](out, n, N=4)
    first, second = lanes, lanes * 10
    for step in range(n):
        first, second = second, first + step
    number, steps = n, 0
    while number != 1 and steps < 1000:
        number, steps = (number // 2 if number % 2 == 0 else 3 * number + 1), steps + 1
    total = sum((row * column + lanes for row in range(n, 0, -2) for column in range(row)), torch.zeros(4, dtype=int))
    expected = [first, second, torch.tensor([steps, 0, 0, 0]), lanes + 7 if n > 5 else lanes * 3, total]
    assert out.tolist() == [tensor.tolist() for tensor in expected]


@triton.jit
def early_kernel(x, out, n, N: tl.constexpr):
    """Returns early in two places."""
    lanes = tl.arange(0, N)
    row = tl.program_id(0)
    if row >= n:
        return
    value = tl.load(x + row * N + lanes)
    if tl.sum(value) > 20:
        tl.store(out + row * N + lanes, value * 2)
        return
    tl.store(out + row * N + lanes, value + row)


def test_a_program_may_return_early() -> None:
    x = torch.arange(16, dtype=torch.int32).reshape(4, 4)
    out = torch.zeros(5, 4, dtype=torch.int32)
    early_kernel[(5,)](x, out, 3, N=4)
    assert torch.equal(out, torch.cat([x[:1], x[1:3] * 2, torch.zeros(2, 4, dtype=torch.int32)]))


@triton.jit
def atomics_kernel(counters, old, floats, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(old + lanes, tl.atomic_add(counters + lanes % 2, lanes, mask=lanes != 3))
    tl.atomic_max(counters + 2, 7)
    tl.atomic_min(counters + 3, -7)
    tl.atomic_or(counters + 4, 6)
    tl.atomic_and(counters + 5, 6)
    tl.atomic_xor(counters + 6, 6)
    tl.atomic_xchg(counters + 7, 6)
    tl.store(old + N, tl.atomic_cas(counters + 8, 0, 9))
    tl.store(old + N + 1, tl.atomic_cas(counters + 8, 0, 10))
    tl.atomic_add(floats, 1.5)


def test_atomic_operations() -> None:
    counters = torch.tensor([0, 10, 3, 3, 3, 3, 3, 3, 0], dtype=torch.int32)
    old, floats = torch.zeros(10, dtype=torch.int32), torch.zeros(1)
    atomics_kernel[(1,)](counters, old, floats, N=8)
    assert counters.tolist() == [12, 10 + 1 + 5 + 7, 7, -7, 7, 2, 5, 6, 9]
    assert old.tolist() == [0, 10, 0, 0, 2, 11, 6, 16, 0, 9]
    assert floats.item() == 1.5


@triton.jit
def asm_kernel(x, y, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    a, b = tl.load(x + lanes), tl.load(y + lanes)
    result = tl.inline_asm_elementwise(
        "set.ge.f32.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
    )
    tl.store(out + lanes, result)


def test_inline_assembly() -> None:
    a, b = torch.tensor([1.0, 2.0, float("nan"), -0.0]), torch.tensor([2.0, 2.0, 1.0, 0.0])
    out = torch.zeros(4)
    asm_kernel[(1,)](a, b, out, N=4)
    assert out.tolist() == [0.0, 1.0, 0.0, 1.0]


@triton.jit
def arguments_kernel(out, nothing, flag, number, wide, real, one, SIZE: tl.constexpr = 4):
    lanes = tl.arange(0, SIZE)
    place = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    value = number * one + wide // 4294967296
    if flag:
        value += 100
    if nothing is None:
        value += 1000
    tl.store(out + place * SIZE + lanes, value + real + lanes)


def test_arguments_and_grids() -> None:
    out = torch.zeros(2 * 3 * 2, 4)
    arguments_kernel[(2, 3, 2)](out, None, True, -5, 3 << 32, 0.5, 1)
    assert torch.equal(out, (1098.5 + torch.arange(4)).expand(12, 4))
    arguments_kernel[lambda meta: (meta["SIZE"] // 2,)](out, out, False, 7, 1 << 32, real=-0.25, one=2, SIZE=2)
    assert out.flatten()[:2].tolist() == [14.75, 15.75]


@triton.jit
def high_kernel(x, y, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out + lanes, tl.umulhi(tl.load(x + lanes), tl.load(y + lanes)))


def test_high_halves_of_products() -> None:
    x = torch.tensor([-1, 1 << 20, 3, -(1 << 31)], dtype=torch.int32)
    out = torch.zeros(4, dtype=torch.int32)
    high_kernel[(1,)](x, x, out, N=4)
    wide = [((int(n) & 0xFFFFFFFF) ** 2 >> 32) for n in x]
    assert [int(n) & 0xFFFFFFFF for n in out] == wide
