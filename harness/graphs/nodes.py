"""Reads the nodes of a captured CUDA graph: kernels with their parameters, copies, fills, and other nodes.

All calls go through one object, the module ``cuda.bindings.driver``, so that tests can replace it. A call that the
driver refuses and a node of unknown kind are reported as such; nothing is guessed.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

MOST_PARAMETERS = 1024  # of one kernel; CUDA limits their total size to 32,764 bytes
_SUCCESS, _INVALID_VALUE = 0, 1
_MEMORY_HOST, _MEMORY_DEVICE, _MEMORY_ARRAY, _MEMORY_UNIFIED = 1, 2, 3, 4
_KERNEL, _COPY, _FILL, _HOST_FUNCTION, _CHILD_GRAPH = 0, 1, 2, 3, 4
HOST_FUNCTION = "host function"
_OTHER_KINDS = {
    _HOST_FUNCTION: HOST_FUNCTION,
    5: "empty node",
    6: "event wait",
    7: "event record",
    8: "semaphore signal",
    9: "semaphore wait",
    10: "memory allocation",
    11: "memory release",
    12: "batch of memory operations",
    13: "conditional node",
}


_NUMBERS = {
    *("bool", "char", "signed char", "unsigned char", "short", "unsigned short", "int", "unsigned int"),
    *("long", "unsigned long", "long long", "unsigned long long", "float", "double"),
}  # types without padding


class ParameterKind(enum.Enum):
    """What a kernel parameter can be."""

    ADDRESS = "address"
    NUMBER = "number"


class Side(enum.Enum):
    """Where memory is, according to the driver."""

    DEVICE = "device"
    HOST = "host"  # pinned or registered


@dataclass(frozen=True)
class KernelNode:
    """One kernel launch. parameters: the bytes of each, or None if the driver does not report them."""

    kernel: str  # the compiled name: mangled if it is C++
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    parameters: tuple[bytes, ...] | None

    def places_of(self, kind: ParameterKind) -> list[int] | None:
        """Positions of the parameters that can be of a kind. None if they are unknown or do not match the declaration.

        A C++ kernel declares its parameters in the mangled name. Other languages (Triton, C) pass no structures, and
        any of their parameters may be of either kind.
        """
        if self.parameters is None:
            return None
        if not self.kernel.startswith("_Z"):
            return list(range(len(self.parameters)))
        types = declared_types(self.kernel)
        if types is None or len(types) != len(self.parameters):
            return None
        wanted = (lambda name: name.endswith("*")) if kind is ParameterKind.ADDRESS else _NUMBERS.__contains__
        return [place for place, name in enumerate(types) if wanted(name)]


@dataclass(frozen=True)
class Place:
    """One end of a copy. side: None for a CUDA array, or if the driver does not report it."""

    address: int
    side: Side | None


@dataclass(frozen=True)
class CopyNode:
    """A copy of ``size`` bytes in total."""

    source: Place
    target: Place
    size: int


@dataclass(frozen=True)
class FillNode:
    """A fill of ``height`` rows of ``width`` elements with ``value``. element_size: in bytes."""

    address: int
    value: int
    element_size: int
    width: int
    height: int


@dataclass(frozen=True)
class OtherNode:
    """A node of which only its kind matters."""

    what: str


@dataclass(frozen=True)
class UnreadNode:
    """A node that could not be read, and why."""

    what: str
    reason: str


Node = KernelNode | CopyNode | FillNode | OtherNode | UnreadNode


class DriverRefusal(Exception):
    """The driver refused a call, or its bindings lack the function. The message is one clause."""


class GraphReader:
    """Reads graphs and looks up addresses. ``driver``: the module ``cuda.bindings.driver``, or a replacement."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        # Cached by function, as many nodes launch the same one.
        self._names: dict[int, str] = {}
        self._sizes: dict[int, list[int] | None] = {}

    def nodes(self, graph: int) -> list[Node]:
        """The nodes of a raw graph (``torch.cuda.CUDAGraph.raw_cuda_graph()``), with those of child graphs.

        Raises DriverRefusal if the driver does not list the nodes.
        """
        return list(self._nodes(graph))

    def side(self, address: int) -> Side | None:
        """Where the memory at ``address`` is. None if the driver knows no memory there (the value may be a number).

        Raises DriverRefusal if the driver returns another error.
        """
        attribute = self._attribute("CUpointer_attribute").CU_POINTER_ATTRIBUTE_MEMORY_TYPE
        code, *answer = self._raw_call("cuPointerGetAttribute", attribute, address)
        if code == _INVALID_VALUE:
            return None
        if code != _SUCCESS:
            raise DriverRefusal(f"cuPointerGetAttribute returned {code}")
        return {_MEMORY_DEVICE: Side.DEVICE, _MEMORY_HOST: Side.HOST}.get(int(answer[0]))

    def is_managed(self, address: int) -> bool:
        """Whether ``address`` is in managed memory, which belongs to both sides."""
        attribute = self._attribute("CUpointer_attribute").CU_POINTER_ATTRIBUTE_IS_MANAGED
        code, *answer = self._raw_call("cuPointerGetAttribute", attribute, address)
        return code == _SUCCESS and bool(answer[0])

    def _nodes(self, graph: Any) -> Iterator[Node]:
        _, count = self._call("cuGraphGetNodes", graph)
        listed, _ = self._call("cuGraphGetNodes", graph, count) if count else ((), 0)
        for node in listed:
            kind = -1
            try:
                kind = int(self._call("cuGraphNodeGetType", node)[0])
                if kind == _CHILD_GRAPH:
                    yield from self._nodes(self._call("cuGraphChildGraphNodeGetGraph", node)[0])
                else:
                    yield self._node(kind, node)
            except DriverRefusal as refusal:
                yield UnreadNode(_name_of_kind(kind), str(refusal))

    def _node(self, kind: int, node: Any) -> Node:
        if kind == _KERNEL:
            return self._kernel(self._call("cuGraphKernelNodeGetParams", node)[0])
        if kind == _COPY:
            return self._copy(self._call("cuGraphMemcpyNodeGetParams", node)[0])
        if kind == _FILL:
            return self._fill(self._call("cuGraphMemsetNodeGetParams", node)[0])
        if kind in _OTHER_KINDS:
            return OtherNode(_OTHER_KINDS[kind])
        return UnreadNode(_name_of_kind(kind), "unknown kind")

    def _kernel(self, params: Any) -> KernelNode:
        function, prefix = params.func, "cuFunc"
        if not int(function):  # the kernel is in a library that no context has loaded yet
            function, prefix = params.kern, "cuKernel"
        return KernelNode(
            self._kernel_name(function, prefix),
            (int(params.gridDimX), int(params.gridDimY), int(params.gridDimZ)),
            (int(params.blockDimX), int(params.blockDimY), int(params.blockDimZ)),
            int(params.sharedMemBytes),
            self._parameters(function, prefix, int(params.kernelParams or 0)),
        )

    def _kernel_name(self, function: Any, prefix: str) -> str:
        if int(function) not in self._names:
            name = self._call(f"{prefix}GetName", function)[0]
            self._names[int(function)] = name.decode() if isinstance(name, bytes) else str(name)
        return self._names[int(function)]

    def _parameters(self, function: Any, prefix: str, table: int) -> tuple[bytes, ...] | None:
        """The bytes of each parameter. ``table``: address of an array of the parameters' addresses.

        None if the driver does not report the sizes or the addresses.
        """
        if int(function) not in self._sizes:
            self._sizes[int(function)] = self._sizes_of_parameters(function, prefix)
        sizes = self._sizes[int(function)]
        if not sizes:
            return None if sizes is None else ()
        if not table:  # the launch packed its parameters into one buffer
            return None
        addresses = (ctypes.c_void_p * len(sizes)).from_address(table)
        if not all(addresses):
            return None
        return tuple(ctypes.string_at(address, size) for address, size in zip(addresses, sizes, strict=True))

    def _sizes_of_parameters(self, function: Any, prefix: str) -> list[int] | None:
        sizes: list[int] = []
        for number in range(MOST_PARAMETERS):
            code, *answer = self._raw_call(f"{prefix}GetParamInfo", function, number)
            if code == _INVALID_VALUE:  # past the last parameter
                return sizes
            if code != _SUCCESS:
                return None
            sizes.append(int(answer[1]))
        return None

    def _copy(self, params: Any) -> CopyNode:
        size = int(params.WidthInBytes) * max(1, int(params.Height)) * max(1, int(params.Depth))
        return CopyNode(self._place(params, "src"), self._place(params, "dst"), size)

    def _place(self, params: Any, end: str) -> Place:
        kind = int(getattr(params, f"{end}MemoryType") or 0)
        offset = int(getattr(params, f"{end}XInBytes"))
        if kind == _MEMORY_HOST:
            return Place(int(getattr(params, f"{end}Host") or 0) + offset, Side.HOST)
        address = int(getattr(params, f"{end}Device") or 0) + offset
        if kind == _MEMORY_UNIFIED:
            # May be on either side; memory that the driver does not know is ordinary host memory.
            side = self.side(address) or Side.HOST
            return Place(address, None if side is Side.HOST and self.is_managed(address) else side)
        return Place(address, Side.DEVICE if kind == _MEMORY_DEVICE else None)

    def _fill(self, params: Any) -> FillNode:
        numbers = (int(getattr(params, name)) for name in ("dst", "value", "elementSize", "width", "height"))
        return FillNode(*numbers)

    def _attribute(self, name: str) -> Any:
        found = getattr(self._driver, name, None)
        if found is None:
            raise DriverRefusal(f"this version of the driver's bindings has no {name}")
        return found

    def _raw_call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """Returns the result code as an int, then the results. Raises DriverRefusal if the call cannot be made."""
        function = self._attribute(name)
        try:
            code, *answer = function(*arguments)
            return (int(code), *answer)
        except Exception as error:  # versions of the bindings raise different exceptions for their arguments
            raise DriverRefusal(f"{name} raised {type(error).__name__}") from error

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        code, *answer = self._raw_call(name, *arguments)
        if code != _SUCCESS:
            raise DriverRefusal(f"{name} returned {code}")
        return tuple(answer)


def _name_of_kind(kind: int) -> str:
    named = {_KERNEL: "kernel", _COPY: "copy", _FILL: "fill", _CHILD_GRAPH: "child graph", **_OTHER_KINDS}
    return named.get(kind, f"node of kind {kind}")


def readable(kernel: str, most: int = 80) -> str:
    """The demangled name of a kernel, truncated to ``most`` characters."""
    name = _demangled(kernel)
    return name if len(name) <= most else name[: most - 3] + "..."


def declared_types(kernel: str) -> list[str] | None:
    """The types of the parameters in a mangled name; None if the name does not contain them."""
    name = _demangled(kernel)
    if not name.endswith(")"):
        return None
    types, end, depth = [], len(name) - 1, 0
    for place in range(len(name) - 1, -1, -1):
        character = name[place]
        depth += (character in ")>]") - (character in "(<[")
        if depth == 0 or (depth == 1 and character == ","):
            types.append(name[place + 1 : end].strip())
            end = place
        if depth == 0:
            return [] if types == [""] else types[::-1]
    return None


def _demangled(kernel: str) -> str:
    demangle = getattr(torch._C, "_demangle", None)
    return demangle(kernel) if demangle is not None and kernel.startswith("_Z") else kernel
