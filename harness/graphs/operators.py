"""Classification of torch's operators for the simulated graph: synchronising, writing, allocating, reshaping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

SYNC_FUNCTIONS = {
    getattr(torch.Tensor, name)
    for name in (
        *("item", "tolist", "numpy", "cpu", "is_nonzero", "__array__", "__repr__", "__format__", "__contains__"),
        *("__bool__", "__int__", "__float__", "__complex__", "__index__"),
    )
} | {torch.is_nonzero, torch.equal, torch.Tensor.equal, torch.allclose, torch.Tensor.allclose}

SYNC_OPERATORS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.allclose,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.unique_dim_consecutive,
    aten.bincount,
}

# These read a value to validate it if the tensor is on a CPU, but not if it is on a GPU.
CHECKS_ON_CPU_ONLY = {
    torch.nn.functional.one_hot,
    torch.quantile,
    torch.Tensor.quantile,
    torch.nanquantile,
    torch.Tensor.nanquantile,
}

FROM_HOST_DATA = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer}

EMPTY_FACTORIES = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.empty_permuted,
    aten.new_empty,
    aten.new_empty_strided,
}
LIKE_FACTORIES = EMPTY_FACTORIES | {
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.rand_like,
    aten.randn_like,
    aten.randint_like,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
}
CHANGES_SHAPE_ONLY = {aten.resize_, aten.resize_as_, aten.set_}
MASK_INDEXING = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._unsafe_index_put}
NEEDS_DEVICE_OPERANDS = MASK_INDEXING | {aten.copy_, aten.copy}


CPU_KEYS = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CompositeExplicitAutograd)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Returns the tensors in a tree of arguments, also those inside Triton's descriptors and reinterpreted pointers."""
    found = []
    for leaf in tree_leaves(tree):
        tensor = leaf if isinstance(leaf, torch.Tensor) else getattr(leaf, "base", None)
        if isinstance(tensor, torch.Tensor):
            found.append(tensor)
    return found


def names_host(device: Any) -> bool | None:
    """Whether a `device=` argument names the host (True) or the device (False); None if the argument is None."""
    if device is None:
        return None
    return isinstance(device, str) and device.startswith("cpu")


def schema_arguments(func: Any) -> Sequence[Any]:
    arguments: Sequence[Any] = func._schema.arguments
    return arguments


def written_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Returns the tensors that the operator writes according to its schema."""
    written: list[torch.Tensor] = []
    for position, argument in enumerate(schema_arguments(func)):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written.extend(tensors_in(value))
    return written


def has_mask(indices: Sequence[torch.Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
