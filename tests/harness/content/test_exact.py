"""Exact content has the scores that its regime promises, and an output names the slot that it came from."""

from __future__ import annotations

import torch

from nsa_oracle.harness.content.content import Content
from nsa_oracle.harness.content.exact import VERSIONS, Origin
from nsa_oracle.harness.scenarios.setup import Regime
from nsa_oracle.reference.types import AttentionConfig
from tests.support.contents import BIG, SLOTS, SMALL, both, each_exact, index_logits, row


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
