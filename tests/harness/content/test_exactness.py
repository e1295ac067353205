"""What the proof of exactness assumes holds for exact content, and its check refuses everything else."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from nsa_oracle.harness.content.content import Content
from nsa_oracle.harness.content.exactness import NotExact, check_exact, check_exact_index
from nsa_oracle.harness.scenarios.setup import Regime
from nsa_oracle.reference.types import AttentionConfig, KVCacheDtype
from tests.support.contents import BIG, SLOTS, SMALL, as_bytes, both, each_exact, index_logits, quantize, row
from tests.support.tensor_core import truncated_dot


@each_exact
@both
def test_the_fp8_cache_loses_nothing(attention: AttentionConfig, regime: Regime) -> None:
    content = Content(attention, regime, 1)
    k, index_k = content.keys(range(1, 400), 2)
    seen: set[float] = set()
    for part, tile in ((k[:, : attention.kv_lora_rank], attention.quant_tile), (index_k, attention.index_head_dim)):
        values, scales = quantize(part, tile)
        assert bool((values.float().unflatten(-1, (-1, tile)) * scales[..., None]).flatten(-2).eq(part).all())
        seen |= set(scales.flatten().tolist())
    assert seen == {1.0, 2.0**-7, 2.0**-8, 2.0**-9}
    assert bool(k[:, : attention.kv_lora_rank].any(1).all())


@each_exact
@both
def test_content_passes_its_check(attention: AttentionConfig, regime: Regime) -> None:
    for seed in range(6):
        content = Content(attention, regime, seed)
        slots = SLOTS if attention is SMALL else [*SLOTS, *range(2000, 2300)]
        q, index_q, weights, k, index_k = row(content, slots)
        check_exact(attention, regime, q, k)
        check_exact(dataclasses.replace(attention, kv_cache_dtype=KVCacheDtype.BF16), regime, q, k)
        values, scales = quantize(index_k, attention.index_head_dim)
        check_exact_index(attention, index_q, weights, values, scales[:, 0])


def test_a_full_row_of_production_size_passes_its_check() -> None:
    q, index_q, weights, k, index_k = row(Content(BIG, Regime.LATTICE, 3), range(64, 64 + 2048))
    check_exact(BIG, Regime.LATTICE, q, k)
    values, scales = quantize(index_k, BIG.index_head_dim)
    check_exact_index(BIG, index_q, weights, values, scales[:, 0])


def any_attention(q: torch.Tensor, k: torch.Tensor, rank: int, random: np.random.Generator) -> bytes:
    """Float32 attention as some kernel might do it: keys shuffled, in tiles, in splits with their own maxima."""
    keys = k.float().numpy()[random.permutation(len(k))]
    queries = q.float().numpy()
    splits = np.array_split(keys, int(random.integers(1, min(5, len(keys)) + 1)))
    parts = [one_split(queries, part, rank, random) for part in splits]
    m = np.max([part[0] for part in parts], axis=0)
    total = np.zeros(len(q), dtype=np.float32)
    acc = np.zeros((len(q), rank), dtype=np.float32)
    for i in random.permutation(len(parts)):
        factor = np.exp2(parts[i][0] - m).astype(np.float32)
        total = total + parts[i][1] * factor
        acc = acc + parts[i][2] * factor[:, None]
    return as_bytes(torch.from_numpy(acc / total[:, None]).to(torch.bfloat16))


def one_split(
    q: np.ndarray, keys: np.ndarray, rank: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Running maximum, sum and accumulator over tiles; every sum in float32, term by term, in random order."""
    m = np.full(len(q), -np.inf, dtype=np.float32)
    total = np.zeros(len(q), dtype=np.float32)
    acc = np.zeros((len(q), rank), dtype=np.float32)
    for tile in np.array_split(keys, max(1, len(keys) // 3)):
        scores = np.zeros((len(q), len(tile)), dtype=np.float32)
        for d in random.permutation(q.shape[1]):
            scores += q[:, d : d + 1] * tile[:, d]
        new = np.maximum(m, scores.max(axis=1))
        factor = np.exp2(m - new).astype(np.float32)
        total, acc, m = total * factor, acc * factor[:, None], new
        weights = torch.from_numpy(np.exp2(scores - m[:, None])).to(torch.bfloat16).float().numpy()
        for j in random.permutation(len(tile)):
            total = total + weights[:, j]
            acc = acc + weights[:, j : j + 1] * tile[j, :rank]
    return m, total, acc


def fraction_attention(q: torch.Tensor, k: torch.Tensor, rank: int) -> bytes:
    """Exactly, in rational numbers; rounded to float32, then to bf16."""
    out = torch.empty(len(q), rank, dtype=torch.bfloat16)
    scores = (q.double() @ k.double().T).long()
    for head in range(len(q)):
        top = int(scores[head].max())
        weights = [Fraction(1, 2 ** (top - int(s))) for s in scores[head]]
        weights = [w if w > Fraction(1, 2**200) else Fraction(0) for w in weights]
        for d in range(rank):
            number = sum((w * Fraction(float(k[j, d])) for j, w in enumerate(weights)), Fraction(0)) / sum(weights)
            out[head, d] = torch.tensor(rounded_to_float32(number), dtype=torch.float32).to(torch.bfloat16)
    return as_bytes(out)


def rounded_to_float32(number: Fraction) -> float:
    """To nearest even, by integers: 24 significant bits."""
    if number == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(number))) - 23
    scaled = number / Fraction(2) ** exponent
    if abs(scaled) >= 2**24:
        scaled, exponent = scaled / 2, exponent + 1
    return float(round(scaled) * Fraction(2) ** exponent)  # Fraction rounds half to even


@each_exact
def test_attention_has_the_same_bits_in_any_order(regime: Regime) -> None:
    random = np.random.default_rng(0)
    for seed, count in itertools.product(range(3), (1, 7, 16)):
        q, _, _, k, _ = row(Content(SMALL, regime, seed), SLOTS[:count])
        rank = SMALL.kv_lora_rank
        want = fraction_attention(q, k, rank)
        assert all(any_attention(q, k, rank, random) == want for _ in range(3))


def test_long_rows_have_the_same_bits_in_any_order() -> None:
    random = np.random.default_rng(0)
    q, _, _, k, _ = row(Content(SMALL, Regime.LATTICE, 0), range(64, 64 + 2048))
    assert len({any_attention(q, k, SMALL.kv_lora_rank, random) for _ in range(3)}) == 1


@each_exact
def test_index_logits_have_the_same_bits_in_any_order(regime: Regime) -> None:
    random = np.random.default_rng(0)
    _, index_q, weights, _, index_k = row(Content(SMALL, regime, 4), SLOTS)
    want = index_logits(index_q, weights, index_k, SMALL)
    values, scales = quantize(index_k, SMALL.index_head_dim)
    q, k, w = index_q.float().numpy(), values.float().numpy(), weights.numpy()
    for _ in range(4):
        logits = np.zeros(len(k), dtype=np.float32)
        for head in random.permutation(len(q)):
            dot = np.zeros(len(k), dtype=np.float32)
            for d in random.permutation(q.shape[1]):
                dot += q[head, d] * k[:, d]
            logits += w[head] * np.maximum(dot, np.float32(0))
        assert [Fraction(float(x)) for x in logits * scales[:, 0].numpy()] == want


@each_exact
@both
def test_tensor_cores_cut_nothing_off(attention: AttentionConfig, regime: Regime) -> None:
    q, index_q, _, k, index_k = row(Content(attention, regime, 4), SLOTS)
    values, _ = quantize(index_k, attention.index_head_dim)
    for a, b, group, bits in ((q, k, 16, 23), (index_q, values, 32, 13), (index_q, values, 16, 13)):
        queries, keys = a.double().numpy(), b.double().numpy()
        assert np.array_equal(truncated_dot(queries, keys, group, bits), queries @ keys.T)


def broken(change: str) -> tuple[AttentionConfig, Regime, torch.Tensor, torch.Tensor]:
    attention, regime = SMALL, Regime.LATTICE
    q, _, _, k, _ = row(Content(attention, regime, 1), SLOTS)
    match change:
        case "scale":
            attention = dataclasses.replace(attention, sm_scale=0.5)
        case "keys":
            k = k.repeat(200, 1)
        case "grid":
            k[2, 5] = 1 / 16
        case "large":
            k[2, 5] = 4.5
        case "fp8 scale":
            k[3, :16] = 0.25
            k[3, 2] = 0.5 + 1 / 8
        case "fp8 value":
            k[3, :16] = 0.25
            k[3, 2], k[3, 3] = 3.5, 2.125
        case "integer":
            q[1, 70] = 0.5
        case "spread":
            q[1] *= 8
        case "terms":
            q[1, -1] = 2.0**25
        case "equal":
            regime = Regime.EQUAL
        case "gap":
            regime = Regime.DOMINATING
            q[1] *= 8
        case "random":
            regime = Regime.RANDOM
        case "infinite":
            q[1, 2] = torch.inf
    return attention, regime, q, k


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("scale", "sm_scale is 0.5, not ln 2"),
        ("keys", "3200 keys; at most 2048"),
        ("grid", r"no multiple of 1/8: 0.0625 at \(key, element\) = 2, 5"),
        ("large", r"a value exceeds 4: 4.5 at \(key, element\) = 2, 5"),
        ("fp8 scale", r"no power of two: .* at \(key, tile\) = 3, 0"),
        ("fp8 value", r"the FP8 cache rounds a value: 2.125 at \(key, element\) = 3, 3"),
        ("integer", "no integer but a multiple of 0.5"),
        ("spread", r"more than 8 below the largest: .* at \(head, key\) = 1,"),
        ("terms", r"terms exceed 2\^24"),
        ("equal", "below the largest"),
        ("gap", "neither within 8 of the largest nor 256 below"),
        ("random", "random content is not exact"),
        ("infinite", "out of range or too fine: inf"),
    ],
)
def test_the_check_refuses(change: str, message: str) -> None:
    with pytest.raises(NotExact, match=message) as refusal:
        check_exact(*broken(change))
    assert "\n" not in str(refusal.value)


def test_the_check_of_an_empty_row_passes() -> None:
    q, index_q, weights, k, index_k = row(Content(SMALL, Regime.LATTICE, 1), SLOTS)
    check_exact(SMALL, Regime.LATTICE, q, k[:0])
    check_exact_index(SMALL, index_q, weights, index_k[:0], torch.empty(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("scale", "an index key's scale is no power of two"),
        ("weight", r"a sum over heads exceeds 2\^24"),
        ("dot", r"a dot product exceeds 2\^13"),
        ("nan", "out of range or too fine: nan"),
    ],
)
def test_the_index_check_refuses(change: str, message: str) -> None:
    _, index_q, weights, _, index_k = row(Content(SMALL, Regime.LATTICE, 1), SLOTS)
    values, scales = quantize(index_k, SMALL.index_head_dim)
    k, scale = values.float(), scales[:, 0]
    match change:
        case "scale":
            scale[4] = 0.3
        case "weight":
            weights[0] = 2.0**-20
        case "dot":
            index_q = index_q.float()
            index_q[0, 0], index_q[1] = 2.0**-9, 100.0
        case "nan":
            k[2, 2] = torch.nan
    with pytest.raises(NotExact, match=message):
        check_exact_index(SMALL, index_q, weights, k, scale)
