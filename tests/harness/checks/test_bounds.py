"""The error bounds hold for sound implementations, are not far above them, and catch unsound ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from nsa_oracle.harness.checks.bounds import Sums, attention_bound, fraction_used, logits_bound
from nsa_oracle.harness.content.content import Content
from nsa_oracle.harness.scenarios.setup import Regime
from nsa_oracle.reference.types import AttentionConfig
from tests.support.tensor_core import truncated_dot

SMALL = AttentionConfig(num_heads=4, kv_lora_rank=64, qk_rope_head_dim=16, index_n_heads=4, index_head_dim=32)
BIG = dataclasses.replace(AttentionConfig(), num_heads=16)
both = pytest.mark.parametrize(("attention", "count"), [(SMALL, 9), (SMALL, 200), (BIG, 700)])
LOG2E = 1.4426950408889634


def operands(attention: AttentionConfig, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of ordinary data: q [H, D], keys [n, D]."""
    content = Content(attention, Regime.RANDOM, seed)
    return content.queries([(1, 0)], 4, [[]])[0][0], content.keys(range(64, 64 + count), 3)[0]


def exact_attention(attention: AttentionConfig, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = q.double() @ k.double().T * attention.sm_scale
    return torch.softmax(scores, -1) @ k[:, : attention.kv_lora_rank].double(), torch.logsumexp(scores, -1)


def tiled_attention(
    attention: AttentionConfig, q: torch.Tensor, k: torch.Tensor, tile: int, round_weights: bool, splits: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flash attention in float32: out bf16 [H, rank], lse [H]. Splits are combined by their lse."""
    parts = [
        one_split(attention, q.float(), part.float(), tile, round_weights) for part in k.split(-(-len(k) // splits))
    ]
    lses = torch.stack([lse for _, lse in parts])  # [splits, H], log2
    top = lses.amax(0)
    lse = top + torch.log2(torch.exp2(lses - top).sum(0))
    out = sum((torch.exp2(part_lse - lse)[:, None] * part for part, part_lse in parts), torch.zeros(()))
    return out.to(torch.bfloat16), lse * np.float32(1 / LOG2E)


def one_split(
    attention: AttentionConfig, q: torch.Tensor, k: torch.Tensor, tile: int, round_weights: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    heads = len(q)
    m, total, acc = torch.full((heads,), -torch.inf), torch.zeros(heads), torch.zeros(heads, attention.kv_lora_rank)
    for keys in k.split(tile):
        x = q @ keys.T * np.float32(attention.sm_scale * LOG2E)
        new = torch.maximum(m, x.amax(1))
        weights = torch.exp2(x - new[:, None])
        factor = torch.exp2(m - new)
        total = total * factor + weights.sum(1)
        if round_weights:
            weights = weights.to(torch.bfloat16).float()
        acc = acc * factor[:, None] + weights @ keys[:, : attention.kv_lora_rank]
        m = new
    return acc / total[:, None], m + torch.log2(total)


@both
@pytest.mark.parametrize("how", ["float32", "bf16 weights", "splits"])
def test_sound_attention_stays_within_its_bound(attention: AttentionConfig, count: int, how: str) -> None:
    worst, worst_lse = 0.0, 0.0
    for seed in range(4):
        q, k = operands(attention, count, seed)
        out_bound, lse_bound = attention_bound(attention, q[None], [k])
        exact, exact_lse = exact_attention(attention, q, k)
        out, lse = tiled_attention(attention, q, k, 64, how != "float32", 5 if how == "splits" else 1)
        worst = max(worst, float(fraction_used(out, exact, out_bound[0]).max()))
        worst_lse = max(worst_lse, float(fraction_used(lse, exact_lse, lse_bound[0]).max()))
        assert float(fraction_used(lse, exact_lse.float(), lse_bound[0]).max()) <= 1
    print(f"{how}, {count} keys: out {worst:.3f}, lse {worst_lse:.5f}")
    assert 0.05 < worst <= 1
    assert 0 < worst_lse <= 1


def test_truncating_scores_stay_within_the_bound() -> None:
    q, k = operands(SMALL, 100, 1)
    exact, exact_lse = exact_attention(SMALL, q, k)
    scores = torch.from_numpy(truncated_dot(q.double().numpy(), k.double().numpy(), 16, 23))
    scaled = scores * SMALL.sm_scale
    weights = torch.softmax(scaled, -1).to(torch.bfloat16).double()
    out_bound, lse_bound = attention_bound(SMALL, q[None], [k])
    out = (weights @ k[:, : SMALL.kv_lora_rank].double()).to(torch.bfloat16)
    assert float(fraction_used(out, exact, out_bound[0]).max()) <= 1
    assert 0 < float(fraction_used(torch.logsumexp(scaled, -1), exact_lse, lse_bound[0]).max()) <= 1


@both
@pytest.mark.parametrize("fault", ["skips a key", "scale", "no RoPE", "stale key", "other row's query", "value tile"])
def test_a_faulty_attention_exceeds_its_bound(attention: AttentionConfig, count: int, fault: str) -> None:
    q, k = operands(attention, count, 0)
    out_bound, lse_bound = attention_bound(attention, q[None], [k])
    exact, exact_lse = exact_attention(attention, q, k)
    wrong, wrong_q, wrong_attention = k.clone(), q.clone(), attention
    heaviest = int((q.double() @ k.double().T)[0].argmax())
    match fault:
        case "skips a key":
            wrong = torch.cat([k[:heaviest], k[heaviest + 1 :]])
        case "scale":
            wrong_attention = dataclasses.replace(attention, sm_scale=attention.sm_scale * 1.1)
        case "no RoPE":
            wrong[:, attention.kv_lora_rank :] = 0
        case "stale key":
            wrong[heaviest] = Content(attention, Regime.RANDOM, 0).keys([64 + heaviest], 2)[0][0]
        case "other row's query":
            wrong_q = Content(attention, Regime.RANDOM, 0).queries([(2, 0)], 4, [[]])[0][0]
        case "value tile":
            values = wrong[heaviest, : attention.kv_lora_rank].view(-1, attention.quant_tile)
            values[int(values.abs().amax(1).argmax())] *= 2
    out, lse = tiled_attention(wrong_attention, wrong_q, wrong, 64, True)
    assert float(fraction_used(out, exact, out_bound[0]).max()) > 1
    assert float(fraction_used(lse, exact_lse, lse_bound[0]).max()) > 1


def index_operands(attention: AttentionConfig, count: int, seed: int) -> tuple[torch.Tensor, ...]:
    content = Content(attention, Regime.RANDOM, seed)
    _, index_q, weights = content.queries([(1, 0), (2, 1)], 4, [[], []])
    index_k = content.keys(range(64, 64 + count), 3)[1].float()
    amax = index_k.abs().amax(1)
    scales = torch.where(amax == 0, torch.ones_like(amax), amax / 448)
    return index_q, weights, (index_k / scales[:, None]).to(torch.float8_e4m3fn), scales


def logits_of(q: torch.Tensor, w: torch.Tensor, k: torch.Tensor, r: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    dots = torch.relu(q.to(dtype) @ k.to(dtype).T)  # [R, IH, n]
    return (w.to(dtype)[..., None] * dots).sum(1) * r.to(dtype)


@both
def test_sound_logits_stay_within_their_bound(attention: AttentionConfig, count: int) -> None:
    worst = {"float32": 0.0, "fp8": 0.0}
    for seed in range(4):
        q, w, k, r = index_operands(attention, count, seed)
        exact = logits_of(q, w, k, r, torch.float64)
        bound = logits_bound(attention, q, w, k, r)
        assert bound.shape == exact.shape
        got = logits_of(q, w, k, r, torch.float32)
        worst["float32"] = max(worst["float32"], float(fraction_used(got, exact, bound).max()))
        assert float(fraction_used(got, exact.float(), bound).max()) <= 1
        own = logits_bound(attention, q, w, k.expand(2, *k.shape), r.expand(2, -1))
        assert torch.allclose(own, bound, rtol=1e-12, atol=0)
        few = slice(0, 40)
        dots = np.stack([truncated_dot(row.double().numpy(), k[few].double().numpy(), 32, 13) for row in q])
        fp8 = (w.double()[..., None] * torch.from_numpy(dots).relu()).sum(1) * r[few]
        loose = logits_bound(attention, q, w, k[few], r[few], Sums.FP8_TENSOR_CORE)
        worst["fp8"] = max(worst["fp8"], float(fraction_used(fp8, exact[:, few], loose).max()))
    print(count, worst)
    assert 1e-4 < worst["float32"] <= 1  # errors average out over heads and elements, the bound cannot count on it
    assert 1e-4 < worst["fp8"] <= 1


@both
@pytest.mark.parametrize("fault", ["scale", "skips a head", "no relu", "skips an element", "neighbour's scale"])
def test_faulty_logits_exceed_their_bound(attention: AttentionConfig, count: int, fault: str) -> None:
    q, w, k, r = index_operands(attention, count, 0)
    exact, bound = logits_of(q, w, k, r, torch.float64), logits_bound(attention, q, w, k, r)
    match fault:
        case "scale":
            got = logits_of(q, w, k, r * 1.01, torch.float32)
        case "skips a head":
            got = logits_of(q[:, 1:], w[:, 1:], k, r, torch.float32)
        case "no relu":
            got = ((w[..., None] * (q.float() @ k.float().T)).sum(1)) * r
        case "skips an element":
            got = logits_of(q[..., 1:], w, k[:, 1:], r, torch.float32)
        case _:
            got = logits_of(q, w, k, r.roll(1), torch.float32)
    assert float((fraction_used(got, exact, bound) > 1).double().mean()) > 0.2  # a head may add nothing to a logit


def test_a_row_without_keys_has_no_leeway() -> None:
    q, k = operands(SMALL, 5, 0)
    out_bound, lse_bound = attention_bound(SMALL, torch.stack([q, q]), [k[:0], k])
    assert not out_bound[0].any()
    assert not lse_bound[0].any()
    assert bool((out_bound[1] > 0).all())
    assert bool((lse_bound[1] > 0).all())
    assert bool(fraction_used(torch.tensor(-torch.inf), torch.tensor(-torch.inf), lse_bound[0]).eq(0).all())


def test_hopeless_magnitudes_promise_nothing() -> None:
    q, k = operands(SMALL, 5, 0)
    out_bound, lse_bound = attention_bound(SMALL, q[None] * 2.0**14, [k])
    assert bool(out_bound.isinf().any())
    assert not bool(out_bound.isnan().any() | lse_bound.isnan().any())


def test_fraction_used() -> None:
    inf, nan = torch.inf, torch.nan
    got = torch.tensor([1.0, 2.0, inf, nan, 1.0, nan, inf, 3.0, -inf])
    exact = torch.tensor([1.0, 1.0, inf, nan, 0.0, 1.0, 1.0, 2.0, inf])
    bound = torch.tensor([0.0, 4.0, 0.0, 1.0, 0.0, 1.0, inf, inf, 1.0])
    assert fraction_used(got, exact, bound).tolist() == [0.0, 0.25, 0.0, 0.0, inf, inf, inf, 0.0, inf]
