"""What is read from the nodes of a CUDA graph: on a stand-in here, on real graphs on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nsa_oracle.harness.graphs.nodes import (
    CopyNode,
    DriverRefusal,
    FillNode,
    GraphReader,
    KernelNode,
    OtherNode,
    Place,
    Side,
    UnreadNode,
    declared_types,
    readable,
)
from tests.support.stand_in_driver import (
    DEVICE,
    HELD,
    HOST,
    MANAGED,
    PINNED,
    SUCCESS,
    UNIFIED,
    UNKNOWN,
    Kind,
    Node,
    StandInDriver,
    number,
)


def nodes_of(driver: StandInDriver, *nodes: Node) -> list[Any]:
    return GraphReader(driver).nodes(driver.graph(*nodes))


class TestReading:
    def test_kernel(self, driver: StandInDriver) -> None:
        (node,) = nodes_of(driver, driver.kernel("add", number(HELD), number(-3, 4), grid=(2, 3, 4)))
        assert node == KernelNode("add", (2, 3, 4), (128, 1, 1), 0, (number(HELD), number(-3, 4)))

    def test_kernel_of_a_library_that_no_context_has_loaded(self, driver: StandInDriver) -> None:
        (node,) = nodes_of(driver, driver.kernel("late", number(5, 4), in_library=True))
        assert (node.kernel, node.parameters) == ("late", (number(5, 4),))

    def test_kernel_without_parameters(self, driver: StandInDriver) -> None:
        (node,) = nodes_of(driver, driver.kernel("nothing"))
        assert node.parameters == ()

    def test_parameters_packed_by_the_launch_are_not_reported(self, driver: StandInDriver) -> None:
        packed = driver.kernel("packed", number(HELD))
        packed.params.kernelParams = None
        assert nodes_of(driver, packed)[0].parameters is None

    def test_copy_and_fill(self, driver: StandInDriver) -> None:
        copy = driver.copy((DEVICE, HELD), (HOST, PINNED), 48)
        assert nodes_of(driver, copy, driver.fill(HELD, 9, 5)) == [
            CopyNode(Place(HELD, Side.DEVICE), Place(PINNED, Side.HOST), 48),
            FillNode(HELD, 9, 4, 5, 1),
        ]

    @pytest.mark.parametrize(
        ("address", "side"),
        [(HELD, Side.DEVICE), (PINNED, Side.HOST), (0x1234, Side.HOST), (MANAGED, None)],
        ids=["device", "pinned", "pageable", "managed"],
    )
    def test_unified_address(self, driver: StandInDriver, address: int, side: Side | None) -> None:
        (node,) = nodes_of(driver, driver.copy((UNIFIED, address), (DEVICE, HELD)))
        assert node.source == Place(address, side)

    def test_child_graphs_are_read_in_place(self, driver: StandInDriver) -> None:
        inner = driver.graph(driver.kernel("inner"), driver.child(driver.graph(driver.kernel("innermost"))))
        nodes = nodes_of(driver, driver.kernel("first"), driver.child(inner), driver.kernel("last"))
        assert [node.kernel for node in nodes] == ["first", "inner", "innermost", "last"]

    def test_kinds_that_only_count(self, driver: StandInDriver) -> None:
        nodes = nodes_of(driver, Node(Kind.HOST_FUNCTION), Node(Kind.EMPTY), Node(Kind.EVENT_WAIT))
        assert nodes == [OtherNode("host function"), OtherNode("empty node"), OtherNode("event wait")]

    def test_kind_that_is_not_known(self, driver: StandInDriver) -> None:
        assert nodes_of(driver, Node(Kind.FROM_THE_FUTURE)) == [UnreadNode("node of kind 77", "unknown kind")]

    @pytest.mark.parametrize(
        ("call", "answer"),
        [
            ("cuGraphKernelNodeGetParams", lambda *arguments: (UNKNOWN, None)),
            ("cuFuncGetName", lambda *arguments: (UNKNOWN, None)),
            ("cuGraphKernelNodeGetParams", lambda: (SUCCESS, None)),  # takes no argument: a TypeError
        ],
    )
    def test_node_that_the_driver_refuses_is_reported_and_the_rest_is_read(
        self, driver: StandInDriver, monkeypatch: pytest.MonkeyPatch, call: str, answer: Callable[..., Any]
    ) -> None:
        monkeypatch.setattr(driver, call, answer)
        refused, fill = nodes_of(driver, driver.kernel("add"), driver.fill(HELD, 1))
        assert isinstance(refused, UnreadNode)
        assert refused.what == "kernel"
        assert call in refused.reason
        assert isinstance(fill, FillNode)

    def test_call_that_the_bindings_lack(self, driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(StandInDriver, "cuGraphMemsetNodeGetParams")
        (node,) = nodes_of(driver, driver.fill(HELD, 1))
        assert node == UnreadNode("fill", "this version of the driver's bindings has no cuGraphMemsetNodeGetParams")

    def test_graph_that_cannot_be_listed(self, driver: StandInDriver) -> None:
        with pytest.raises(DriverRefusal, match="cuGraphGetNodes returned 1"):
            GraphReader(driver).nodes(12345)

    def test_sides(self, driver: StandInDriver) -> None:
        reader = GraphReader(driver)
        assert [reader.side(address) for address in (HELD, PINNED, 0x1234, 0)] == [Side.DEVICE, Side.HOST, None, None]

    def test_side_that_the_driver_refuses(self, driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(driver, "cuPointerGetAttribute", lambda *arguments: (UNKNOWN, None))
        with pytest.raises(DriverRefusal, match="cuPointerGetAttribute returned 999"):
            GraphReader(driver).side(HELD)

    @pytest.mark.parametrize(
        ("kernel", "types"),
        [
            ("_Z6kernelPKfPiS1_lm", ["float const*", "int*", "int*", "long", "unsigned long"]),
            ("_Z6kernelv", []),
            ("_Z6kernelSt5arrayIPcLm2EEi", ["std::array<char*, 2ul>", "int"]),
            ("_Z6kernelPFviEPv", ["void (*)(int)", "void*"]),
            ("_Z6kernelIiEvT_N2at5PointE", ["int", "at::Point"]),
            ("_Zoo", None),
            ("add_kernel", None),
        ],
    )
    def test_types_that_a_mangled_name_declares(self, kernel: str, types: list[str] | None) -> None:
        assert declared_types(kernel) == types

    def test_readable_names(self) -> None:
        assert readable("add_kernel") == "add_kernel"
        assert readable("_ZN2at6native3addEi", 12) == "at::nativ..."
        assert len(readable("x" * 500)) == 80
