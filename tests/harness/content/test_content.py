"""Content is a pure function of what it should depend on."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch

from nsa_oracle.harness.content.content import Content
from nsa_oracle.harness.content.exact import MAX_SLOTS, VERSIONS
from nsa_oracle.harness.scenarios.setup import Regime
from nsa_oracle.reference.types import AttentionConfig
from tests.support.contents import BIG, SLOTS, SMALL, as_bytes, both, each


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


def test_sizes_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match="quant tile"):
        Content(dataclasses.replace(SMALL, kv_lora_rank=32), Regime.LATTICE, 0)
    Content(dataclasses.replace(SMALL, kv_lora_rank=32), Regime.RANDOM, 0).keys([1], 0)
    with pytest.raises(ValueError, match="no code of its own"):
        Content(SMALL, Regime.DOMINATING, 0).keys([2**15], 0)
    with pytest.raises(ValueError, match="slots must lie"):
        Content(SMALL, Regime.LATTICE, 0).keys([MAX_SLOTS], 0)
