"""Audits a captured CUDA graph: is all memory that its nodes read and write still allocated?

``graphs.storages`` follows the torch operators of a body while it runs. Work that is launched without torch, such as a
raw kernel or a copy out of pinned memory, shows in the graph's nodes alone.

A parameter counts as an address only if it has exactly eight bytes and the driver knows memory there: no length or
stride comes near the addresses of a GPU. In a C++ kernel it must also be declared a pointer. Structures are skipped,
since their padding may contain the address of memory that was freed long ago. An address is dangling only if it lies in
a block of torch's allocator that is not held, in the pool that serves every allocation. Memory of other allocators, of
a graph's own pool and of private pools is taken to be held, because its owner cannot be determined. Whatever cannot be
read is counted and not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nsa_oracle.harness.graphs.allocator import Allocator, Block, Reference, in_free_block
from nsa_oracle.harness.graphs.nodes import (
    HOST_FUNCTION,
    CopyNode,
    DriverRefusal,
    FillNode,
    GraphReader,
    KernelNode,
    Node,
    OtherNode,
    ParameterKind,
    Side,
    UnreadNode,
    readable,
)

ADDRESS_BYTES = 8


@dataclass
class AuditTally:
    """Counts of what was audited in captured graphs, and of what was not audited, by reason.

    compared: graphs that were captured once more, with other host values, to find frozen values.
    """

    graphs: int = 0
    kernels: int = 0
    addresses: int = 0
    compared: int = 0
    other_nodes: dict[str, int] = field(default_factory=dict)
    not_audited: dict[str, int] = field(default_factory=dict)

    def saw(self, kind: str, count: int = 1) -> None:
        self.other_nodes[kind] = self.other_nodes.get(kind, 0) + count

    def missed(self, reason: str, count: int = 1) -> None:
        if count:
            self.not_audited[reason] = self.not_audited.get(reason, 0) + count

    def add(self, other: AuditTally) -> None:
        self.graphs += other.graphs
        self.kernels += other.kernels
        self.addresses += other.addresses
        self.compared += other.compared
        for kind, count in other.other_nodes.items():
            self.saw(kind, count)
        for reason, count in other.not_audited.items():
            self.missed(reason, count)


@dataclass(frozen=True)
class Fault:
    """What a graph must not contain. part: of the graph, such as a kernel and its parameter. reason: one clause."""

    part: str
    reason: str


@dataclass
class Audit:
    """The audit of one captured graph. references: to device memory, which its owners could free later."""

    tally: AuditTally = field(default_factory=AuditTally)
    fault: Fault | None = None
    references: list[Reference] = field(default_factory=list)


HostMemory = Callable[[int], bool | None]
"""Whether anything but the graph still holds the pinned memory at an address; None if that is unknown."""


def audit(reader: GraphReader, nodes: Sequence[Node], allocator: Allocator | None, is_held: HostMemory) -> Audit:
    """Audit every node. ``allocator``: a snapshot taken after the capture, before any other allocation."""
    found = Audit()
    found.tally.graphs = 1
    for number, node in enumerate(nodes):
        fault = _audit_node(reader, node, number, is_held, found)
        found.fault = found.fault or fault
    if allocator is None:
        found.tally.missed("addresses: memory does not come from torch's own allocator", len(found.references))
    elif found.fault is None and (hit := allocator.dangling(found.references)) is not None:
        found.fault = dangling_fault(*hit)
    return found


def dangling_fault(reference: Reference, block: Block) -> Fault:
    """The fault of a reference to a free ``block``."""
    where = in_free_block(reference, block)
    return Fault(reference.part, f"uses memory that nobody holds any more ({where}): a later allocation may get it")


def _audit_node(reader: GraphReader, node: Node, number: int, is_held: HostMemory, found: Audit) -> Fault | None:
    match node:
        case KernelNode():
            found.tally.kernels += 1
            return _audit_kernel(reader, node, number, is_held, found)
        case CopyNode():
            found.tally.saw("copy")
            part = f"copy of {node.size} bytes (node {number})"
            if node.source.side is Side.HOST:
                return Fault(part, "copies from host memory, which may be gone or changed when the graph is replayed")
            ends = (node.source, node.target)
            found.references += [Reference(part, place.address, number) for place in ends if place.side is Side.DEVICE]
            found.tally.missed("ends of copies that are not plain memory", sum(end.side is None for end in ends))
        case FillNode():
            found.tally.saw("fill")
            part = f"fill of {node.width * node.height} elements (node {number})"
            found.references.append(Reference(part, node.address, number))
        case OtherNode():
            found.tally.saw(node.what)
            if node.what == HOST_FUNCTION:
                return Fault(f"{HOST_FUNCTION} (node {number})", "runs on the host in the middle of a replay")
        case UnreadNode():
            found.tally.missed(f"{node.what}: {node.reason}")
    return None


def _audit_kernel(
    reader: GraphReader, node: KernelNode, number: int, is_held: HostMemory, found: Audit
) -> Fault | None:
    missed = found.tally.missed
    places = node.places_of(ParameterKind.ADDRESS)
    if node.parameters is None or places is None:
        missed("kernels whose parameters cannot be read")
        return None
    fault = None
    for place in places:
        parameter = node.parameters[place]
        if len(parameter) != ADDRESS_BYTES:
            continue
        address = int.from_bytes(parameter, "little")
        try:
            side = reader.side(address)
            managed = side is Side.HOST and reader.is_managed(address)
        except DriverRefusal as refusal:
            missed(str(refusal))
            continue
        if side is None:
            continue  # a number, or memory that a kernel cannot reach
        found.tally.addresses += 1
        part = f"kernel {readable(node.kernel)}, parameter {place} (node {number})"
        if side is Side.DEVICE:
            found.references.append(Reference(part, address, number))
        elif managed or (held := is_held(address)) is None:
            missed("pinned or managed memory that torch did not see")
        elif not held:
            fault = fault or Fault(part, "reads pinned host memory that nobody holds any more")
    return fault
