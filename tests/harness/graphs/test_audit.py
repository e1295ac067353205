"""What is read from the nodes of a CUDA graph and what is made of it: on a stand-in here, on real graphs on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from stand_in_driver import ARRAY, DEVICE, HOST, SUCCESS, UNIFIED, UNKNOWN, Kind, Node, StandInDriver, number

from nsa_oracle.harness.graphs.allocator import Allocator, Reference
from nsa_oracle.harness.graphs.audit import Audit, AuditTally, audit
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

BASE = 0x7F0000000000  # of the made-up device memory
PINNED = 0x7E0000000000
MANAGED = 0x7D0000000000
MEMORY = (
    (BASE, BASE + 0x10000, DEVICE, False),
    (PINNED, PINNED + 0x1000, HOST, False),
    (MANAGED, MANAGED + 0x1000, HOST, True),
)
HELD, DROPPED, FREE, OWN = (BASE + 0x1000 * i for i in range(4))  # blocks of the allocator, 0x1000 bytes each
FOREIGN = BASE + 0x8000  # known to the driver, of no torch allocator


def segment(address: int, state: str, pool: tuple[int, int] = (0, 0), device: int = 0) -> dict[str, Any]:
    block = {"address": address, "size": 0x1000, "state": state}
    return {"device": device, "address": address, "stream": 7, "segment_pool_id": pool, "blocks": [block]}


SEGMENTS = [
    segment(HELD, "active_allocated"),
    segment(DROPPED, "active_awaiting_free"),
    segment(FREE, "inactive"),
    segment(OWN, "inactive", pool=(0, 5)),
]


@pytest.fixture
def driver() -> StandInDriver:
    return StandInDriver(MEMORY)


def nodes_of(driver: StandInDriver, *nodes: Node) -> list[Any]:
    return GraphReader(driver).nodes(driver.graph(*nodes))


def audited(
    driver: StandInDriver,
    *nodes: Node,
    segments: Sequence[dict[str, Any]] = SEGMENTS,
    is_held: Callable[[int], bool | None] = lambda address: None,
) -> Audit:
    reader = GraphReader(driver)
    allocator = Allocator(segments, 0) if segments else None
    return audit(reader, reader.nodes(driver.graph(*nodes)), allocator, is_held)


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

    def test_parameters_packed_by_the_launch_are_not_told(self, driver: StandInDriver) -> None:
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
        assert nodes_of(driver, Node(Kind.FROM_THE_FUTURE)) == [
            UnreadNode("node of kind 77", "not a kind that is known")
        ]

    @pytest.mark.parametrize(
        ("call", "answer"),
        [
            ("cuGraphKernelNodeGetParams", lambda *arguments: (UNKNOWN, None)),
            ("cuFuncGetName", lambda *arguments: (UNKNOWN, None)),
            ("cuGraphKernelNodeGetParams", lambda: (SUCCESS, None)),  # takes no argument: a TypeError
        ],
    )
    def test_node_that_the_driver_refuses_is_told_and_the_rest_is_read(
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
        with pytest.raises(DriverRefusal, match="cuGraphGetNodes said 1"):
            GraphReader(driver).nodes(12345)

    def test_sides(self, driver: StandInDriver) -> None:
        reader = GraphReader(driver)
        assert [reader.side(address) for address in (HELD, PINNED, 0x1234, 0)] == [Side.DEVICE, Side.HOST, None, None]

    def test_side_that_the_driver_refuses(self, driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(driver, "cuPointerGetAttribute", lambda *arguments: (UNKNOWN, None))
        with pytest.raises(DriverRefusal, match="cuPointerGetAttribute said 999"):
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


class TestAllocator:
    def test_block_of_an_address(self) -> None:
        allocator = Allocator(SEGMENTS, 0)
        held = allocator.block_at(HELD + 0xFFF)
        assert held is not None
        assert (held.address, held.held, held.free) == (HELD, True, False)
        for address, held_free in ((DROPPED, (False, False)), (FREE, (False, True))):
            block = allocator.block_at(address)
            assert block is not None
            assert (block.held, block.free) == held_free
        assert allocator.block_at(HELD - 1) is None
        assert allocator.block_at(FOREIGN) is None

    def test_other_devices_are_left_out(self) -> None:
        assert not Allocator([segment(HELD, "inactive", device=1)], 0).blocks

    def test_blocks_without_an_address_follow_one_another(self) -> None:
        blocks = [{"size": 0x100, "state": "inactive"}, {"size": 0x300, "state": "active_allocated"}]
        allocator = Allocator([{**segment(HELD, ""), "blocks": blocks}], 0)
        assert [(block.address, block.size) for block in allocator.blocks] == [(HELD, 0x100), (HELD + 0x100, 0x300)]

    def test_dangling(self) -> None:
        allocator = Allocator(SEGMENTS, 0)
        references = [Reference(name, address) for name, address in (("a", HELD), ("b", OWN), ("c", FOREIGN))]
        assert allocator.dangling(references) is None
        hit = allocator.dangling([*references, Reference("d", FREE + 8), Reference("e", DROPPED)])
        assert hit is not None
        assert hit[0].part == "d"

    def test_end_of_a_buffer_is_no_use_of_what_lies_behind_it(self) -> None:
        allocator = Allocator(SEGMENTS, 0)
        begin, end = Reference("begin", HELD + 8, node=3), Reference("end", DROPPED, node=3)
        assert allocator.dangling([begin, end]) is None
        for others in ([end], [Reference("begin", HELD, node=2), end], [begin, Reference("end", DROPPED + 8, node=3)]):
            assert allocator.dangling(others) is not None
        in_part = [{**segment(HELD, ""), "blocks": [{**SEGMENTS[0]["blocks"][0], "requested_size": 0xFFF}]}]
        assert Allocator([*in_part, *SEGMENTS[1:]], 0).dangling([begin, end]) is not None
        # What lies behind memory that nobody holds is no end of anything.
        assert allocator.dangling([Reference("begin", FREE - 8, node=3), Reference("end", FREE, node=3)]) is not None


class TestAudit:
    def test_clean_graph(self, driver: StandInDriver) -> None:
        found = audited(
            driver,
            driver.kernel("add", number(HELD), number(OWN), number(FOREIGN), number(0), number(48), number(7, 4)),
            driver.copy((DEVICE, HELD), (DEVICE, OWN)),
            driver.fill(OWN, 0),
            Node(Kind.EMPTY),
        )
        assert found.fault is None
        tally = found.tally
        assert (tally.graphs, tally.kernels, tally.addresses) == (1, 1, 3)
        assert tally.other_nodes == {"copy": 1, "fill": 1, "empty node": 1}
        assert not tally.not_audited

    @pytest.mark.parametrize("address", [FREE, FREE + 0xFF8, DROPPED], ids=["free", "inside", "still used by a stream"])
    def test_kernel_that_uses_dropped_memory(self, driver: StandInDriver, address: int) -> None:
        found = audited(driver, driver.kernel("add", number(HELD)), driver.kernel("mul", number(4), number(address)))
        assert found.fault is not None
        assert found.fault.part == "kernel mul, parameter 1 (node 1)"
        assert "nobody holds any more" in found.fault.reason

    def test_copy_and_fill_that_use_dropped_memory(self, driver: StandInDriver) -> None:
        for node in (driver.copy((DEVICE, HELD), (DEVICE, FREE)), driver.fill(FREE, 0)):
            found = audited(driver, node)
            assert found.fault is not None
            assert "nobody holds any more" in found.fault.reason

    def test_number_that_is_no_address(self, driver: StandInDriver) -> None:
        """Strides, seeds and lengths; an address in four bytes; an address of host memory that the driver ignores."""
        numbers = [number(value) for value in (0, 1, 656, 1 << 31, 1 << 40, -1, 0x7FFE12345678)]
        found = audited(driver, driver.kernel("add", *numbers, number(FREE & 0xFFFFFFFF, 4)))
        assert found.fault is None
        assert found.tally.addresses == 0

    def test_structures_are_not_looked_into(self, driver: StandInDriver) -> None:
        """What lies in a structure's padding may be the address of something long gone."""
        structures = driver.kernel("_Z3addN2at5ArrayENS_5PointE", number(FREE) + number(FREE), number(FREE))
        found = audited(driver, structures)
        assert found.fault is None
        assert (found.tally.kernels, found.tally.addresses) == (1, 0)

    def test_pointers_of_cpp_kernels(self, driver: StandInDriver) -> None:
        """What is declared a pointer is one; an integer or a structure that looks like one is none."""
        name = "_Z3addPKfN2at5PointEl"  # add(float const*, at::Point, long)
        clean = audited(driver, driver.kernel(name, number(HELD), number(FREE), number(FREE)))
        assert clean.fault is None
        assert clean.tally.addresses == 1
        found = audited(driver, driver.kernel(name, number(FREE), number(HELD), number(HELD)))
        assert found.fault is not None
        assert found.fault.part == "kernel add(float const*, at::Point, long), parameter 0 (node 0)"

    def test_cpp_kernel_that_does_not_have_what_it_declares(self, driver: StandInDriver) -> None:
        found = audited(driver, driver.kernel("_Z3addPKf", number(FREE), number(FREE)))
        assert found.fault is None
        assert found.tally.not_audited == {"kernels whose parameters are not told": 1}

    @pytest.mark.parametrize(("kind", "address"), [(HOST, 0x1234), (UNIFIED, PINNED), (UNIFIED, 0x1234)])
    def test_copy_from_host_memory(self, driver: StandInDriver, kind: int, address: int) -> None:
        found = audited(driver, driver.copy((kind, address), (DEVICE, HELD)), is_held=lambda address: True)
        assert found.fault is not None
        assert "copies from host memory" in found.fault.reason

    def test_copy_to_host_memory_is_no_fault(self, driver: StandInDriver) -> None:
        assert audited(driver, driver.copy((DEVICE, HELD), (HOST, PINNED))).fault is None

    def test_copy_between_arrays_is_not_judged(self, driver: StandInDriver) -> None:
        found = audited(driver, driver.copy((ARRAY, 0), (DEVICE, HELD)))
        assert found.fault is None
        assert sum(found.tally.not_audited.values()) == 1

    def test_host_function(self, driver: StandInDriver) -> None:
        found = audited(driver, driver.kernel("add"), Node(Kind.HOST_FUNCTION))
        assert found.fault is not None
        assert found.fault.part == "host function (node 1)"

    @pytest.mark.parametrize(
        ("address", "held", "faulty"),
        [(PINNED, False, True), (PINNED, True, False), (PINNED, None, False), (MANAGED, False, False)],
        ids=["dropped", "held", "unknown", "managed"],
    )
    def test_pinned_memory(self, driver: StandInDriver, address: int, held: bool | None, faulty: bool) -> None:
        found = audited(driver, driver.kernel("add", number(address)), is_held=lambda _: held)
        assert (found.fault is not None) is faulty
        unknown = held is None or address == MANAGED
        assert sum(found.tally.not_audited.values()) == int(unknown)

    def test_without_an_allocator_addresses_are_counted_and_not_judged(self, driver: StandInDriver) -> None:
        found = audited(driver, driver.kernel("add", number(FREE)), segments=[])
        assert found.fault is None
        assert sum(found.tally.not_audited.values()) == 1

    def test_what_cannot_be_read_is_no_fault(self, driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
        packed = driver.kernel("packed", number(FREE))
        packed.params.kernelParams = 0
        found = audited(driver, packed, Node(Kind.FROM_THE_FUTURE))
        monkeypatch.setattr(driver, "cuPointerGetAttribute", lambda *arguments: (UNKNOWN, None))
        refused = audited(driver, driver.kernel("add", number(FREE)))
        assert found.fault is None
        assert refused.fault is None
        assert found.tally.not_audited == {
            "kernels whose parameters are not told": 1,
            "node of kind 77: not a kind that is known": 1,
        }
        assert refused.tally.not_audited == {"cuPointerGetAttribute said 999": 1}

    def test_tallies_add_up(self, driver: StandInDriver) -> None:
        total = AuditTally(compared=2)
        for _ in range(2):
            total.add(audited(driver, driver.kernel("add", number(HELD)), driver.fill(HELD, 0)).tally)
        assert (total.graphs, total.kernels, total.addresses, total.compared) == (2, 2, 2, 2)
        assert total.other_nodes == {"fill": 2}


def test_a_simulated_graph_has_no_nodes_to_audit() -> None:
    from nsa_oracle.harness.graphs.simulated import SimulatedGraphRunner

    x = torch.zeros(3)
    assert SimulatedGraphRunner().capture(lambda: (x.add_(1), None)[1]).audit() == Audit()
