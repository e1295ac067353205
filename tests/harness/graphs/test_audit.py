"""What is made of the nodes of a CUDA graph: on a stand-in here, on real graphs on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from nsa_oracle.harness.graphs.allocator import Allocator
from nsa_oracle.harness.graphs.audit import Audit, AuditTally, audit
from nsa_oracle.harness.graphs.nodes import GraphReader
from tests.support.stand_in_driver import (
    ARRAY,
    DEVICE,
    DROPPED,
    FOREIGN,
    FREE,
    HELD,
    HOST,
    MANAGED,
    OWN,
    PINNED,
    SEGMENTS,
    UNIFIED,
    UNKNOWN,
    Kind,
    Node,
    StandInDriver,
    number,
)


def audited(
    driver: StandInDriver,
    *nodes: Node,
    segments: Sequence[dict[str, Any]] = SEGMENTS,
    is_held: Callable[[int], bool | None] = lambda address: None,
) -> Audit:
    reader = GraphReader(driver)
    allocator = Allocator(segments, 0) if segments else None
    return audit(reader, reader.nodes(driver.graph(*nodes)), allocator, is_held)


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
        assert found.tally.not_audited == {"kernels whose parameters cannot be read": 1}

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
            "kernels whose parameters cannot be read": 1,
            "node of kind 77: unknown kind": 1,
        }
        assert refused.tally.not_audited == {"cuPointerGetAttribute returned 999": 1}

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
