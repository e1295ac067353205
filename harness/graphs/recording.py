"""The nodes of a simulated graph, and their replay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from nsa_oracle.harness.graphs.audit import Audit
from nsa_oracle.harness.graphs.callers import definition_of
from nsa_oracle.harness.graphs.free_memory import spoil_storage
from nsa_oracle.harness.graphs.host_values import NodeValues, of_call
from nsa_oracle.harness.graphs.operators import schema_arguments, tensors_in
from nsa_oracle.harness.graphs.storages import FoundStorage, in_words, use_count
from nsa_oracle.harness.watching import noted_as


@dataclass(frozen=True)
class Operation:
    """A recorded operator: its arguments, and for each result the tensor to copy it to (None: written in place)."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[torch.Tensor | None, ...]

    def host_values(self, is_host: Callable[[torch.Tensor], bool]) -> NodeValues:
        names = [argument.name for argument in schema_arguments(self.func)]
        return of_call(str(self.func), names, self.args, self.kwargs, is_host)

    def run(self) -> None:
        results = tree_leaves(self.func(*self.args, **self.kwargs))
        for output, result in zip(self.outputs, results, strict=True):
            if output is not None:
                output.copy_(result)


@dataclass(frozen=True)
class Launch:
    """A recorded Triton launch: an executor with its grid resolved, and its arguments."""

    executor: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def host_values(self, is_host: Callable[[torch.Tensor], bool]) -> NodeValues:
        given = {"grid": tuple(self.executor.grid), **self.kwargs}
        return of_call(f"kernel {self.executor.fn.__name__}", self.executor.arg_names, self.args, given, is_host)

    def run(self) -> None:
        with noted_as(definition_of(self.executor.fn)):
            self.executor(*self.args, **self.kwargs)


class SimulatedCapturedGraph:
    """Recorded operations; keeps every tensor that they use alive."""

    def __init__(
        self,
        nodes: Sequence[Operation | Launch],
        made: Sequence[torch.UntypedStorage],
        found: dict[int, FoundStorage],
        host_scalars: frozenset[int],
    ) -> None:
        self._nodes = tuple(nodes)
        self._found = found
        self._made = {storage._cdata: storage for storage in made}
        self._host_scalars = host_scalars  # storages of the copies that the nodes hold

    def replay(self) -> None:
        with torch.inference_mode():  # in which alone what judged code has made in that mode can be written
            for node in self._nodes:
                node.run()

    def released(self) -> str | None:
        # A storage that no node holds was used on the host alone.
        storages = {key: found.storage for key, found in self._found.items()}
        alone = {storage._cdata for storage in self._held_by_nodes_alone(storages)}
        return in_words(self._found[key] for key in alone)

    def audit(self) -> Audit:
        return Audit()

    def host_values(self) -> Sequence[NodeValues]:
        return [node.host_values(self._is_host_scalar) for node in self._nodes]

    def spoil(self, value: int) -> None:
        for storage in self._held_by_nodes_alone(self._made):
            spoil_storage(storage, value)

    def _is_host_scalar(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._host_scalars

    def _held_by_nodes_alone(self, storages: dict[int, torch.UntypedStorage]) -> Iterator[torch.UntypedStorage]:
        """Yield the storages that only this object (one handle each) and its nodes hold."""
        for key, tensors in self._tensors_of_nodes.items():
            if key in storages and use_count(storages[key]) == 1 + tensors:
                yield storages[key]

    @functools.cached_property
    def _tensors_of_nodes(self) -> dict[int, int]:
        """For each storage that the nodes use, the number of their tensors on it."""
        held: dict[int, set[int]] = {}
        for node in self._nodes:
            for tensor in tensors_in(vars(node)):
                held.setdefault(tensor.untyped_storage()._cdata, set()).add(id(tensor))
        return {key: len(tensors) for key, tensors in held.items()}
