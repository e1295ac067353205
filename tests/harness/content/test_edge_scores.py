"""Made-up index keys: what their scores are, and that the same case gives the same bytes on every machine."""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest
import torch

from nsa_oracle.harness.content.edge_keys import edge_keys
from nsa_oracle.harness.content.edge_scores import EdgeScores, edge_scores
from nsa_oracle.harness.content.key_kinds import KeyKind
from nsa_oracle.harness.memory.bits import as_bytes
from nsa_oracle.harness.scenarios.setup import Regime
from nsa_oracle.reference.indexer import indexer_logits
from tests.support.layer_cases import case

PRODUCTION = {"index_n_heads": 64, "index_head_dim": 128}


def made_up(call: int = 1, **layer: Any) -> tuple[EdgeScores, torch.Tensor]:
    """The keys and their scores, by the reference."""
    setup = case(layer=layer).setup
    assert setup.layer is not None
    config = setup.layer.attention_config()
    keys = edge_keys(setup, config, 3, 0, call)
    given = edge_scores(keys.kinds, keys.inputs.index_k, setup, config, 3, 0, call)
    tensors = given.index_q, given.index_weights, given.index_k_cache, given.real_page_table, given.seqlens_expanded
    return given, indexer_logits(config, *tensors, setup.max_context_len)


@pytest.mark.parametrize("layer", [{}, PRODUCTION], ids=["small", "production"])
@pytest.mark.parametrize("regime", Regime)
def test_the_scores_of_each_kind(layer: dict[str, Any], regime: Regime) -> None:
    largest = 0.0
    for call in range(20):
        given, logits = made_up(call, regime=regime, **layer)
        assert set(given.kinds) <= set(KeyKind)
        assert given.seqlens_expanded.tolist() == [len(given.kinds), len(given.kinds) - 1]
        for row, length in enumerate(given.seqlens_expanded.tolist()):
            assert logits[row, length:].eq(-math.inf).all()
            for kind, score in zip(given.kinds[:length], logits[row].tolist(), strict=False):
                if kind in (KeyKind.NAN, KeyKind.INFINITE):
                    assert math.isnan(score)
                elif kind is KeyKind.ZEROS:
                    assert score == 0
                else:
                    assert 0 <= score < math.inf
                largest = max(largest, score if score == score else 0)
    assert largest > 2.0**100, "the largest number of bf16 is scored too"


def test_exact_regimes_have_no_sum_that_could_be_rounded() -> None:
    given, _ = made_up(regime=Regime.LATTICE)
    assert set(given.kinds) == {KeyKind.NAN, KeyKind.INFINITE, KeyKind.ZEROS, KeyKind.LARGEST}
    given, _ = made_up(regime=Regime.RANDOM)
    assert set(given.kinds) == set(KeyKind)


def test_every_kind_is_visible_to_a_row_that_is_one_token_shorter() -> None:
    seen = {kind for call in range(8) for kind in made_up(call, regime=Regime.RANDOM)[0].kinds[:-1]}
    assert seen == set(KeyKind)


def test_the_same_bytes_on_every_machine() -> None:
    given, _ = made_up(regime=Regime.RANDOM, **PRODUCTION)
    digest = 0
    for tensor in (given.index_q, given.index_weights, given.index_k_cache, given.real_page_table):
        digest = zlib.crc32(as_bytes(tensor).numpy().tobytes(), digest)
    assert digest == 2338354738


def test_names() -> None:
    given, _ = made_up(regime=Regime.RANDOM)
    assert given.name(1, 0) == f"row 1, token 0 (a made-up index key: {given.kinds[0].value})"
    assert given.name(0, len(given.kinds)) == f"row 0, token {len(given.kinds)} (behind the last one)"
