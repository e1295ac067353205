"""docs/contract.md names what the code has: modes, fields, inputs, outputs, regimes, relations, cache layouts."""

from __future__ import annotations

import dataclasses
import re

import torch

from nsa_oracle.harness.checks.relations import Relation
from nsa_oracle.harness.fields import HOST_SCALARS
from nsa_oracle.harness.scenarios.setup import Regime
from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.types import (
    AttentionConfig,
    AttentionInputs,
    AttentionOutputs,
    BackendConfig,
    ForwardBatch,
    ForwardMode,
    Metadata,
)
from tests.support.pages import PAGES, first_column, section

CONTRACT = PAGES["docs/contract.md"]


def test_contract_names_every_mode_and_field() -> None:
    contract, _, layer = CONTRACT.partition("\n## The layer\n")
    for part in (contract, layer):
        assert sorted(re.findall(r"^\| ([A-Z_0-9]+) \|", part, re.MULTILINE)) == sorted(m.value for m in ForwardMode)
    tables = set(re.findall(r"^\| `(\w+)` \|", contract, re.MULTILINE))
    scalars = set(HOST_SCALARS)
    assert tables == {field.name for field in dataclasses.fields(Metadata)} - scalars
    assert all(f"`{name}`" in contract for name in scalars)


def test_contract_names_inputs_outputs_regimes_and_relations_of_the_layer() -> None:
    tensors = [field.name for record in (AttentionInputs, AttentionOutputs) for field in dataclasses.fields(record)]
    assert first_column(section(CONTRACT, "The layer")) == [f"`{name}`" for name in tensors]
    regimes = first_column(section(CONTRACT, "When numbers are right"))
    assert regimes == [regime.value for regime in Regime]
    relations = first_column(section(CONTRACT, "What must not change a bit"))
    assert relations == [relation.value for relation in Relation]


def test_contract_lays_caches_out_as_the_reference_does() -> None:
    config = AttentionConfig()
    said = section(CONTRACT, "Caches")
    assert f"[slots, 1, {config.qk_head_dim}] bf16" in said
    assert f"[slots, 1, {config.kv_token_bytes}] uint8" in said
    assert f"[pages, {config.index_page_bytes(64)}] uint8" in said
    scales, rope = config.kv_lora_rank, config.kv_token_bytes - 2 * config.qk_rope_head_dim
    keys = 64 * config.index_head_dim
    assert first_column(said) == [
        *(f"0 to {scales - 1}", f"{scales} to {rope - 1}", f"{rope} to {config.kv_token_bytes - 1}"),
        *(f"0 to {keys - 1}", f"{keys} to {config.index_page_bytes(64) - 1}"),
    ]


def test_prefill_example_of_the_contract() -> None:
    config = BackendConfig(1, 16, 4, 1, 1)
    batch = ForwardBatch(
        ForwardMode.EXTEND,
        2,
        torch.arange(2),
        torch.tensor([10, 4]),
        extend_seq_lens=torch.tensor([3, 2]),
        extend_prefix_lens=torch.tensor([7, 2]),
    )
    metadata = compute_metadata(config, torch.zeros(2, 16, dtype=torch.int32), batch, 0, in_graph=False)
    lengths = ", ".join(map(str, metadata.seqlens_expanded.tolist()))
    assert metadata.indexer_k_start_end is not None
    starts, ends = (tensor.tolist() for tensor in metadata.indexer_k_start_end)
    ranges = ", ".join(f"{start}..{end}" for start, end in zip(starts, ends, strict=True))
    said = " ".join(CONTRACT.split())
    assert f"`seqlens_expanded` {lengths} and, as ranges of the concatenated KV, {ranges}." in said
