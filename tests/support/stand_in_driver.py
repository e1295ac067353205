"""A stand-in for ``cuda.bindings.driver``: graphs of made-up nodes in made-up memory, answered for as by the driver."""

from __future__ import annotations

import ctypes
import enum
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

SUCCESS, INVALID_VALUE, UNKNOWN = 0, 1, 999
HOST, DEVICE, ARRAY, UNIFIED = 1, 2, 3, 4
MEMORY_TYPE, IS_MANAGED = 2, 8  # what is asked about an address


class Kind(enum.IntEnum):
    KERNEL, COPY, FILL, HOST_FUNCTION, CHILD_GRAPH, EMPTY, EVENT_WAIT = range(7)
    FROM_THE_FUTURE = 77


class Node:
    """A node as the stand-in keeps it. Anything may stand for a handle."""

    def __init__(self, kind: Kind, params: Any = None) -> None:
        self.kind = kind
        self.params = params


class Function(int):
    """A handle, as the bindings have them: an int with something behind it."""

    name: str
    sizes: tuple[int, ...]


class StandInDriver:
    """The calls of ``harness/graphs/nodes.py``. ``memory``: (begin, end, type, managed) of what the driver knows."""

    CUpointer_attribute = SimpleNamespace(
        CU_POINTER_ATTRIBUTE_MEMORY_TYPE=MEMORY_TYPE, CU_POINTER_ATTRIBUTE_IS_MANAGED=IS_MANAGED
    )

    def __init__(self, memory: Sequence[tuple[int, int, int, bool]] = ()) -> None:
        self.memory = list(memory)
        self.graphs: dict[int, list[Node]] = {}
        self._handles = itertools.count(1)
        self._kept: list[Any] = []  # what the nodes' parameters point to

    # What tests build.

    def graph(self, *nodes: Node) -> int:
        handle = next(self._handles)
        self.graphs[handle] = list(nodes)
        return handle

    def kernel(
        self, name: str, *parameters: bytes, grid: tuple[int, int, int] = (1, 1, 1), in_library: bool = False
    ) -> Node:
        function = Function(next(self._handles))
        function.name, function.sizes = name, tuple(map(len, parameters))
        held = [ctypes.create_string_buffer(parameter, len(parameter)) for parameter in parameters]
        table = (ctypes.c_void_p * max(1, len(held)))(*map(ctypes.addressof, held))
        self._kept += [*held, table]
        func, kern = (Function(0), function) if in_library else (function, Function(0))
        blocks = {"blockDimX": 128, "blockDimY": 1, "blockDimZ": 1, "sharedMemBytes": 0}
        grids = {f"gridDim{axis}": size for axis, size in zip("XYZ", grid, strict=True)}
        address = ctypes.addressof(table)
        return Node(Kind.KERNEL, SimpleNamespace(func=func, kern=kern, kernelParams=address, **grids, **blocks))

    def copy(self, source: tuple[int, int], target: tuple[int, int], size: int = 64) -> Node:
        """``source`` and ``target``: (memory type, address)."""
        ends: dict[str, int] = {}
        for end, (kind, address) in (("src", source), ("dst", target)):
            ends |= {f"{end}MemoryType": kind, f"{end}XInBytes": 0}
            ends |= {f"{end}Host": address * (kind == HOST), f"{end}Device": address * (kind != HOST)}
        return Node(Kind.COPY, SimpleNamespace(WidthInBytes=size, Height=1, Depth=1, **ends))

    def fill(self, address: int, value: int, width: int = 16) -> Node:
        return Node(Kind.FILL, SimpleNamespace(dst=address, value=value, elementSize=4, width=width, height=1))

    def child(self, graph: int) -> Node:
        return Node(Kind.CHILD_GRAPH, graph)

    # What the reader calls.

    def cuGraphGetNodes(self, graph: int, count: int = 0) -> tuple[Any, ...]:  # noqa: N802
        if graph not in self.graphs:
            return INVALID_VALUE, None, None
        nodes = self.graphs[graph]
        return SUCCESS, nodes[:count], len(nodes)

    def cuGraphNodeGetType(self, node: Node) -> tuple[Any, ...]:  # noqa: N802
        return SUCCESS, node.kind

    def cuGraphKernelNodeGetParams(self, node: Node) -> tuple[Any, ...]:  # noqa: N802
        return SUCCESS, node.params

    def cuGraphMemcpyNodeGetParams(self, node: Node) -> tuple[Any, ...]:  # noqa: N802
        return SUCCESS, node.params

    def cuGraphMemsetNodeGetParams(self, node: Node) -> tuple[Any, ...]:  # noqa: N802
        return SUCCESS, node.params

    def cuGraphChildGraphNodeGetGraph(self, node: Node) -> tuple[Any, ...]:  # noqa: N802
        return SUCCESS, node.params

    def cuFuncGetName(self, function: Function) -> tuple[Any, ...]:  # noqa: N802
        return SUCCESS, function.name.encode()

    def cuFuncGetParamInfo(self, function: Function, index: int) -> tuple[Any, ...]:  # noqa: N802
        if index >= len(function.sizes):
            return INVALID_VALUE, None, None
        return SUCCESS, sum(function.sizes[:index]), function.sizes[index]

    cuKernelGetName, cuKernelGetParamInfo = cuFuncGetName, cuFuncGetParamInfo  # noqa: N815

    def cuPointerGetAttribute(self, attribute: int, address: int) -> tuple[Any, ...]:  # noqa: N802
        for begin, end, kind, managed in self.memory:
            if begin <= address < end:
                return SUCCESS, kind if attribute == MEMORY_TYPE else managed
        return INVALID_VALUE, None


def number(value: int, size: int = 8) -> bytes:
    """A parameter as a launch passes it."""
    return value.to_bytes(size, "little", signed=value < 0)


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
