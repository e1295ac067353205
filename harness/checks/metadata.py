"""Compares the live cells of a backend's metadata with the reference, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness import fields
from nsa_oracle.harness.checks.places import RowLabels
from nsa_oracle.harness.checks.tally import Tally
from nsa_oracle.harness.engine.observations import Observation, StepObservation
from nsa_oracle.harness.errors import counted
from nsa_oracle.harness.fields import Axis, Field
from nsa_oracle.harness.findings import Finding, Kind, Neighbour, around
from nsa_oracle.harness.subjects.result_checks import described, shown_value
from nsa_oracle.reference.types import Metadata


def compare_metadata(
    seen: Observation, expected: Sequence[Metadata], device: torch.device, tally: Tally
) -> Finding | None:
    """The first disagreement in step and field order, or None."""
    if len(seen.steps) != len(expected):
        return Finding(Kind.SHAPE, "attn_backends", counted(len(seen.steps), "step"), counted(len(expected), "step"))
    labels = RowLabels(seen)
    for step, (got, want) in enumerate(zip(seen.steps, expected, strict=True)):
        finding = _compare_step(got, want, device, labels, tally)
        if finding is not None:
            return dataclasses.replace(finding, step=step)
    return None


def _compare_step(
    got: StepObservation, want: Metadata, device: torch.device, labels: RowLabels, tally: Tally
) -> Finding | None:
    for name in fields.HOST_SCALARS:
        scalar = got.host_scalars[name]
        # A tensor would synchronise at every use; a bool is not a size.
        if not isinstance(scalar, int) or isinstance(scalar, bool):
            return Finding(Kind.HOST_SCALAR, name, shown_value(scalar), f"{getattr(want, name)}, an int of Python")
        if scalar != getattr(want, name):
            return Finding(Kind.HOST_SCALAR, name, str(scalar), str(getattr(want, name)))
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
        return Finding(kind, name, got.odd.get(name) or described(seen), described(expected))
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
    """Mask of cells whose content is specified: in a page table, those below the KV length of the row."""
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
    """Live cells around the first difference, along the last axis."""
    *outer, inner = first
    cells = [(*outer, i) for i in around(inner, got.shape[-1])]
    return [Neighbour(labels.place(field, i), str(got[i]), str(want[i])) for i in cells if live[i]]
