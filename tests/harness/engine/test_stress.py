"""Late inputs, spoiled memory, and bands around what a backend is given."""

from __future__ import annotations

import planted
import pytest
import torch
from test_detection import DECODE, case, factory_of, one_replay

from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.engine.stress import Delivery
from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.graphs.capture import GraphRunner
from nsa_oracle.harness.graphs.free_memory import spoil_storage
from nsa_oracle.harness.graphs.recording import SimulatedCapturedGraph
from nsa_oracle.harness.graphs.runner import graph_runner
from nsa_oracle.harness.graphs.simulated import SimulatedGraphRunner
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.memory.poison import BandedInput
from nsa_oracle.harness.scenarios.scenario import Capture, Inputs, Join, Replay
from nsa_oracle.harness.subjects.default import optimized_layer

CPU = torch.device("cpu")
SENTINEL = 0x5A5A5A5A


@pytest.fixture
def runner(device: torch.device) -> GraphRunner:
    return graph_runner(device)


class TestDelivery:
    def test_arrives_at_once_unless_late(self, device: torch.device) -> None:
        target = torch.zeros(3, dtype=torch.int32, device=device)
        Delivery(device, late=False).send(target, torch.tensor([1, 2, 3], dtype=torch.int32))
        assert target.tolist() == [1, 2, 3]

    def test_late_arrives_with_the_delivery(self, device: torch.device) -> None:
        if device.type != "cuda":
            pytest.skip("a CPU has no streams, so nothing is late there")
        target, delivery = torch.zeros(3, dtype=torch.int32, device=device), Delivery(device, late=True)
        content = torch.tensor([1, 2, 3], dtype=torch.int32)
        delivery.send(target, content)
        content.fill_(7)
        assert target.tolist() == [0, 0, 0]
        delivery.send(target, content)
        delivery.deliver()
        assert target.tolist() == [7, 7, 7]


class TestBandedInput:
    def test_poison_on_either_side(self) -> None:
        banded = BandedInput((3, 70), torch.int32, SENTINEL, CPU)
        assert banded.tensor.shape == (3, 70)
        before = banded.tensor.storage_offset()
        assert before >= 70
        assert banded.memory[:before].eq(SENTINEL).all()
        behind = banded.memory[before + banded.tensor.numel() :]
        assert behind.eq(SENTINEL).all()
        assert len(behind) >= 70
        assert banded.tensor.data_ptr() % 64 == banded.memory.data_ptr() % 64

    @pytest.mark.parametrize("cell", [-1, 0, 5, 6])
    def test_a_write_anywhere_is_found(self, cell: int) -> None:
        banded = BandedInput((2, 3), torch.int64, SENTINEL, CPU)
        banded.content.fill_(4)
        banded.memory.copy_(banded.expected)
        assert not banded.is_modified()
        banded.memory[banded.tensor.storage_offset() + cell] += 1
        assert banded.is_modified()


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
        judge(two_replays, factory_of(planted.PreparesInGraph), device)
        with pytest.raises(OracleFailure) as caught:
            judge(two_replays, factory_of(planted.KeepsTheFirstLengths), device)
        finding = caught.value.finding
        assert (finding.kind, finding.field) == (Kind.VALUE, "cache_seqlens_int32")

    def test_nothing_else_finds_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(SimulatedCapturedGraph, "spoil", lambda graph, value: None)
        judge(two_replays, factory_of(planted.KeepsTheFirstLengths), CPU)


two_replays = case(Capture(mode=DECODE, buckets=(1,)), Join(seq_len=3), Replay(mode=DECODE, times=2))


class TestReadsBeyond:
    """Reading past an input gets poison: the judge sees it in whatever is made of it."""

    @pytest.mark.parametrize("strided", [False, True])
    def test_planted_reads(self, device: torch.device, strided: bool) -> None:
        scenario = one_replay(DECODE, inputs=Inputs(strided=strided))
        judge(scenario, factory_of(planted.Clean), device)
        for backend in (planted.ReadsBehindSeqLens, planted.ReadsBehindThePool):
            with pytest.raises(OracleFailure) as caught:
                judge(scenario, factory_of(backend), device)
            assert caught.value.finding.kind is Kind.VALUE


def test_stress_leaves_inputs_as_sent(device: torch.device) -> None:
    scenario = two_replays
    engine = Engine(scenario, factory_of(planted.Clean), optimized_layer, device, SENTINEL, 0xFF, stress=True)
    for event in scenario.events:
        list(engine.run(event))
        assert engine.modified_input() is None
