"""Content is a pure function of what it should depend on, and exact where it claims to be."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from tensor_core import truncated_dot

from nsa_oracle.harness.content.content import Content
from nsa_oracle.harness.content.exact import MAX_SLOTS, VERSIONS, Origin
from nsa_oracle.harness.content.exactness import NotExact, check_exact, check_exact_index
from nsa_oracle.harness.scenarios.regime import Regime
from nsa_oracle.harness.scenarios.rng import Stream
from nsa_oracle.reference.types import AttentionConfig, KVCacheDtype

SMALL = AttentionConfig(4, 64, 16, 3, 32, sm_scale=math.log(2))
BIG = AttentionConfig(sm_scale=math.log(2))
EXACT = [regime for regime in Regime if regime.is_exact]
SLOTS = [64, 65, 7, 130, 99, 100, 3, 1000, 2**15 - 1, 12, 13, 14, 15, 16, 17, 18]
both = pytest.mark.parametrize("attention", [SMALL, BIG], ids=["small", "production"])
each_exact = pytest.mark.parametrize("regime", EXACT)
each = pytest.mark.parametrize("regime", list(Regime))


def row(content: Content, slots: Sequence[int], pool_row: int = 3, version: int = 9) -> tuple[torch.Tensor, ...]:
    """One row that sees ``slots``: q [H, D], index_q [IH, ID], weights [IH], k [n, D], index_k [n, ID]."""
    k, index_k = content.keys(slots, version - 1)
    q, index_q, weights = content.queries([(pool_row, 1)], version, [slots])
    return q[0], index_q[0], weights[0], k, index_k


def quantize(x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The FP8 caches' rule, by itself: values e4m3 [n, d], scales float32 [n, d / tile]."""
    tiles = x.float().unflatten(-1, (-1, tile))
    amax = tiles.abs().amax(-1)
    scales = torch.where(amax == 0, torch.ones_like(amax), amax / 448)
    return (tiles / scales[..., None]).flatten(-2).to(torch.float8_e4m3fn), scales


def as_bytes(*tensors: torch.Tensor) -> bytes:
    return b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)


# What it depends on.


@each
@both
def test_a_key_depends_on_slot_and_version_alone(attention: AttentionConfig, regime: Regime) -> None:
    content = Content(attention, regime, 5)
    k, index_k = content.keys(SLOTS, 4)
    alone, index_alone = Content(attention, regime, 5).keys([SLOTS[3]], 4)
    assert as_bytes(k[3], index_k[3]) == as_bytes(alone[0], index_alone[0])
    again, index_again = content.keys(SLOTS[::-1], 4)
    assert as_bytes(k, index_k) == as_bytes(again.flip(0), index_again.flip(0))
    stale, _ = content.keys(SLOTS, 3)
    assert bool((k != stale).any(1).all())
    assert as_bytes(*content.keys(SLOTS, 4 + VERSIONS)) == as_bytes(k, index_k)
    other, _ = Content(attention, regime, 6).keys(SLOTS, 4)
    assert bool((k != other).any(1).all())


@each
@both
def test_a_query_depends_on_id_version_and_candidates_alone(attention: AttentionConfig, regime: Regime) -> None:
    content = Content(attention, regime, 5)
    ids = [(0, 0), (0, 1), (2, 0), (1, 3)]
    candidates = [SLOTS[:5], SLOTS[:1], SLOTS, []]
    batch = content.queries(ids, 7, candidates)
    for i in range(len(ids)):
        alone = Content(attention, regime, 5).queries([ids[i]], 7, [candidates[i]])
        assert as_bytes(*(t[i] for t in batch)) == as_bytes(*(t[0] for t in alone))
    later = content.queries(ids, 8, candidates)
    assert as_bytes(*batch) != as_bytes(*later)
    if regime is not Regime.DOMINATING:
        assert as_bytes(*content.queries(ids, 7, [[]] * 4)) == as_bytes(*batch)


@each
def test_shapes_and_dtypes(regime: Regime) -> None:
    content = Content(SMALL, regime, 0)
    for n in (0, 3):
        k, index_k = content.keys(SLOTS[:n], 0)
        q, index_q, weights = content.queries([(i, 0) for i in range(n)], 0, [SLOTS] * n)
        assert (k.shape, k.dtype) == ((n, 80), torch.bfloat16)
        assert (index_k.shape, index_k.dtype) == ((n, 32), torch.bfloat16)
        assert (q.shape, q.dtype) == ((n, 4, 80), torch.bfloat16)
        assert (index_q.shape, index_q.dtype) == ((n, 3, 32), torch.float8_e4m3fn)
        assert (weights.shape, weights.dtype) == ((n, 3), torch.float32)


@pytest.mark.parametrize(
    ("regime", "digest"),
    [
        (Regime.DOMINATING, "aec4e3684d753cd0"),
        (Regime.EQUAL, "989095be5c0891ed"),
        (Regime.LATTICE, "221d9a0bcb262c64"),
        (Regime.RANDOM, "95264ca9d6dc5790"),
    ],
)
def test_content_is_the_same_everywhere(regime: Regime, digest: str) -> None:
    digests = hashlib.sha256()
    for attention, seed in ((SMALL, 0), (BIG, 2**64 - 1)):
        content = Content(attention, regime, seed)
        digests.update(as_bytes(*content.keys(SLOTS, 11)))
        digests.update(as_bytes(*content.queries([(0, 0), (5, 2)], 12, [SLOTS[:9], SLOTS[:1]])))
    assert digests.hexdigest()[:16] == digest


def test_bulk_numbers_follow_from_seed_label_and_place() -> None:
    stream = Stream(3, "x")
    rows = stream.words_at([(1, 2), (2**40, 7)], 5)
    assert rows[:, 0].tolist() == [5315799218864804568, 15626340787260901118]
    assert np.array_equal(stream.words_at([(2**40, 7)], 9)[0, :5], rows[1])
    assert stream.integers(3, 1000) == Stream(3, "x").integers(3, 1000)  # seeking disturbs nothing
    as_bytes_ = stream.bytes_at([(1, 2)], 9)
    assert [int(b) for b in as_bytes_[0, :8]] == list(int(rows[0, 0]).to_bytes(8, "little"))
    assert int(stream.halves_at([(1, 2)], 3)[0, 1]) == int(rows[0, 0]) >> 16 & 0xFFFF
    assert stream.bytes_at([], 9).shape == (0, 9)


def test_sizes_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match="quant tile"):
        Content(dataclasses.replace(SMALL, kv_lora_rank=32), Regime.LATTICE, 0)
    Content(dataclasses.replace(SMALL, kv_lora_rank=32), Regime.RANDOM, 0).keys([1], 0)
    with pytest.raises(ValueError, match="no code of its own"):
        Content(SMALL, Regime.DOMINATING, 0).keys([2**15], 0)
    with pytest.raises(ValueError, match="slots must lie"):
        Content(SMALL, Regime.LATTICE, 0).keys([MAX_SLOTS], 0)


# The proof's premises, by checks of our own and by ``check_exact``.


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


@each_exact
def test_scores_are_what_the_regime_says(regime: Regime) -> None:
    content = Content(SMALL, regime, 2)
    q, _, _, k, _ = row(content, SLOTS)
    scores = q.double() @ k.double().T
    below = scores.amax(1, keepdim=True) - scores
    match regime:
        case Regime.DOMINATING:
            targets = [SLOTS[int(i)] for i in scores.argmax(1)]
            assert targets == content.targets((3, 1), 9, SLOTS)
            assert below.sort(dim=1).values[:, 1].min() >= 256
        case Regime.EQUAL:
            assert not below.any()
        case _:
            assert 1 < below.max() <= 8
            assert len(scores.unique()) > 4


def test_dominating_heads_cover_many_candidates() -> None:
    content = Content(BIG, Regime.DOMINATING, 0)
    assert len(set(content.targets((0, 0), 0, range(100, 228)))) == 128
    assert len(set(content.targets((0, 0), 0, range(100, 1100)))) == 128
    assert set(content.targets((0, 0), 0, [5, 6])) == {5, 6}
    starts = {content.targets((0, 0), version, range(100))[0] for version in range(50)}
    assert len(starts) > 20


def index_logits(
    index_q: torch.Tensor, weights: torch.Tensor, index_k: torch.Tensor, attention: AttentionConfig
) -> list[Fraction]:
    """By the definition, in rational numbers."""
    values, scales = quantize(index_k, attention.index_head_dim)
    dots = torch.relu(index_q.double() @ values.double().T)
    return [
        Fraction(float(scales[j, 0]))
        * sum(Fraction(float(w)) * Fraction(float(d)) for w, d in zip(weights, dots[:, j], strict=True))
        for j in range(len(index_k))
    ]


@both
def test_index_logits_are_what_the_regime_says(attention: AttentionConfig) -> None:
    slots = list(range(1, 200))
    for seed in range(4):
        _, index_q, weights, _, index_k = row(Content(attention, Regime.DOMINATING, seed), slots)
        logits = index_logits(index_q, weights, index_k, attention)
        assert logits.index(max(logits)) == 0
        assert logits.count(max(logits)) == 1
        _, index_q, weights, _, index_k = row(Content(attention, Regime.EQUAL, seed), slots)
        assert len(set(index_logits(index_q, weights, index_k, attention))) == 1
        _, index_q, weights, _, index_k = row(Content(attention, Regime.LATTICE, seed), slots)
        distinct = len(set(index_logits(index_q, weights, index_k, attention)))
        assert 1 < distinct < 150
    assert bool((weights < 0).any()) or attention is SMALL


# Any order, tiling and splitting gives the same bits.


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


# An output names the slot it came from.


@each_exact
@both
def test_a_value_row_names_its_slot_and_pass(attention: AttentionConfig, regime: Regime) -> None:
    content = Content(attention, regime, 8)
    k, _ = content.keys(SLOTS, VERSIONS - 1)
    rank = attention.kv_lora_rank
    assert [content.decode(v) for v in k[:, :rank]] == [Origin(slot, VERSIONS - 1) for slot in SLOTS]
    assert content.decode(k[0, :rank].clone()).slot == SLOTS[0]
    mixed = torch.cat([k[0, : rank // 2], k[1, rank // 2 : rank]])
    assert content.decode(mixed) is None
    for wrong in (torch.zeros(rank), torch.full((rank,), torch.nan), k[0, :rank] * 2, k[0, :rank] + 1 / 8):
        assert content.decode(wrong) is None
    touched = k[0, :rank].clone()
    touched[int(touched.abs().argmin())] += 1 / 8
    assert content.decode(touched) is None


def test_a_dominated_output_names_the_target() -> None:
    content = Content(SMALL, Regime.DOMINATING, 8)
    q, _, _, k, _ = row(content, SLOTS)
    weights = torch.softmax(q.double() @ k.double().T * SMALL.sm_scale, dim=-1)
    out = (weights @ k[:, : SMALL.kv_lora_rank].double()).to(torch.bfloat16)
    assert [content.decode(o).slot for o in out] == content.targets((3, 1), 9, SLOTS)


def test_random_content_is_ordinary() -> None:
    content = Content(BIG, Regime.RANDOM, 8)
    k, index_k = content.keys(range(300), 0)
    q, index_q, weights = content.queries([(0, 0), (1, 0)], 0, [[], []])
    for tensor in (k, index_k, q, index_q, weights):
        numbers = tensor.float()
        assert bool(numbers.isfinite().all())
        assert 0.3 < float(numbers.mean() / numbers.std() + 1) < 1.7
    tiny = (k != 0) & (k.abs().float() < 2.0**-126)
    assert 300 < int(tiny.sum()) < 700
    assert float(k.abs().max()) > 16
    empty = (k[:, :512].unflatten(1, (4, 128)) == 0).all(-1)
    assert 20 < int(empty.sum()) < 150
    assert 0 < int((index_k == 0).all(1).sum()) < 20
    assert content.decode(k[0, :512]) is None


# The check refuses what would break the proof.


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
        ("random", "random content promises nothing"),
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
