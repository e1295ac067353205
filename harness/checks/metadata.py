"""Bit-for-bit comparison of what a backend showed with what the reference says, live cells only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness import fields
from nsa_oracle.harness.engine.engine import Observation, StepObservation
from nsa_oracle.harness.fields import Axis, Field
from nsa_oracle.harness.findings import Finding, Kind, Neighbour
from nsa_oracle.harness.subjects.results import told
from nsa_oracle.reference.types import ForwardMode, Metadata

TABLE_RADIUS = 3  # cells shown on either side of the first difference


@dataclass
class Tally:
    """How much was compared."""

    fields: int = 0
    cells: int = 0


def compare(seen: Observation, expected: Sequence[Metadata], device: torch.device, tally: Tally) -> Finding | None:
    """The first disagreement in step and field order, or None."""
    if len(seen.steps) != len(expected):
        return Finding(Kind.SHAPE, "attn_backends", f"{len(seen.steps)} steps", f"{len(expected)} steps")
    labels = RowLabels(seen)
    for step, (got, want) in enumerate(zip(seen.steps, expected, strict=True)):
        finding = _compare_step(got, want, device, labels, tally)
        if finding is not None:
            return dataclasses.replace(finding, step=step)
    return None


class RowLabels:
    """Names rows, requests and columns of one observation for a person."""

    def __init__(self, seen: Observation) -> None:
        self.raw_bs = seen.raw_bs
        self.extends = seen.batch.mode is ForwardMode.EXTEND
        self.rows: list[str] = []
        per_request = _rows_per_request(seen)
        for request, count in enumerate(per_request):
            self.rows += [f"{self.request(request)}, draft token {token}" for token in range(count)]

    def request(self, number: int) -> str:
        return f"request {number}" + (" (padding)" if number >= self.raw_bs else "")

    def row(self, number: int) -> str:
        return f"row {number} ({self.rows[number] if number < len(self.rows) else 'unused tail'})"

    def at(self, axis: Axis, number: int) -> str:
        match axis:
            case Axis.REQUEST:
                return self.request(number)
            case Axis.ROW:
                return self.row(number)
            case _:
                return f"{axis.value} {number}"

    def place(self, field: Field, index: Sequence[int]) -> str:
        axes = field.extend_axes or field.axes if self.extends else field.axes
        return ", ".join(self.at(axis, int(i)) for axis, i in zip(axes, index, strict=True))


def _compare_step(
    got: StepObservation, want: Metadata, device: torch.device, labels: RowLabels, tally: Tally
) -> Finding | None:
    for name in fields.HOST_SCALARS:
        scalar = got.host_scalars[name]
        # A tensor would make every use of it a sync; a bool is no size.
        if not isinstance(scalar, int) or isinstance(scalar, bool) or scalar != getattr(want, name):
            return Finding(Kind.HOST_SCALAR, name, repr(got.host_scalars[name]), repr(getattr(want, name)))
    expected = fields.tensors(want)
    lengths = expected["seqlens_expanded"].numpy()
    for field in fields.FIELDS:
        finding = _compare_field(field, got, expected.get(field.name), want, lengths, device, labels, tally)
        if finding is not None:
            return finding
    return None


def _compare_field(
    field: Field,
    got: StepObservation,
    expected: torch.Tensor | None,
    want: Metadata,
    lengths: NDArray[np.int32],
    device: torch.device,
    labels: RowLabels,
    tally: Tally,
) -> Finding | None:
    name = field.name
    seen = got.tensors.get(name)
    if expected is None or seen is None:
        if expected is None and seen is None and name not in got.odd:
            return None
        kind = Kind.UNEXPECTED if expected is None else Kind.MISSING
        return Finding(kind, name, got.odd.get(name) or told(seen), told(expected))
    if name in got.moved:
        return Finding(Kind.ADDRESS, name, "another address", "the address the graph was captured with")
    if got.devices[name].type != device.type:
        return Finding(Kind.DEVICE, name, str(got.devices[name]), str(device))
    if got.dtypes[name] != expected.dtype:
        return Finding(Kind.DTYPE, name, str(got.dtypes[name]), str(expected.dtype))
    if seen.shape != expected.shape:
        return Finding(Kind.SHAPE, name, str(list(seen.shape)), str(list(expected.shape)))

    got_cells, want_cells = seen.numpy(), expected.numpy()
    tally.fields += 1
    tally.cells += want_cells.size
    if np.array_equal(got_cells, want_cells):
        return None
    live = _live_cells(field, want_cells, want, lengths)
    wrong = (got_cells != want_cells) & live
    if not wrong.any():
        return None
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    return Finding(
        Kind.VALUE,
        name,
        str(got_cells[first]),
        str(want_cells[first]),
        place=labels.place(field, first),
        differing=int(wrong.sum()),
        compared=int(live.sum()),
        neighbours=tuple(_neighbours(field, first, got_cells, want_cells, live, labels)),
    )


def _live_cells(
    field: Field, cells: NDArray[np.int32], want: Metadata, lengths: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Cells whose content is specified: in a page table, those below the KV length of the row."""
    live = np.ones(cells.shape, dtype=np.bool_)
    if field.axes[-1] in (Axis.TOKEN_COLUMN, Axis.PAGE_COLUMN):
        if len(cells) != len(lengths):  # EXTEND: one row per request
            lengths = want.cache_seqlens_int32.numpy()
        page_size = want.page_size if field.axes[-1] is Axis.PAGE_COLUMN else 1
        live = np.arange(cells.shape[1]) < -(-lengths // page_size)[:, None]
    if field.dead_entry is not None:
        live[:, field.dead_entry] = False
    return live


def _neighbours(
    field: Field,
    first: tuple[int, ...],
    got: NDArray[np.int32],
    want: NDArray[np.int32],
    live: NDArray[np.bool_],
    labels: RowLabels,
) -> list[Neighbour]:
    """Cells around the first difference along the last axis; dead ones are left out."""
    *outer, inner = first
    around = range(max(0, inner - TABLE_RADIUS), min(got.shape[-1], inner + TABLE_RADIUS + 1))
    cells = [(*outer, i) for i in around]
    return [Neighbour(labels.place(field, i), str(got[i]), str(want[i])) for i in cells if live[i]]


def _rows_per_request(seen: Observation) -> Sequence[int]:
    match seen.batch.mode:
        case ForwardMode.EXTEND:
            return seen.batch.extend_lens
        case ForwardMode.DRAFT_EXTEND:
            return seen.batch.accept_lengths
        case _:
            rows = len(seen.steps[0].tensors.get("seqlens_expanded", ()))
            return [rows // max(1, seen.batch.size)] * seen.batch.size
