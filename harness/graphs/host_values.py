"""The host values that a capture passed to a graph. Two captures of one bucket must have the same.

Addresses are left out, as every capture has its own. The offset of a tensor in its storage is included, because a
slice that begins at a host value is frozen like a length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten_with_path

from nsa_oracle.harness.graphs.allocator import Allocator
from nsa_oracle.harness.graphs.nodes import (
    CopyNode,
    DriverRefusal,
    FillNode,
    GraphReader,
    KernelNode,
    Node,
    ParameterKind,
    readable,
)

STRUCTURE = ("what is launched", "number of nodes")  # names of differences after which nodes can no longer be paired
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class NodeValues:
    """One node of a graph: what it does, and its host values by name, as text."""

    what: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class Difference:
    """A host value that differs between two captures."""

    node: int
    what: str
    name: str
    first: str
    second: str


def differences(first: Sequence[NodeValues], second: Sequence[NodeValues]) -> list[Difference]:
    """Differences node by node, up to the first node that does something else: later nodes cannot be paired."""
    found: list[Difference] = []
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one.what != other.what:
            return [*found, Difference(number, one.what, STRUCTURE[0], one.what, other.what)]
        for name in one.values.keys() | other.values.keys():
            values = one.values.get(name, "nothing"), other.values.get(name, "nothing")
            if values[0] != values[1]:
                found.append(Difference(number, one.what, name, *values))
    if len(first) != len(second):
        found.append(Difference(len(first), "the graph", STRUCTURE[1], str(len(first)), str(len(second))))
    return sorted(found, key=lambda difference: (difference.node, difference.name))


def of_call(
    what: str,
    names: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    is_host: Callable[[torch.Tensor], bool],
) -> NodeValues:
    """The host values of a call: plain arguments, layouts of tensors, contents of host scalars, which a launch copies.

    names: of the positional arguments; a position beyond them is named ``argument i``.
    """
    named = {names[i] if i < len(names) else f"argument {i}": value for i, value in enumerate(args)} | dict(kwargs)
    values = {}
    for name, value in named.items():
        for path, leaf in tree_flatten_with_path(value)[0]:
            values[name + "".join(map(str, path))] = _describe(leaf, is_host)
    return NodeValues(what, values)


def _describe(leaf: Any, is_host: Callable[[torch.Tensor], bool]) -> str:
    if isinstance(leaf, torch.Tensor):
        if is_host(leaf):
            return f"host tensor {leaf.tolist()}" if leaf.dim() == 0 else "host tensor"
        return f"{leaf.dtype} of shape {list(leaf.shape)}, strides {list(leaf.stride())}, from {leaf.storage_offset()}"
    if isinstance(leaf, torch.device):
        return leaf.type
    return repr(leaf) if leaf is None or isinstance(leaf, _PLAIN) else type(leaf).__name__


def of_nodes(reader: GraphReader, nodes: Iterable[Node], allocator: Allocator | None) -> list[NodeValues]:
    """The host values of a CUDA graph's nodes, without structures of C++ kernels: padding would look like a value."""
    reported = []
    for node in nodes:
        match node:
            case KernelNode():
                shape = {"grid": str(node.grid), "block": str(node.block), "shared memory": str(node.shared_bytes)}
                values = {
                    f"parameter {place}": _of_parameter(reader, node.parameters[place], allocator)
                    for place in node.places_of(ParameterKind.NUMBER) or ()
                    if node.parameters is not None
                }
                reported.append(NodeValues(f"kernel {readable(node.kernel)}", shape | values))
            case CopyNode():
                reported.append(NodeValues("copy", {"bytes": str(node.size)}))
            case FillNode():
                numbers = ("value", "element_size", "width", "height")
                reported.append(NodeValues("fill", {name: str(getattr(node, name)) for name in numbers}))
            case _:
                reported.append(NodeValues(node.what, {}))
    return reported


def _of_parameter(reader: GraphReader, parameter: bytes, allocator: Allocator | None) -> str:
    number = int.from_bytes(parameter, "little", signed=True)
    if len(parameter) > 8:
        return f"{len(parameter)} bytes"
    if len(parameter) == 8:
        try:
            side = reader.side(number % (1 << 64))
        except DriverRefusal:
            return "unknown"
        if side is not None:
            block = None if allocator is None else allocator.block_at(number)
            return "an address" if block is None or not block.held else f"{number - block.address} bytes into a buffer"
    return str(number)
