"""When a difference of two captures is a host value frozen into a graph."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from nsa_oracle.harness.checks.frozen import frozen_value, other_batch
from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.engine.observations import Conditions
from nsa_oracle.harness.judge import judge
from nsa_oracle.harness.scenarios.batch import PAD_SEQ_LEN
from nsa_oracle.harness.scenarios.scenario import Capture, Join, Replay, Scenario
from nsa_oracle.harness.subjects.default import optimized_layer
from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.multi_step import copy_into
from nsa_oracle.reference.types import Metadata
from tests.support.backends import clean, in_graph, seams
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND_V2, case, factory_of, one_replay


def test_other_batch_shares_as_little_as_possible_with_padding() -> None:
    setup = case(max_context_len=16, num_draft_tokens=2, pool_size=3).setup
    batch = other_batch(setup, DECODE, 3)
    assert batch.seq_lens == (14, 13, 12)
    assert batch.seq_lens_cpu == (13, 12, 11)
    assert batch.pool_rows == (2, 1, 0)
    assert batch.accept_lengths == (1, 0, 2)


@pytest.mark.parametrize("bs", [1, 7])
@pytest.mark.parametrize("longest", [1, 2, 5])
def test_other_batch_is_legal(bs: int, longest: int) -> None:
    setup = case(max_context_len=longest + 2, num_draft_tokens=2, pool_size=2).setup
    batch = other_batch(setup, DRAFT_EXTEND_V2, bs)
    assert batch.size == bs
    assert all(1 <= length <= longest for length in batch.seq_lens)
    assert all(0 <= row < setup.pool_size for row in batch.pool_rows)
    assert all(0 <= accept <= setup.num_draft_tokens for accept in batch.accept_lengths)


class TestFrozenValue:
    """The control: what two captures of one batch do not share is no frozen value."""

    def found(self, backend: Any, scenario: Scenario, device: torch.device) -> tuple[Any, Any]:
        def build(scenario: Scenario) -> Engine:
            return Engine(scenario, factory_of(backend), optimized_layer, device, Conditions(0x5A5A5A5A, 0xFF))

        engine = build(scenario)
        for event in scenario.events:
            list(engine.run(event))
        return frozen_value(engine, scenario, build), engine.audit

    def test_frozen_value(self, device: torch.device) -> None:
        finding, audit = self.found(in_graph.FreezesLimit, one_replay(DECODE), device)
        assert finding is not None
        assert audit.compared == 1

    def test_nothing_frozen(self, device: torch.device) -> None:
        finding, audit = self.found(in_graph.PreparesInGraph, one_replay(DECODE), device)
        assert finding is None
        assert audit.compared == 1
        assert not audit.not_audited

    def test_no_graph(self, device: torch.device) -> None:
        finding, audit = self.found(clean.Clean, case(Join(seq_len=3), Replay(mode=DECODE)), device)
        assert finding is None
        assert audit.compared == 0

    def test_value_that_differs_from_capture_to_capture(self, device: torch.device) -> None:
        finding, audit = self.found(CountsCaptures, one_replay(DECODE), device)
        assert finding is None
        assert audit.compared == 1

    def test_graph_that_differs_from_capture_to_capture(self, device: torch.device) -> None:
        finding, audit = self.found(GrowsWithCaptures, one_replay(DECODE), device)
        assert finding is None
        assert sum(audit.not_audited.values()) == 1

    def test_backend_that_takes_padding_alone_at_capture(self, device: torch.device) -> None:
        finding, audit = self.found(CapturesPaddingOnly, one_replay(DECODE), device)
        assert finding is None
        assert audit.compared == 0
        assert audit.not_audited == {"graphs that cannot be captured once more (ValueError)": 1}

    def test_the_seed_chooses_the_graph(self, device: torch.device) -> None:
        events = (Capture(mode=DECODE, buckets=(1, 2)),)
        places = []
        for seed in range(2):
            scenario = case(*events).model_copy(update={"seed": seed})
            finding, _ = self.found(in_graph.FreezesLimit, scenario, device)
            places.append(finding.place)
        assert "bucket 1" in places[0]
        assert "bucket 2" in places[1]

    def test_judge_compares_once_a_case(self, device: torch.device) -> None:
        assert judge(one_replay(DECODE), factory_of(clean.Clean), device).audit.compared == 1


_COUNT = itertools.count()


class _Counts(seams.InGraph):
    """Adds 0, by way of a number that grows with every capture, as a seed or a handle might."""

    def init_forward_metadata_in_graph(self, forward_batch: Any, bs: int) -> None:
        super().init_forward_metadata_in_graph(forward_batch, bs)
        self.forward_metadata.cache_seqlens_int32.clamp_(max=1000 + next(_COUNT))


class CountsCaptures(seams.InGraphBackend):
    step = _Counts


class _Grows(seams.InGraph):
    def init_forward_metadata_in_graph(self, forward_batch: Any, bs: int) -> None:
        super().init_forward_metadata_in_graph(forward_batch, bs)
        for _ in range(next(_COUNT) % 50):
            self.forward_metadata.cache_seqlens_int32.add_(0)


class GrowsWithCaptures(seams.InGraphBackend):
    step = _Grows


class _PaddingOnly(seams.Step):
    def alter(self, metadata: Metadata, batch: Any) -> None:
        if batch.seq_lens_cpu is None and bool((batch.seq_lens != PAD_SEQ_LEN).any()):
            raise ValueError("captured on padding alone")

    def refresh(self, buffers: Metadata, batch: Any) -> None:
        copy_into(buffers, compute_metadata(self.config, self.req_to_token, batch, 0, True))


class CapturesPaddingOnly(seams.OfSteps):
    step = _PaddingOnly
