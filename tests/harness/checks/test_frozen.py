"""What two captures must agree on, what they need not, and when a difference is a host value frozen into a graph."""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace
from typing import Any

import planted
import pytest
import torch
from stand_in_driver import DEVICE, StandInDriver, number
from test_detection import DECODE, DRAFT_EXTEND_V2, case, factory_of, one_replay
from test_graph_audit import FREE, HELD, MEMORY, OWN, SEGMENTS

from nsa_oracle.harness.checks.frozen import frozen_value, other_batch
from nsa_oracle.harness.graphs.allocator import Allocator
from nsa_oracle.harness.graphs.host_values import Difference, NodeValues, differences, of_call, of_nodes
from nsa_oracle.harness.graphs.nodes import GraphReader
from nsa_oracle.harness.graphs.runner import graph_runner
from nsa_oracle.harness.judge import judge
from nsa_oracle.harness.scenarios.scenario import Capture, Join, Replay, Scenario
from nsa_oracle.harness.scenarios.world import PAD_SEQ_LEN
from nsa_oracle.harness.subjects.default import optimized_layer
from nsa_oracle.reference.types import Metadata


def node(what: str = "add", **values: str) -> NodeValues:
    return NodeValues(what, values)


class TestDifferences:
    def test_none(self) -> None:
        nodes = [node(n="3"), node("mul", n="4")]
        assert differences(nodes, list(nodes)) == []

    def test_values(self) -> None:
        found = differences([node(n="3", k="1"), node(n="5")], [node(n="4", k="1"), node(n="6")])
        assert found == [Difference(0, "add", "n", "3", "4"), Difference(1, "add", "n", "5", "6")]

    def test_value_that_only_one_has(self) -> None:
        assert differences([node(n="3")], [node()]) == [Difference(0, "add", "n", "3", "nothing")]

    def test_another_launch_ends_the_comparison(self) -> None:
        found = differences([node(n="3"), node("mul"), node(n="5")], [node(n="3"), node("sub"), node(n="6")])
        assert found == [Difference(1, "mul", "what is launched", "mul", "sub")]

    def test_more_nodes(self) -> None:
        assert differences([node()], [node(), node()]) == [Difference(1, "the graph", "number of nodes", "1", "2")]


class TestOfCall:
    def test_plain_arguments_by_name(self) -> None:
        told = of_call("op", ["a", "b"], (1, [2.5, None], True), {"dtype": torch.int32}, lambda tensor: False)
        assert told.values == {
            "a": "1", "b[0]": "2.5", "b[1]": "None", "argument 2": "True", "dtype": "torch.int32",
        }  # fmt: skip

    def test_layout_of_a_tensor_and_nothing_of_its_content(self) -> None:
        def told(tensor: torch.Tensor) -> str:
            return of_call("op", ["x"], (tensor,), {}, lambda tensor: False).values["x"]

        table = torch.arange(12).view(3, 4)
        assert told(table) == told(torch.zeros_like(table))
        assert len({told(table), told(table.t()), told(table[1:]), told(table[:2]), told(table.int())}) == 5

    def test_content_of_a_host_scalar(self) -> None:
        def told(tensor: torch.Tensor) -> str:
            return of_call("op", ["x"], (tensor,), {}, lambda tensor: True).values["x"]

        assert told(torch.tensor(3)) != told(torch.tensor(4))
        assert told(torch.tensor([3])) == told(torch.tensor([4]))


class TestOfNodes:
    def told(self, *nodes: Any) -> list[NodeValues]:
        driver = StandInDriver(MEMORY)
        built = [make(driver) for make in nodes]
        reader = GraphReader(driver)
        return of_nodes(reader, reader.nodes(driver.graph(*built)), Allocator(SEGMENTS, 0))

    def test_scalars_and_grid_of_a_kernel(self) -> None:
        (told,) = self.told(lambda d: d.kernel("add", number(7, 4), number(-1), grid=(5, 1, 1)))
        assert told.what == "kernel add"
        assert told.values == {
            "grid": "(5, 1, 1)", "block": "(128, 1, 1)", "shared memory": "0", "parameter 0": "7", "parameter 1": "-1",
        }  # fmt: skip

    def test_addresses_are_told_without_where_they_are(self) -> None:
        def parameter(address: int) -> str:
            (told,) = self.told(lambda d: d.kernel("add", number(address)))
            return told.values["parameter 0"]

        assert parameter(HELD) == "0 bytes into a buffer"
        assert parameter(HELD + 64) == "64 bytes into a buffer"  # a slice that begins elsewhere
        assert parameter(OWN) == parameter(FREE + 8) == "an address"

    def test_structures_of_cpp_kernels_are_left_out(self) -> None:
        (told,) = self.told(lambda d: d.kernel("_Z3addiN2at5PointE", number(7, 4), number(9)))
        assert told.values["parameter 0"] == "7"
        assert set(told.values) == {"grid", "block", "shared memory", "parameter 0"}

    def test_copies_and_fills(self) -> None:
        copy, fill = self.told(
            lambda d: d.copy((DEVICE, HELD), (DEVICE, OWN), 48), lambda d: d.fill(HELD, value=3, width=5)
        )
        assert copy == node("copy", bytes="48")
        assert fill.values["value"] == "3"
        assert fill.values["width"] == "5"


class TestOfGraphs:
    """On whatever device there is: the operators and launches of real captures."""

    def differing(self, device: torch.device, body: Any, *hosts: Any) -> list[Difference]:
        graphs = []
        for host in hosts:
            state = SimpleNamespace(x=torch.zeros(8, device=device), host=host)
            mirror = torch.tensor([host])
            graphs.append(graph_runner(device).capture(lambda s=state, m=mirror: body(s, m), host_tensors=[mirror]))
        return differences(*(graph.host_values() for graph in graphs))

    def test_same_host_values(self, device: torch.device) -> None:
        assert self.differing(device, lambda s, m: s.x[: s.host].add_(s.host).mul_(2), 3, 3) == []

    @pytest.mark.parametrize(
        "body",
        [
            lambda s, m: s.x.add_(s.host),
            lambda s, m: s.x[: s.host].zero_(),
            lambda s, m: s.x[s.host :][:1].zero_(),
            lambda s, m: s.x.fill_(m.max().item()),
            lambda s, m: s.x.add_(m[0]),
            lambda s, m: s.x.copy_(torch.full((8,), s.host, device=s.x.device)),
            lambda s, m: [s.x.add_(1) for _ in range(s.host)],
        ],
        ids=["scalar", "end", "begin", "mirror", "host scalar", "factory", "count"],
    )
    def test_another_host_value(self, device: torch.device, body: Any) -> None:
        assert self.differing(device, body, 3, 4)

    def test_host_work_is_no_part_of_the_graph(self, device: torch.device) -> None:
        assert self.differing(device, lambda s, m: (torch.arange(s.host).sum(), m + s.host, s.x.add_(1)), 3, 4) == []

    @pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
        reason="launches on CPU tensors need the interpreter",
    )
    def test_launches(self, device: torch.device) -> None:
        from test_graph import add_kernel

        def scalar(s: Any, m: torch.Tensor) -> None:
            add_kernel[(1,)](s.x, s.x, 1, s.host, BLOCK=8)

        def grid(s: Any, m: torch.Tensor) -> None:
            add_kernel[(s.host,)](s.x, s.x, 1, 8, BLOCK=8)

        assert self.differing(device, scalar, 3, 3) == []
        (difference,) = self.differing(device, scalar, 3, 4)
        assert (difference.first, difference.second) == ("3", "4")
        (difference,) = self.differing(device, grid, 1, 2)
        assert difference.name.startswith("grid")


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
        from nsa_oracle.harness.engine.engine import Engine

        def build(scenario: Scenario) -> Engine:
            return Engine(scenario, factory_of(backend), optimized_layer, device, 0x5A5A5A5A, 0xFF)

        engine = build(scenario)
        for event in scenario.events:
            list(engine.run(event))
        return frozen_value(engine, scenario, build), engine.audit

    def test_frozen_value(self, device: torch.device) -> None:
        finding, audit = self.found(planted.FreezesLimit, one_replay(DECODE), device)
        assert finding is not None
        assert audit.compared == 1

    def test_nothing_frozen(self, device: torch.device) -> None:
        finding, audit = self.found(planted.PreparesInGraph, one_replay(DECODE), device)
        assert finding is None
        assert audit.compared == 1
        assert not audit.not_audited

    def test_no_graph(self, device: torch.device) -> None:
        finding, audit = self.found(planted.Clean, case(Join(seq_len=3), Replay(mode=DECODE)), device)
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
            finding, _ = self.found(planted.FreezesLimit, scenario, device)
            places.append(finding.place)
        assert "bucket 1" in places[0]
        assert "bucket 2" in places[1]

    def test_judge_compares_once_a_case(self, device: torch.device) -> None:
        assert judge(one_replay(DECODE), factory_of(planted.Clean), device).audit.compared == 1


_COUNT = itertools.count()


class _Counts(planted._InGraph):
    """Adds 0, by way of a number that grows with every capture, as a seed or a handle might."""

    def init_forward_metadata_in_graph(self, forward_batch: Any, bs: int) -> None:
        super().init_forward_metadata_in_graph(forward_batch, bs)
        self.forward_metadata.cache_seqlens_int32.clamp_(max=1000 + next(_COUNT))


class CountsCaptures(planted._InGraphBackend):
    step = _Counts


class _Grows(planted._InGraph):
    def init_forward_metadata_in_graph(self, forward_batch: Any, bs: int) -> None:
        super().init_forward_metadata_in_graph(forward_batch, bs)
        for _ in range(next(_COUNT) % 50):
            self.forward_metadata.cache_seqlens_int32.add_(0)


class GrowsWithCaptures(planted._InGraphBackend):
    step = _Grows


class _PaddingOnly(planted.Step):
    def alter(self, metadata: Metadata, batch: Any) -> None:
        if batch.seq_lens_cpu is None and bool((batch.seq_lens != PAD_SEQ_LEN).any()):
            raise ValueError("captured on padding alone")

    def refresh(self, buffers: Metadata, batch: Any) -> None:
        planted.copy_into(buffers, planted.compute_metadata(self.config, self.req_to_token, batch, 0, True))


class CapturesPaddingOnly(planted.OfSteps):
    step = _PaddingOnly
