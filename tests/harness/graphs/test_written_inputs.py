"""Writes to an input that leave its content as it is are findings, with operator and line; harmless calls are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_oracle.harness.engine.observations import Feed
from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.graphs.written_inputs import WrittenInputs
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Join, Replay
from nsa_oracle.harness.scenarios.setup import Inputs
from nsa_oracle.reference.layer import SparseAttention as ReferenceLayer
from nsa_oracle.reference.types import AttentionCaches, AttentionInputs, AttentionOutputs, Metadata
from tests.support.backends import writes
from tests.support.layer_cases import BACKEND, lattice
from tests.support.layer_cases import case as layer_case
from tests.support.metadata_cases import DECODE, case, factory_of

CASE = case(
    Capture(mode=DECODE, buckets=(2,)), Join(seq_len=3), Join(seq_len=6), Replay(mode=DECODE), Eager(mode=DECODE)
)
LAYER_CASE = layer_case(Join(seq_len=6), Eager(mode=DECODE), layer=lattice())
EVENTS = {"built": None, "capture": 0, "graph": 0, "replay": 3, "eager": 4}


@pytest.mark.parametrize("where", EVENTS)
@pytest.mark.parametrize("touch", writes.WRITES, ids=lambda touch: touch.__name__)
def test_a_write_of_the_same_content_is_a_finding(touch: writes.Touch, where: str, device: torch.device) -> None:
    if where == "graph" and device.type != "cpu":
        pytest.skip("a real capture is not watched")
    with pytest.raises(OracleFailure) as caught:
        judge(CASE, factory_of(writes.touching(touch, where)), device)
    finding, (name, operator) = caught.value.finding, writes.WRITES[touch]
    if where == "built":
        name, operator = "req_to_token", "add_"
    assert (finding.kind, finding.field, caught.value.event) == (Kind.INPUT, name, EVENTS[where])
    assert finding.got == f"a write by {operator} that leaves its content as it is"
    assert finding.expected == "no write"
    assert "backends/writes.py:" in finding.place


@pytest.mark.parametrize("where", ["eager", "replay"])
def test_a_write_to_the_mirror_is_a_finding(where: str, device: torch.device) -> None:
    with pytest.raises(OracleFailure, match=r"seq_lens_cpu .* got a write by clamp_ "):
        judge(CASE, factory_of(writes.touching(writes.writes_the_mirror, where)), device)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("where", ["capture", "graph", "replay", "eager"])
@pytest.mark.parametrize("touch", writes.HARMLESS, ids=lambda touch: touch.__name__)
def test_what_writes_no_cell_of_an_input_passes(
    touch: writes.Touch, where: str, strided: bool, device: torch.device
) -> None:
    scenario = CASE.model_copy(update={"setup": CASE.setup.model_copy(update={"inputs": Inputs(strided=strided)})})
    judge(scenario, factory_of(writes.touching(touch, where)), device)


def test_a_changed_content_is_told_with_the_line_that_changes_it(device: torch.device) -> None:
    def increments(batch: writes.ForwardBatch, pool: torch.Tensor) -> None:
        batch.seq_lens.add_(1)

    with pytest.raises(OracleFailure) as caught:
        judge(CASE, factory_of(writes.touching(increments, "eager")), device)
    finding = caught.value.finding
    assert (finding.kind, finding.field, finding.got) == (Kind.INPUT, "seq_lens", "changed content")
    assert "test_written_inputs.py" in finding.place


class AddsNothing(ReferenceLayer):
    """A stage writes to an input what that holds already."""

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        seqlens_expanded.clamp_(min=0)
        return super().topk_indices(logits, seqlens_expanded)


class StoresNothingInItsKey(ReferenceLayer):
    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        inputs.index_weights.copy_(inputs.index_weights.clone())
        return super().forward(inputs, caches, metadata)


class ReadsItsInputs(ReferenceLayer):
    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        inputs.q[:0].zero_()
        inputs.k.copy_(inputs.k)
        inputs.index_weights.clone().add_(1)
        return super().forward(inputs, caches, metadata)


@pytest.mark.parametrize(
    ("layer", "name", "operator", "feed"),
    [
        (AddsNothing, "seqlens_expanded", "clamp_", Feed.ISOLATED),
        (StoresNothingInItsKey, "index_weights", "copy_", Feed.CHAIN),
    ],
)
def test_a_layer_that_writes_the_same_content_is_found(
    layer: Any, name: str, operator: str, feed: Feed, device: torch.device
) -> None:
    with pytest.raises(OracleFailure) as caught:
        judge(LAYER_CASE, BACKEND, device, layer_factory=layer)
    finding = caught.value.finding
    assert (finding.kind, finding.field, finding.how) == (Kind.INPUT, name, feed.value)
    assert finding.got == f"a write by {operator} that leaves its content as it is"
    assert "test_written_inputs.py" in finding.place


def test_a_layer_that_reads_its_inputs_passes(device: torch.device) -> None:
    judge(LAYER_CASE, BACKEND, device, layer_factory=ReadsItsInputs)


def test_a_record_of_a_stream_and_a_sparse_tensor_are_no_writes() -> None:
    given = torch.tensor([1, 2])
    written = WrittenInputs(lambda: [("given", given)])
    with written.watching():
        torch.zeros(2, 2).to_sparse().zero_()
        given.data = given.data
    assert written.first is None
    with written.watching():
        torch._foreach_add_([given], 0)
    assert written.first is not None
    assert written.first[:2] == ("given", "_foreach_add_")
