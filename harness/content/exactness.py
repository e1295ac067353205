"""Proof that the exact regimes of ``content.content`` are exact, and a check that given inputs satisfy its premises.

**Attention.** For one row and head let the selected keys have scores s_j = q . k_j and values v_j (their latent part).

1. *Scores.* Every product q_d k_jd is an integer and sum_d |q_d k_jd| <= 2^24. Any partial sum is an integer of at most
   that magnitude, which float32 represents. So s_j is exact in any order of summation, also on tensor cores, which keep
   24 bits below the largest term. sm_scale = ln 2 makes the factor of the exp2 domain exactly 1, so the exponents are
   the s_j themselves.
2. *Weights.* With m = max_j s_j, each key is *near* (m - s_j <= 8) or *far* (m - s_j >= 256). Relative to any near key
   a far key has weight 2^-248 or less, which is 0 in float32 (the least positive number is 2^-149). If an
   implementation accumulates far keys alone first, its factor that rescales this finite sum when a near key comes is 0
   for the same reason. Far keys contribute nothing.
3. *Sums.* Let g be the least s_j of the near keys, and m' the reference from which an implementation measures exponents
   (a running maximum, that of a split, or the final one). It is the score of a near key, hence g <= m' <= g + 8. With
   at most 2048 keys and values that are multiples of 1/8 with |v| <= 4:
       sum 2^(s_j - m') v_jd = 2^(g - m' - 3) N,  N = sum 2^(s_j - g) 8 v_jd an integer,  |N| <= 2048 2^8 32 = 2^24,
       sum 2^(s_j - m')      = 2^(g - m') M,      M = sum 2^(s_j - g) an integer,         0 < M <= 2^19.
   The same holds for any partial sum, and a change of m' multiplies by a power of two. So accumulators and denominators
   are exact for any order, tiling and splitting, whenever they are rescaled. Weights are powers of two, so rounding
   them to bf16 changes nothing.
4. *Result.* N and M are exact, so N/M rounded once to float32 and once to bf16 has one bit pattern.

The FP8 cache does not change these keys: a tile's scale amax / 448 is a power of two (amax is 3.5, 1.75 or 7/8, which
is 448 times 2^-7, 2^-8, 2^-9) or 1 for a zero tile, and key / scale is an integer of at most 448 with at most 4
significant bits, which e4m3 represents.

Content satisfies the premises with a margin. A LATTICE head reads two score elements (each adds 0, 1 or 2 times one
sign) and two code elements (each adds +-1), so scores of any two keys differ by at most 2 * 2 + 2 * 2 = 8. The constant
element shifts all scores alike, and is the only one that EQUAL reads. DOMINATING reads 128 times a code of +-1: the
target scores at least 256 more than any other slot, whose code differs in at least one element.

**Indexer.** For one row let kq_j be the key as cached (e4m3), r_j its scale, w_h the weights.

5. Every product q_hd kq_jd is a multiple of one power of two, u, and sum_d |q_hd kq_jd| <= 2^13 u. So a dot product is
   exact in any order even on FP8 tensor cores, which keep 13 bits below the leading one of the largest term.
6. Every w_h is a multiple of one power of two, t, and sum_h |w_h| relu(q_h . kq_j) <= 2^24 u t: exact in any order.
7. r_j is a power of two: scaling is exact, before or after the sum.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from nsa_oracle.harness.scenarios.setup import Regime
from nsa_oracle.reference.types import FP8_MAX, AttentionConfig, KVCacheDtype

MAX_KEYS = 2048
NEAR = 8
FAR = 256
MAX_VALUE = 4
VALUE_GRID = 8  # values are multiples of 1/8
FP32_UNITS = 2.0**24
FP8_TENSOR_CORE_UNITS = 2.0**13
_FINEST = 24  # this module's arithmetic needs numbers that are multiples of 2^-24 and below 2^38


class NotExact(ValueError):
    """The proof does not hold for these inputs. The message is one line: the premise, and where it fails."""


def check_exact(attention: AttentionConfig, regime: Regime, q: torch.Tensor, keys: torch.Tensor) -> None:
    """Check one row's queries q [H, qk_head_dim] bf16, on any device, with its selected keys [n, qk_head_dim] bf16.

    The keys may be those written or those read from the cache. Raises NotExact with the first premise that fails. For
    scores the regime's own premise is checked: in EQUAL none is below the largest, in LATTICE none is far below it.
    """
    if not regime.is_exact:
        raise NotExact(f"{regime.value} content is not exact")
    if np.float32(attention.sm_scale / math.log(2)) != 1:
        raise NotExact(f"sm_scale is {attention.sm_scale}, not ln 2")
    if len(keys) > MAX_KEYS:
        raise NotExact(f"{len(keys)} keys; at most {MAX_KEYS}")
    if len(keys) == 0:
        return
    queries, numbers = q.double(), keys.double()
    _check_values(numbers[:, : attention.kv_lora_rank])
    if attention.kv_cache_dtype is KVCacheDtype.FP8:
        _check_survives_fp8(numbers[:, : attention.kv_lora_rank], attention.quant_tile)
    _check_scores(regime, queries, numbers)


def check_exact_index(
    attention: AttentionConfig,
    index_q: torch.Tensor,
    index_weights: torch.Tensor,
    index_k: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    """Check one row's index queries [IH, ID] e4m3 and weights [IH] with cached index keys [n, ID] e4m3 and scales [n].

    Raises NotExact with the first premise that fails.
    """
    if len(index_k) == 0:
        return
    queries, weights, keys = index_q.double(), index_weights.double(), index_k.double()
    _check_powers_of_two(scales.double(), "key", "an index key's scale")
    unit = _product_unit(queries, keys, "index query", "index key")
    magnitudes = queries.abs() @ keys.abs().T  # [IH, n]
    _refuse(magnitudes > FP8_TENSOR_CORE_UNITS * unit, magnitudes, "head, key", f"a dot product exceeds 2^13 of {unit}")
    weight_unit = float(_units(weights, "index weight").min())
    sums = weights.abs() @ (queries @ keys.T).relu()  # [n]
    limit = FP32_UNITS * unit * weight_unit
    _refuse(sums > limit, sums, "key", f"a sum over heads exceeds 2^24 of {unit * weight_unit}")


def _check_values(values: torch.Tensor) -> None:
    off_grid = values * VALUE_GRID != torch.round(values * VALUE_GRID)
    _refuse(off_grid, values, "key, element", f"a value is no multiple of 1/{VALUE_GRID}")
    _refuse(values.abs() > MAX_VALUE, values, "key, element", f"a value exceeds {MAX_VALUE}")


def _check_scores(regime: Regime, queries: torch.Tensor, keys: torch.Tensor) -> None:
    unit = _product_unit(queries, keys, "query", "key")
    if unit < 1:
        raise NotExact(f"a product of query and key is no integer but a multiple of {unit}")
    magnitudes = queries.abs() @ keys.abs().T  # [H, n]
    _refuse(magnitudes > FP32_UNITS, magnitudes, "head, key", "a score's terms exceed 2^24")
    scores = queries @ keys.T  # exact: integers below 2^24
    below = scores.amax(dim=1, keepdim=True) - scores
    match regime:
        case Regime.EQUAL:
            _refuse(below > 0, below, "head, key", "a score is below the largest")
        case Regime.LATTICE:
            _refuse(below > NEAR, below, "head, key", f"a score is more than {NEAR} below the largest")
        case _:
            wrong = (below > NEAR) & (below < FAR)
            _refuse(wrong, below, "head, key", f"a score is neither within {NEAR} of the largest nor {FAR} below it")


def _check_survives_fp8(numbers: torch.Tensor, tile: int) -> None:
    """Check that quantising ``numbers`` [n, rank], with one scale per ``tile`` elements, does not change them."""
    tiles = numbers.reshape(len(numbers), -1, tile)
    amax = tiles.abs().amax(dim=2)
    scales = torch.where(amax == 0, 1.0, (amax / FP8_MAX).float().double())
    _check_powers_of_two(scales, "key, tile", "a tile's scale")
    scaled = (tiles / scales[..., None]).reshape(numbers.shape)
    cached = scaled.float().to(torch.float8_e4m3fn).double()
    _refuse(cached != scaled, numbers, "key, element", "the FP8 cache rounds a value")


def _check_powers_of_two(scales: torch.Tensor, axes: str, what: str) -> None:
    mantissas, _ = torch.frexp(scales)
    _refuse(mantissas != 0.5, scales, axes, f"{what} is no power of two")


def _product_unit(queries: torch.Tensor, keys: torch.Tensor, query_name: str, key_name: str) -> float:
    """Largest power of two that divides every product q_hd k_jd; infinity if all are 0."""
    return float((_units(queries, query_name) * _units(keys, key_name)).min())


def _units(numbers: torch.Tensor, what: str) -> torch.Tensor:
    """[n, d] -> [d]: largest power of two that divides each column, infinity for zeros. [n] counts as one column."""
    columns = numbers if numbers.dim() == 2 else numbers[:, None]
    scaled = columns.abs() * 2.0**_FINEST
    wrong = ~(scaled < 2.0**62) | (scaled != torch.round(scaled))
    _refuse(wrong, columns, "row, column", f"a number of the {what} is out of range or too fine")
    whole = scaled.long()
    return torch.where(whole == 0, torch.inf, (whole & -whole) * 2.0**-_FINEST).amin(dim=0)


def _refuse(wrong: torch.Tensor, numbers: torch.Tensor, axes: str, premise: str) -> None:
    """Raise NotExact for the first place that ``wrong`` marks, if any."""
    if not bool(wrong.any()):
        return
    place = tuple(int(i) for i in wrong.nonzero()[0])
    raise NotExact(f"{premise}: {float(numbers[place]):g} at ({axes}) = {', '.join(map(str, place))}")
