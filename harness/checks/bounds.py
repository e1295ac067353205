"""A-priori bounds, per element, on the error of a sound float32 implementation.

The bounds follow from the number of terms and their magnitudes, never from the observed behaviour of an implementation,
and nothing can be configured. Each bound covers the worst case. The exact answer is real arithmetic on the inputs as
given (bf16 keys as read from the cache, e4m3 index keys with their float32 scale), computed in float64. Index logits
and the lse may also be compared with that answer rounded to float32, as ``reference/`` gives them. All tensors stay on
the inputs' device.

**What an implementation may do.**

- A product of two bf16 or e4m3 numbers is exact in float32 (16 or 8 bits of significand).
- A sum of n terms may have any order and grouping. Hopper's tensor cores shift the terms of one instruction, and the
  accumulator, to the largest exponent among them, truncate below 23 fractional bits, and truncate the result to
  float32: each term loses less than 2^-23 of the largest term or partial sum, each result 2^-23 of itself. u = 2^-22
  per term covers both, and also ordinary float32 additions (2^-24 each). No term or partial sum exceeds (A + |S|) / 2
  in magnitude, for the sum A of magnitudes and the true sum S, because it lies between the sum of the negative terms
  and the sum of the positive ones. The error is therefore at most gamma(n) (A + |S|) / 2 with
  gamma(n) = n u / (1 - n u), where the denominator accounts for the errors of the partial sums themselves.
- FP8 tensor cores keep 13 fractional bits instead (``Sums.FP8_TENSOR_CORE``): u = 2^-13, and a result is truncated
  after every 16 terms. The contract requires float32 sums; a kernel that sums in FP8 tensor cores needs this bound.
- exp2, log2, exp and log have an error of 2 ulp (2^-22), a division of 2^-22, each other operation of 2^-24.
- Weights may be rounded to bf16 for the product with the values (2^-8), and in the denominator as well.
- Tiles have at least 16 keys, and there are at most 64 splits: an accumulator is rescaled at most n/16 + 64 =: T times.
- Numbers below 2^-126 may be flushed to zero wherever they arise.

**Attention**, for one row and head; s_j = q . k_j, x_j = c s_j with c = sm_scale log2(e), p_j = 2^x_j / sum 2^x_i:

1. |s'_j - s_j| <= ds_j = gamma(D) (A_j + |s_j|) / 2 + 2^-126 (sum|q| + sum|k_j| + 2 D). The last term is for flushing.
2. Exponents: c has 3 roundings (and one in the expected answer), c s has one, the difference to a maximum has one (of
   at most |x_j| + max|x|). The maximum changes during the computation, and its differences add up to a magnitude of at
   most 2 max|x|. A combination through logarithms adds log2 of a sum <= 2048, which is 11 or slightly more. The total
   is less than 2^-21 (|x_j| + max|x| + 12), with enough slack for |x'_j| in place of |x_j|:
   dx_j = (1 + 2^-20) (c ds_j + 2^-21 (|x_j| + max|x| + 12)).
3. Weight j, as it enters numerator or denominator, is therefore the exact one times 1 + t_j, |t_j| <= b_j =
   exp(ln2 dx_j + 2^-8 + (T + 2) 2^-21) - 1: argument, bf16, and exp2 and a multiplication for each of T rescalings.
   (A product of factors, each 1 + e or 1 - e with e <= e_i or 2^+-e_i, differs from 1 by at most exp(sum e_i) - 1.)
4. Numerator N_d = sum p_j v_jd: |N'_d - N_d| <= EN_d = B_d + gamma(n + T) ((sum p_j|v_jd| + |N_d|) / 2 + B_d) + f,
   B_d = sum p_j b_j |v_jd|. Denominator 1: |L' - 1| <= EL = B + gamma(n + T) (1 + B) + f, B = sum p_j b_j.
   f is the loss from flushing. Each of at most 2^10 operations on a key's contribution loses 2^-126 of its |v|, or of 1
   if v itself is flushed: f_d = 2^-116 sum_j (1 + |v_jd|).
5. |N'/L' - N| <= (EN + |N| EL) / (1 - EL) =: E, if EL < 1. Otherwise there is no bound.
6. Stored: E + (|N| + E) (2^-8 + 2^-20) + 2^-126, for divisions (also within a split), rounding to bf16, and flushing.

No second-order term is dropped: 3 to 6 are inequalities for errors of any size.

The lse is ln2 max x + ln L. Its bound has -ln(1 - EL) for the sum (the error of the maximum cancels, since the weights
are relative to it), and 2^-21 (max|x| ln2 + ln n + 1) for the logarithm, the product, the addition and the rounding of
the expected answer.

**Indexer**, for one row and key; r the key's scale:

7. |dot'_h - dot_h| <= d_h = gamma(ID) (A_h + |dot_h|) / 2; relu does not enlarge it.
8. logit = r sum_h w_h relu(dot_h), a sum of IH terms with at most 4 more roundings, that of the answer included:
   r (sum|w_h| d_h + gamma(IH + 4) (sum|w_h| (relu(dot_h) + d_h))) + flushing.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import torch

from nsa_oracle.reference.types import AttentionConfig

_LN2 = math.log(2)
_UNIT = 2.0**-22  # error of a float32 sum, per term
_FP8_UNIT = 2.0**-13
_FP8_TERMS = 16  # after which an FP8 tensor core may truncate its result
_BF16 = 2.0**-8  # half a unit in the last of 8 bits
_LEAST_NORMAL = 2.0**-126
_FLUSHED = 2.0**-116
_TILE = 16
_SPLITS = 64
_AT_ONCE = 1 << 23  # elements of keys per group of rows; on a GPU, launches per row would cost more than the work


class Sums(enum.Enum):
    """How a product of index query and key is summed: a property of the kernel's instructions, not a tolerance."""

    FLOAT32 = "float32"  # float32 additions, or bf16 tensor cores
    FP8_TENSOR_CORE = "fp8 tensor core"


def attention_bound(
    attention: AttentionConfig, q: torch.Tensor, keys: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest difference from the exact attention of each row over its selected keys.

    q: [R, H, qk_head_dim] bf16. keys: for each row [n, qk_head_dim] bf16, as read from the cache. Returns out_bound
    [R, H, kv_lora_rank] and lse_bound [R, H], float64. Both are 0 for a row without keys, whose output is specified,
    and infinity where there is no bound.
    """
    rows, heads = q.shape[:2]
    out = torch.zeros(rows, heads, attention.kv_lora_rank, dtype=torch.float64, device=q.device)
    lse = torch.zeros(rows, heads, dtype=torch.float64, device=q.device)
    by_count: dict[int, list[int]] = {}
    for row, row_keys in enumerate(keys):
        by_count.setdefault(len(row_keys), []).append(row)
    for count, alike in by_count.items():
        at_once = max(1, _AT_ONCE // max(1, count * attention.qk_head_dim))
        for begin in range(0, len(alike) if count else 0, at_once):
            part = alike[begin : begin + at_once]
            out[part], lse[part] = _attention_rows(
                attention, q[part].double(), torch.stack([keys[row] for row in part]).double()
            )
    return out, lse


def logits_bound(
    attention: AttentionConfig,
    index_q: torch.Tensor,
    index_weights: torch.Tensor,
    index_k: torch.Tensor,
    scales: torch.Tensor,
    sums: Sums = Sums.FLOAT32,
) -> torch.Tensor:
    """Largest difference from the exact index logits: [R, n] float64.

    index_q: [R, IH, ID] e4m3. index_weights: [R, IH] float32. index_k: [n, ID] e4m3 and scales: [n] float32, shared by
    all rows, or [R, n, ID] and [R, n].
    """
    q, weights = index_q.double(), index_weights.double().abs().unsqueeze(-1)  # [R, IH, 1]
    k, r = index_k.double().transpose(-1, -2), scales.double().abs()
    dots = q @ k  # [R, IH, n]
    d = _dot_gamma(attention.index_head_dim, sums) * _reach(q.abs() @ k.abs(), dots)
    dots = dots.relu()
    terms = (weights * (dots + d)).sum(1)
    flushed = _FLUSHED * (1 + r * (1 + weights.sum(1)) * (1 + dots.sum(1)))
    return r * ((weights * d).sum(1) + _gamma(attention.index_n_heads + 4) * terms) + flushed


def fraction_used(got: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """The difference as a fraction of the bound, elementwise in float64. A sound result has at most 1.

    0 where both numbers are equal, the same infinity, or NaN. Infinity where they differ and the bound is 0 or NaN, or
    where one of them is not finite.
    """
    a, b, most = (tensor.detach().double() for tensor in (got, exact, bound))
    same = (a == b) | (a.isnan() & b.isnan())
    fraction = (a - b).abs() / most
    hopeless = fraction.isnan() | ~a.isfinite() | ~b.isfinite()
    return torch.where(same, 0.0, torch.where(hopeless, torch.inf, fraction))


def _attention_rows(
    attention: AttentionConfig, q: torch.Tensor, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds [R, H, rank], [R, H] of rows with n keys each: q [R, H, D], keys [R, n, D], float64. Steps 1 to 6."""
    n = keys.shape[1]
    rescalings = n / _TILE + _SPLITS
    gamma = _gamma(n + rescalings)
    exponents, dx = _exponents(attention, q, keys)  # [R, H, n]
    p = torch.softmax(exponents * _LN2, dim=-1)
    b = torch.expm1(_LN2 * dx + _BF16 + (rescalings + 2) * 2.0**-21)

    values = keys[..., : attention.kv_lora_rank]
    exact, magnitude, weight_error = p @ values, p @ values.abs(), (p * b) @ values.abs()  # [R, H, rank]
    flushed = _FLUSHED * (n + values.abs().sum(-2, keepdim=True))  # [R, 1, rank]
    numerator = weight_error + gamma * (_reach(magnitude, exact) + weight_error) + flushed
    total = (p * b).sum(-1, keepdim=True)  # [R, H, 1]
    denominator = total + gamma * (1 + total) + _FLUSHED * n
    left = (1 - denominator).clamp(min=0)  # 0: no bound; divisions by it give infinity
    error = (numerator + exact.abs() * denominator) / left
    out = error + (exact.abs() + error) * (_BF16 + 2.0**-20) + _LEAST_NORMAL

    largest = exponents.abs().amax(-1)
    lse = -torch.log(left.squeeze(-1)) + 2.0**-21 * (_LN2 * largest + math.log(n) + 1)
    return out, lse


def _exponents(attention: AttentionConfig, q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact exponents x [R, H, n] in the exp2 domain, and their error bound dx [R, H, n]."""
    dim = q.shape[-1]
    factor = attention.sm_scale / _LN2
    scores, magnitudes = q @ keys.mT, q.abs() @ keys.abs().mT
    flushed = _LEAST_NORMAL * (q.abs().sum(-1, keepdim=True) + keys.abs().sum(-1)[..., None, :] + 2 * dim)
    ds = _gamma(dim) * _reach(magnitudes, scores) + flushed
    x = factor * scores
    largest = x.abs().amax(dim=-1, keepdim=True)
    return x, (1 + 2.0**-20) * (factor * ds + 2.0**-21 * (x.abs() + largest + 12))


def _reach(magnitude: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Upper bound of all terms and partial sums: (A + |S|) / 2."""
    return (magnitude + total.abs()) / 2


def _gamma(terms: float, unit: float = _UNIT) -> float:
    return terms * unit / (1 - terms * unit)


def _dot_gamma(terms: int, sums: Sums) -> float:
    if sums is Sums.FLOAT32:
        return _gamma(terms)
    return _gamma(terms + 2 * math.ceil(terms / _FP8_TERMS), _FP8_UNIT)
