"""Small cases with an attention layer behind the metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nsa_oracle.harness.checks.relations import Relation
from nsa_oracle.harness.scenarios.scenario import Capture, Event, Join, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Layer, Regime, Setup
from nsa_oracle.reference.types import ForwardMode, KVCacheDtype
from tests.support.backends.clean import Clean
from tests.support.metadata_cases import DECODE, factory_of

BACKEND = factory_of(Clean)
BF16, FP8 = KVCacheDtype.BF16, KVCacheDtype.FP8
IN_TURN = (
    Relation.COLD,
    Relation.EAGER,
    Relation.PADDED,
    Relation.TWICE,
    Relation.RELABELLED,
    Relation.PERMUTED,
    Relation.ALONE,
)


def case(*events: Event, layer: Mapping[str, Any] | None = None, seed: int = 0, **setup: Any) -> Scenario:
    """A scenario on a pool of 3 rows of 5 pages of 4 tokens, with a layer of 2 heads that keeps 8 keys."""
    sizes = {
        "page_size": 4,
        "max_context_len": 20,
        "index_topk": 8,
        "num_steps": 1,
        "num_draft_tokens": 2,
        "pool_size": 3,
    }
    return Scenario(setup=Setup(**{**sizes, **setup}, layer=Layer(**(layer or {}))), seed=seed, events=events)


def lattice(dtype: KVCacheDtype = BF16) -> dict[str, Any]:
    return {"regime": Regime.LATTICE, "kv_cache_dtype": dtype}


def random(dtype: KVCacheDtype = BF16, heads: int = 2) -> dict[str, Any]:
    return {"regime": Regime.RANDOM, "kv_cache_dtype": dtype, "num_heads": heads}


def replay_of_two(*before: Event, seed: int = 0, mode: ForwardMode = DECODE, **setup: Any) -> Scenario:
    """Two requests fill the bucket 2; that of 1 was captured before it."""
    events = (Capture(mode=mode, buckets=(1, 2)), Join(seq_len=9), Join(seq_len=6), *before, Replay(mode=mode))
    return case(*events, **{"layer": random(), "seed": seed, **setup})


WITH_LAYER = case(
    *(Capture(mode=DECODE, buckets=(1,)), Join(seq_len=6), Replay(mode=DECODE)),
    layer=lattice(),
)
