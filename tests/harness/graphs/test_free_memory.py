"""Memory that nobody holds is overwritten between replays, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.graphs.capture import GraphRunner
from nsa_oracle.harness.graphs.free_memory import spoil_storage
from nsa_oracle.harness.graphs.recording import SimulatedCapturedGraph
from nsa_oracle.harness.graphs.simulated import SimulatedGraphRunner
from nsa_oracle.harness.judge import OracleFailure, judge
from tests.support.backends import in_graph
from tests.support.metadata_cases import TWO_REPLAYS, factory_of

CPU = torch.device("cpu")
SENTINEL = 0x5A5A5A5A


class TestSpoil:
    """What a graph made for itself, and nobody holds, need not survive between replays; all else must."""

    def test_scratch(self) -> None:
        x, out = torch.zeros(4), torch.zeros(4)
        seen: list[torch.Tensor] = []

        def body() -> None:
            scratch = x + 1
            out.copy_(scratch)
            seen.append(scratch)

        graph = SimulatedGraphRunner().capture(body)
        scratch = seen.pop()
        graph.replay()
        graph.spoil(SENTINEL)
        assert scratch.tolist() == [1.0] * 4  # held here
        storage = scratch.untyped_storage()
        del scratch
        graph.spoil(SENTINEL)
        memory = torch.empty(0, dtype=torch.int32).set_(storage)
        assert memory.tolist() == [SENTINEL] * 4
        graph.replay()
        assert out.tolist() == [1.0] * 4

    def test_what_existed_before_is_left_alone(self, runner: GraphRunner, device: torch.device) -> None:
        x, total = torch.ones(4, device=device), torch.zeros(4, device=device)
        kept: list[torch.Tensor] = []

        def body() -> None:
            kept.append(x * 3)
            total.add_(kept[-1])

        graph = runner.capture(body)
        graph.replay()
        graph.spoil(SENTINEL)
        assert (x.tolist(), total.tolist(), kept[-1].tolist()) == ([1.0] * 4, [6.0] * 4, [3.0] * 4)
        graph.replay()
        assert total.tolist() == [9.0] * 4

    def test_sizes_that_are_no_whole_words(self) -> None:
        x = torch.zeros(7, dtype=torch.uint8)
        spoil_storage(x.untyped_storage(), 0x01020304)
        assert x.tolist() == [4, 3, 2, 1, 0, 0, 0]

    def test_planted_graph_that_keeps_state_in_its_scratch(self, device: torch.device) -> None:
        judge(TWO_REPLAYS, factory_of(in_graph.PreparesInGraph), device)
        with pytest.raises(OracleFailure) as caught:
            judge(TWO_REPLAYS, factory_of(in_graph.KeepsTheFirstLengths), device)
        finding = caught.value.finding
        assert (finding.kind, finding.field) == (Kind.VALUE, "cache_seqlens_int32")

    def test_nothing_else_finds_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(SimulatedCapturedGraph, "spoil", lambda graph, value: None)
        judge(TWO_REPLAYS, factory_of(in_graph.KeepsTheFirstLengths), CPU)
