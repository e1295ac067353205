"""Host values of a captured graph, node by node, and how those of two captures differ."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_oracle.harness.graphs.allocator import Allocator
from nsa_oracle.harness.graphs.host_values import Difference, NodeValues, differences, of_call, of_nodes
from nsa_oracle.harness.graphs.nodes import GraphReader
from nsa_oracle.harness.graphs.runner import graph_runner
from tests.support.captures import add_kernel
from tests.support.stand_in_driver import DEVICE, FREE, HELD, MEMORY, OWN, SEGMENTS, StandInDriver, number


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
        shown = of_call("op", ["a", "b"], (1, [2.5, None], True), {"dtype": torch.int32}, lambda tensor: False)
        assert shown.values == {
            "a": "1", "b[0]": "2.5", "b[1]": "None", "argument 2": "True", "dtype": "torch.int32",
        }  # fmt: skip

    def test_layout_of_a_tensor_and_nothing_of_its_content(self) -> None:
        def shown(tensor: torch.Tensor) -> str:
            return of_call("op", ["x"], (tensor,), {}, lambda tensor: False).values["x"]

        table = torch.arange(12).view(3, 4)
        assert shown(table) == shown(torch.zeros_like(table))
        assert len({shown(table), shown(table.t()), shown(table[1:]), shown(table[:2]), shown(table.int())}) == 5

    def test_content_of_a_host_scalar(self) -> None:
        def shown(tensor: torch.Tensor) -> str:
            return of_call("op", ["x"], (tensor,), {}, lambda tensor: True).values["x"]

        assert shown(torch.tensor(3)) != shown(torch.tensor(4))
        assert shown(torch.tensor([3])) == shown(torch.tensor([4]))


class TestOfNodes:
    def shown(self, *nodes: Any) -> list[NodeValues]:
        driver = StandInDriver(MEMORY)
        built = [make(driver) for make in nodes]
        reader = GraphReader(driver)
        return of_nodes(reader, reader.nodes(driver.graph(*built)), Allocator(SEGMENTS, 0))

    def test_scalars_and_grid_of_a_kernel(self) -> None:
        (shown,) = self.shown(lambda d: d.kernel("add", number(7, 4), number(-1), grid=(5, 1, 1)))
        assert shown.what == "kernel add"
        assert shown.values == {
            "grid": "(5, 1, 1)", "block": "(128, 1, 1)", "shared memory": "0", "parameter 0": "7", "parameter 1": "-1",
        }  # fmt: skip

    def test_addresses_are_reported_without_where_they_are(self) -> None:
        def parameter(address: int) -> str:
            (shown,) = self.shown(lambda d: d.kernel("add", number(address)))
            return shown.values["parameter 0"]

        assert parameter(HELD) == "0 bytes into a buffer"
        assert parameter(HELD + 64) == "64 bytes into a buffer"  # a slice that begins elsewhere
        assert parameter(OWN) == parameter(FREE + 8) == "an address"

    def test_structures_of_cpp_kernels_are_left_out(self) -> None:
        (shown,) = self.shown(lambda d: d.kernel("_Z3addiN2at5PointE", number(7, 4), number(9)))
        assert shown.values["parameter 0"] == "7"
        assert set(shown.values) == {"grid", "block", "shared memory", "parameter 0"}

    def test_copies_and_fills(self) -> None:
        copy, fill = self.shown(
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
        def scalar(s: Any, m: torch.Tensor) -> None:
            add_kernel[(1,)](s.x, s.x, 1, s.host, BLOCK=8)

        def grid(s: Any, m: torch.Tensor) -> None:
            add_kernel[(s.host,)](s.x, s.x, 1, 8, BLOCK=8)

        assert self.differing(device, scalar, 3, 3) == []
        (difference,) = self.differing(device, scalar, 3, 4)
        assert (difference.first, difference.second) == ("3", "4")
        (difference,) = self.differing(device, grid, 1, 2)
        assert difference.name.startswith("grid")
