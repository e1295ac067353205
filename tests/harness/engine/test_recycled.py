"""Objects that are handed out again: what knows a batch by its ``id`` is wrong, what still has it is not."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from nsa_oracle.harness.engine.recycled import Recycled
from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Finish, Join, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Drive, Mirror
from nsa_oracle.reference.layer import SparseAttention as ReferenceLayer
from nsa_oracle.reference.types import (
    AttentionCaches,
    AttentionInputs,
    AttentionOutputs,
    ForwardMode,
    Metadata,
    SpecInfo,
)
from tests.support.backends import identity
from tests.support.layer_cases import BACKEND, lattice
from tests.support.layer_cases import case as layer_case
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND_V2, EXTEND, case, factory_of

# All of one size. The lengths of padding, with which graphs are captured, are in none of them.
EAGERLY = (Join(seq_len=5), Eager(mode=DECODE), Finish(request=0), Join(seq_len=9), Eager(mode=DECODE))
REPLAYS = (
    Capture(mode=DECODE, buckets=(1,)), Join(seq_len=5), Replay(mode=DECODE), Finish(request=0), Join(seq_len=9),
    Replay(mode=DECODE),
)  # fmt: skip
DRAFTS = (
    Join(seq_len=5), Accept(accept_lengths=(1,)), Eager(mode=DRAFT_EXTEND_V2), Accept(accept_lengths=(2,)),
    Eager(mode=DRAFT_EXTEND_V2),
)  # fmt: skip
WRONG = [
    (identity.ByBatchId, EAGERLY),
    (identity.ByBatchId, REPLAYS),
    (identity.ByLengthsId, EAGERLY),
    (identity.ByLengthsId, REPLAYS),
    (identity.ByLengthsObject, EAGERLY),
    (identity.ByMirrorId, EAGERLY),
    (identity.ByMirrorId, REPLAYS),
    (identity.ByVersion, EAGERLY),
    (identity.ByVersion, REPLAYS),
    (identity.BySpecInfoId, DRAFTS),
]


@pytest.mark.parametrize(("backend", "events"), WRONG)
def test_a_batch_that_is_known_by_an_identity_is_wrong(backend: Any, events: Any, device: torch.device) -> None:
    with pytest.raises(OracleFailure) as caught:
        judge(case(*events), factory_of(backend), device)
    assert caught.value.finding.kind in (Kind.VALUE, Kind.HOST_SCALAR, Kind.SHAPE)
    assert caught.value.event == len(events) - 1


def several_times(drive: Drive = Drive.MULTI_STEP) -> Scenario:
    """Preparations that are repeated, of two buckets and eagerly, and other content after each."""
    rounds = [
        event
        for mode in (DECODE, DRAFT_EXTEND_V2)
        for event in (
            Replay(mode=mode, preparations=3, times=2),
            Eager(mode=mode, preparations=2),
            Accept(accept_lengths=(1,)),
            Eager(mode=EXTEND, extend_lens=(2,)),
            Replay(mode=mode, bucket=2, mirror=Mirror.ABSENT),
            Eager(mode=ForwardMode.IDLE),
            Eager(mode=mode),
        )
    ]
    graphs = (Capture(mode=DECODE, buckets=(1, 2)), Capture(mode=DRAFT_EXTEND_V2, buckets=(1, 2)))
    return case(*graphs, Join(seq_len=5), *rounds, drive=drive, neighbour_context_len=12)


@pytest.mark.parametrize("backend", [identity.RemembersBatches, identity.RemembersWeakly])
def test_a_batch_that_the_backend_still_has_is_right(backend: Any, device: torch.device) -> None:
    assert judge(several_times(), factory_of(backend), device).eager_calls


class ByInputsId(ReferenceLayer):
    """Runs each object of inputs once."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self._known: dict[int, AttentionOutputs] = {}

    def forward(self, inputs: AttentionInputs, caches: AttentionCaches, metadata: Metadata) -> AttentionOutputs:
        if id(inputs) not in self._known:
            self._known[id(inputs)] = super().forward(inputs, caches, metadata)
        return self._known[id(inputs)]


def test_a_layer_that_knows_its_inputs_by_an_identity_is_wrong(device: torch.device) -> None:
    events = Join(seq_len=5), Eager(mode=DECODE), Eager(mode=DECODE)
    with pytest.raises(OracleFailure) as caught:
        judge(layer_case(*events, layer=lattice()), BACKEND, device, layer_factory=ByInputsId)
    assert caught.value.event == 2


def test_an_instance_is_handed_out_again_only_if_nobody_has_it() -> None:
    recycled, lengths = Recycled(), torch.tensor([1])
    first = recycled.instance(SpecInfo(lengths))
    second = recycled.instance(SpecInfo(lengths + 1))
    assert first is not second
    assert first.accept_length is lengths
    address = id(second)
    del second
    weak = weakref.ref(recycled.instance(SpecInfo(lengths + 2)))
    assert id(weak()) == address
    assert id(recycled.instance(SpecInfo(lengths + 3))) not in (address, id(first))
    assert weak() is not None
    assert weak().accept_length.tolist() == [3]  # type: ignore[union-attr]


def test_what_an_instance_alone_refers_to_is_handed_out_again_too() -> None:
    batches, tensors = Recycled(), Recycled()
    address = id(batches.instance(SpecInfo(tensors.tensor(torch.tensor([1, 2])))).accept_length)
    assert id(tensors.tensor(torch.tensor([3]))) != address
    batches.release()
    again = tensors.tensor(torch.tensor([4, 5, 6]))
    assert id(again) == address
    assert again.tolist() == [4, 5, 6]


def test_a_view_keeps_the_memory_of_a_tensor_that_is_handed_out_again() -> None:
    tensors = Recycled()
    view = tensors.tensor(torch.tensor([1, 2]))[:1]
    with torch.inference_mode():
        assert tensors.tensor(torch.tensor([3, 4])).tolist() == [3, 4]
    assert tensors.tensor(torch.tensor([5, 6])).tolist() == [5, 6]
    assert view.tolist() == [1]
