"""Exact conversion between numbers and the bits of float8 e4m3, in the interpreter and on every GPU.

Triton's interpreter gets about 2.5% of the casts from float32 wrong and reads e4m3's NaN as 480, and GPUs before
compute capability 8.9 have no e4m3 at all. Kernels therefore keep e4m3 in memory and registers as uint8, and convert it
with these functions only.
"""

# mypy: disable-error-code="untyped-decorator"
# (Triton ships no types for its decorator)

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

FLOAT32_ABS = tl.constexpr(0x7FFFFFFF)  # mask of all bits but the sign
FLOAT32_INF = tl.constexpr(0x7F800000)
E4M3_MAX = tl.constexpr(448.0)
E4M3_NAN = tl.constexpr(0x7F)
MAX_CODE = tl.constexpr(0x7E)  # bits of 448
MIN_NORMAL = tl.constexpr(0x3C800000)  # float32 bits of 2^-6, below which e4m3 is subnormal
DROPPED_BITS = tl.constexpr(20)  # of float32's mantissa
HALF_QUANTUM = tl.constexpr(0x7FFFF)  # just below half of what is dropped
REBIAS = tl.constexpr((127 - 7) << 3)  # float32's exponent bias to e4m3's, above three bits of mantissa
SUBNORMAL_MAGIC = tl.constexpr(16384.0)  # its last bit weighs 2^-9, as e4m3's subnormals do
SUBNORMAL_MAGIC_BITS = tl.constexpr(0x46800000)
DOT_DTYPE = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.float16)  # the interpreter's dot is exact


@triton.jit
def to_e4m3_bits(x: tl.tensor) -> tl.tensor:
    """``x`` float32 as e4m3, uint8: rounded to nearest even, saturating at 448. NaN and signs are kept."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & FLOAT32_ABS
    # Adding just under half a quantum, plus the last kept bit, carries exactly when rounding goes up.
    rounded = magnitude + HALF_QUANTUM + ((magnitude >> DROPPED_BITS) & 1)
    normal = tl.minimum((rounded >> DROPPED_BITS) - REBIAS, MAX_CODE)
    # A float32 addition rounds to the last bit of the larger number, which is the quantum here.
    shifted = magnitude.to(tl.float32, bitcast=True) + SUBNORMAL_MAGIC
    subnormal = shifted.to(tl.int32, bitcast=True) - SUBNORMAL_MAGIC_BITS
    code = tl.where(magnitude < MIN_NORMAL, subnormal, normal)
    code = tl.where(magnitude > FLOAT32_INF, E4M3_NAN, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_e4m3_bits(bits: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """The values of the e4m3 ``bits`` (uint8), as float16 or wider, which represent every e4m3 value exactly."""
    if not INTERPRETED and tl.target_info.cuda_capability_geq(8, 9):
        return bits.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    wide = bits.to(tl.uint16)
    # e4m3's exponent and mantissa in the places of float16's: too small by the difference of the biases, 2^8.
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    value = half.to(tl.float16, bitcast=True) * 256.0
    value = tl.where((wide & 0x7F) == E4M3_NAN, float("nan"), value)
    return value.to(DTYPE)
