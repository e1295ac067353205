"""Copies of metadata and layer outputs at the end of each captured graph, which show what the graph itself read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nsa_oracle.harness import fields
from nsa_oracle.harness.engine.observations import LayerStep, Modified, StepObservation, copied, dense_copy
from nsa_oracle.harness.graphs.capture import CapturedGraph
from nsa_oracle.harness.memory.bits import NAN_BYTE, as_bytes
from nsa_oracle.harness.memory.poison import fill_dead_cells
from nsa_oracle.harness.subjects.result_checks import described
from nsa_oracle.reference.types import Metadata


@dataclass(frozen=True)
class Probe:
    """Location of a graph's copy of one field of one step.

    captured: a host copy of the field as it was at capture, if it has one axis; None of a table, whose dead cells are
    overwritten before each replay.
    """

    offset: int  # in the probe arena, in int32 words
    shape: torch.Size
    address: int  # of the field itself, at capture
    captured: torch.Tensor | None

    def view(self, arena: torch.Tensor) -> torch.Tensor:
        return arena[self.offset : self.offset + self.shape.numel()].view(self.shape)


class ProbeArena:
    """Memory for the probes of one graph, in one piece, so that one transfer brings all probes to the host.

    probes: by step and field. arena, arena_behind: int32, on the device. ``arena_behind`` holds the same fields after
    the layer has run, and is empty without a layer. own: the backend's own fields, by name.
    """

    def __init__(
        self, metadata: Sequence[Metadata], device: torch.device, with_layer: bool, own: Sequence[str] = ()
    ) -> None:
        steps, words = [], 0
        for step_metadata in metadata:
            step_probes = {}
            for name, tensor in fields.tensors(step_metadata, own).items():
                kept = on_host(tensor).clone() if tensor.dim() == 1 and tensor.dtype is torch.int32 else None
                step_probes[name] = Probe(words, tensor.shape, tensor.data_ptr(), kept)
                words += tensor.numel()
            steps.append(step_probes)
        self.probes = tuple(steps)
        self.arena = torch.empty(words, dtype=torch.int32, device=device)
        self.arena_behind = torch.empty(words if with_layer else 0, dtype=torch.int32, device=device)
        self._fields = [tensor for step_metadata in metadata for tensor in fields.tensors(step_metadata, own).values()]
        probes = [probe for step_probes in self.probes for probe in step_probes.values()]
        self._copies = [probe.view(self.arena) for probe in probes]
        self._copies_behind = [probe.view(self.arena_behind) for probe in probes if with_layer]

    def copy_metadata(self) -> None:
        """Copy every field as it is before the layer runs. Called inside capture."""
        if self._fields:  # a backend without metadata is reported by the comparison
            torch._foreach_copy_(self._copies, self._fields)

    def copy_metadata_behind_layer(self) -> None:
        """Copy every field as the layer has left it. Called inside capture."""
        torch._foreach_copy_(self._copies_behind, self._fields)


@dataclass(frozen=True, eq=False)
class BoundGraph:
    """A captured graph, the metadata that it reads, and the probes that show what it read, by step and field."""

    graph: CapturedGraph
    metadata: tuple[Metadata, ...]
    probes: tuple[dict[str, Probe], ...]
    arena: torch.Tensor  # int32, on the device; memory of all probes
    arena_behind: torch.Tensor  # the same fields after the layer has run; empty without a layer
    layer_steps: tuple[LayerStep, ...]  # the graph's copies of the results of each pass
    own: tuple[str, ...] = ()  # the backend's own fields

    def modified_field(self) -> Modified | None:
        """A metadata field that the layer has modified, or None."""
        if not len(self.arena_behind) or torch.equal(self.arena, self.arena_behind):
            return None
        before, after = self.arena.cpu(), self.arena_behind.cpu()
        return next(
            Modified(step, name)
            for step, probes in enumerate(self.probes)
            for name, probe in probes.items()
            if not torch.equal(probe.view(before), probe.view(after))
        )

    def shown_steps(self) -> tuple[LayerStep, ...]:
        """Copies of the results of each pass in the last replay."""
        return tuple(LayerStep(copied(kept.outputs), dense_copy(kept.caches)) for kept in self.layer_steps)

    def spoil_outputs(self) -> None:
        """Overwrite the graph's copies of the layer's outputs, so that nothing of the last replay remains."""
        for step in self.layer_steps:
            for tensor in vars(step.outputs).values():
                as_bytes(tensor.view(-1)).fill_(NAN_BYTE)

    def poison(self, sentinel: int, page_size: int) -> None:
        """Overwrite the probes, the layer's outputs and the dead table cells of the last batch, before a replay."""
        self.arena.fill_(sentinel)
        self.spoil_outputs()
        seen: set[int] = set()
        for metadata in self.metadata:
            tensors = fields.tensors(metadata)
            lengths = tensors.get("seqlens_expanded")
            for name, tokens in (("page_table_1", 1), ("real_page_table", page_size)):
                table = tensors.get(name)
                if lengths is None or table is None or {lengths.dtype, table.dtype} != {torch.int32}:
                    continue
                if len(table) != len(lengths) or 0 in table.stride():
                    continue  # not the contract's layout; the comparison reports it
                if table.data_ptr() not in seen:  # steps may share one buffer
                    seen.add(table.data_ptr())
                    fill_dead_cells(table, -(-lengths // tokens), sentinel)

    def changes_when_replayed_again(self, sentinel: int, spoilt: int, steps: int) -> bool:
        """Replay without a preparation; True if the metadata of the first ``steps`` steps differs.

        It does in a graph that depends on a preparation before each replay, or that accumulates into its buffers.
        """
        words = sum(probe.shape.numel() for probes in self.probes[:steps] for probe in probes.values())
        first = self.arena[:words].clone()
        self.arena.fill_(sentinel)
        self.graph.spoil(spoilt)
        self.graph.replay()
        return not torch.equal(self.arena[:words], first)

    def observe(self, shown: Sequence[Metadata], wait: bool) -> tuple[StepObservation, ...]:
        """The content of the probes after a replay. wait: then synchronise the GPU.

        shown: the metadata now, of the steps that run.
        """
        arena = self.arena.cpu()
        if wait and arena.device != self.arena.device:
            torch.cuda.synchronize(self.arena.device)
        return tuple(
            observe(metadata, {name: probe.view(arena) for name, probe in probes.items()}, probes, self.own)
            for metadata, probes in zip(shown, self.probes, strict=False)
        )


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A host copy. Of a tensor without memory, zeros: the comparison reports its device first."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.cpu()


def observe(
    metadata: Metadata, seen: dict[str, torch.Tensor], probes: dict[str, Probe], own: Sequence[str] = ()
) -> StepObservation:
    """The metadata of one step. seen: host copies of its fields. probes: those of a graph, to detect moved fields."""
    held = fields.tensors(metadata, own)
    others = {name: value for name, value in fields.held(metadata, own).items() if name not in held}
    moved = tuple(n for n, probe in probes.items() if n not in held or held[n].data_ptr() != probe.address)
    return StepObservation(
        tensors=seen,
        dtypes={name: tensor.dtype for name, tensor in held.items()},
        devices={name: tensor.device for name, tensor in held.items()},
        host_scalars={name: getattr(metadata, name, None) for name in fields.HOST_SCALARS},
        moved=moved,
        elsewhere={name: on_host(held[name]) for name in moved if name in held},
        unchanged=tuple(n for n, p in probes.items() if p.captured is not None and torch.equal(seen[n], p.captured)),
        odd={name: described(value) for name, value in others.items() if value is not None},
        strides={name: tensor.stride() for name, tensor in held.items()},
    )
