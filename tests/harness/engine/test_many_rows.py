"""Stages by themselves on many rows, as in a long prefill: each row keeps its result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_oracle.harness.checks.relations import Relation
from nsa_oracle.harness.compiled import tier
from nsa_oracle.harness.engine.isolated import MANY_ROWS
from nsa_oracle.harness.engine.passes import map_tensors
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.scenarios.scenario import Eager, Join, Scenario
from nsa_oracle.optimized.layer import SparseAttention
from nsa_oracle.reference.types import AttentionCaches, AttentionInputs, KVCacheDtype
from tests.support.layer_cases import BACKEND, case, lattice
from tests.support.metadata_cases import DECODE, EXTEND, IDLE

ONE_CALL = case(Join(seq_len=9), Join(seq_len=6), Eager(mode=DECODE), layer=lattice(), seed=1)
MULTIPROCESSORS = 132


class RowsAtMost(SparseAttention):
    """A stage, ``broken``, whose programs are too few for all rows, and take one each."""

    broken = ""

    def __getattribute__(self, name: str) -> Any:
        stage = super().__getattribute__(name)
        if name != type(self).broken:
            return stage

        def computes_the_first(*given: Any) -> Any:
            result = stage(*given)
            for tensor in result if isinstance(result, tuple) else (result,):
                tensor[4 * MULTIPROCESSORS :] = 7
            return result

        return computes_the_first


class CutsShort(SparseAttention):
    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        return super().topk_indices(logits, seqlens_expanded)[:512]


class StoresTheFirst(SparseAttention):
    """A store whose programs are too few for all rows."""

    def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
        super().store_cache(caches, map_tensors(inputs, lambda tensor: tensor[:300]))


def finding_of(layer: Any, scenario: Scenario, device: torch.device) -> Finding:
    with pytest.raises(OracleFailure) as caught:
        judge(scenario, BACKEND, device, layer_factory=layer)
    return caught.value.finding


def test_clean_layer(device: torch.device) -> None:
    """Once in one case of four, by its seed: in the first run, in the first call that has rows."""
    assert (
        Relation.MANY
        not in judge(
            ONE_CALL.model_copy(update={"seed": 2}), BACKEND, device, layer_factory=SparseAttention
        ).layers.relations
    )
    scenario = case(Eager(mode=IDLE), *ONE_CALL.events, Eager(mode=DECODE), layer=lattice(), seed=5)
    assert judge(scenario, BACKEND, device, layer_factory=SparseAttention).layers.relations[Relation.MANY] == 1


@pytest.mark.parametrize(
    ("stage", "field"),
    [
        ("indexer_logits", "logits"),
        ("topk_indices", "topk_indices"),
        ("topk_transform_paged", "indices"),
        ("sparse_mla", "out"),
    ],
)
def test_stage_that_computes_only_so_many_rows(stage: str, field: str, device: torch.device) -> None:
    finding = finding_of(type("Broken", (RowsAtMost,), {"broken": stage}), ONE_CALL, device)
    assert (finding.kind, finding.field, finding.step) == (Kind.RELATION, field, 0)
    assert finding.place is not None
    assert finding.place.startswith(f"row {4 * MULTIPROCESSORS}, element ")
    assert finding.how == f"{Relation.MANY.value}: {MANY_ROWS} rows, of which 2 differ"


def test_ragged_transform_of_a_prefill(device: torch.device) -> None:
    scenario = case(Join(seq_len=9), Eager(mode=EXTEND, extend_lens=(3,)), layer=lattice(), seed=1)
    finding = finding_of(type("Broken", (RowsAtMost,), {"broken": "topk_transform_ragged"}), scenario, device)
    assert (finding.kind, finding.field) == (Kind.RELATION, "topk_ragged")


@pytest.mark.parametrize("padding_slot", [0, -1])
@pytest.mark.parametrize("dtype", KVCacheDtype)
def test_store_that_stores_only_so_many_rows(dtype: KVCacheDtype, padding_slot: int, device: torch.device) -> None:
    scenario = case(*ONE_CALL.events, layer={**lattice(dtype), "padding_slot": padding_slot}, seed=1)
    finding = finding_of(StoresTheFirst, scenario, device)
    assert (finding.kind, finding.field, finding.step) == (Kind.RELATION, "kv_cache", 0)
    assert finding.place is not None
    assert finding.place.startswith("slot ")
    assert finding.how is not None
    assert finding.how.endswith(f"{MANY_ROWS} rows, of which all but the last 2 stand for no token")
    assert judge(scenario, BACKEND, device, layer_factory=SparseAttention).layers.relations[Relation.MANY] == 1


def test_too_few_rows(device: torch.device) -> None:
    finding = finding_of(CutsShort, ONE_CALL, device)
    assert (finding.kind, finding.field) == (Kind.SHAPE, "topk_indices")
    assert (finding.got, finding.expected) == ("[512, 8]", f"[{MANY_ROWS}, 8]")


def test_host_repeats_no_rows_that_take_long(device: torch.device) -> None:
    """64 heads and 2,048 keys are 3 million products a row."""
    if device.type == "cuda":
        pytest.skip("a GPU computes them at once")
    many = {**lattice(), "num_heads": 64}
    scenario = case(Join(seq_len=9), Eager(mode=DECODE), layer=many, index_topk=2048, max_context_len=2300, seed=1)
    assert Relation.MANY not in judge(scenario, BACKEND, device, layer_factory=SparseAttention).layers.relations


def test_host_repeats_no_rows_of_a_kernel_that_is_interpreted(device: torch.device) -> None:
    """Kernels in Gluon are, 601 rows of them for ten seconds."""
    if device.type == "cuda":
        pytest.skip("a GPU computes them at once")
    production = {**lattice(), "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    scenario = case(Join(seq_len=9), Eager(mode=DECODE), layer=production, seed=1)
    before = tier.gluon_programs
    assert Relation.MANY not in judge(scenario, BACKEND, device, layer_factory=SparseAttention).layers.relations
    assert 0 < tier.gluon_programs - before < MANY_ROWS
