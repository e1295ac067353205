"""Compares the live cells of a backend's metadata with the reference, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness import fields
from nsa_oracle.harness.checks.cells import picture_of
from nsa_oracle.harness.checks.declared import Declared, DeclaredStep
from nsa_oracle.harness.checks.places import RowLabels
from nsa_oracle.harness.checks.tally import Tally
from nsa_oracle.harness.engine.observations import Observation, StepObservation
from nsa_oracle.harness.errors import counted
from nsa_oracle.harness.fields import Axis, Field
from nsa_oracle.harness.findings import Finding, Kind, Neighbour, around
from nsa_oracle.harness.subjects.result_checks import described, shown_value
from nsa_oracle.reference.types import Metadata

AS_CAPTURED = "still as the capture left it"


def compare_metadata(
    seen: Observation,
    expected: Sequence[Metadata],
    device: torch.device,
    tally: Tally,
    declared: Declared | None = None,
) -> Finding | None:
    """The first disagreement in step and field order, or None. declared: what the backend declares."""
    return next(differing_fields(seen, expected, device, tally, declared), None)


def differing_fields(
    seen: Observation,
    expected: Sequence[Metadata],
    device: torch.device,
    tally: Tally,
    declared: Declared | None = None,
) -> Iterator[Finding]:
    """Yields the first disagreement of each field and host scalar of each step, in step and field order."""
    if len(seen.steps) != len(expected):
        steps = counted(len(seen.steps), "step"), counted(len(expected), "step")
        yield Finding(Kind.SHAPE, "attn_backends", *steps)
        return
    labels = RowLabels(seen)
    declared = declared or Declared()
    for step, (got, want) in enumerate(zip(seen.steps, expected, strict=True)):
        for finding in _compare_step(got, want, device, labels, tally, declared.at(seen, step)):
            yield dataclasses.replace(finding, step=step)


def _compare_step(
    got: StepObservation, want: Metadata, device: torch.device, labels: RowLabels, tally: Tally, declared: DeclaredStep
) -> Iterator[Finding]:
    scalars = _compare_scalars(got, want, declared)
    if not got.moved:  # else they belong to metadata that the graph does not read
        yield from scalars
    expected = declared.expected(fields.tensors(want), want)
    lengths = expected["seqlens_expanded"].numpy()
    for field in declared.fields():
        yield from _compare_field(field, got, expected.get(field.name), want, lengths, device, labels, tally, declared)
    yield from scalars


def _compare_scalars(got: StepObservation, want: Metadata, declared: DeclaredStep) -> Iterator[Finding]:
    for name in fields.HOST_SCALARS:
        scalar = got.host_scalars[name]
        # A tensor would synchronise at every use; a bool is not a size.
        value = getattr(want, name)
        is_int = isinstance(scalar, int) and not isinstance(scalar, bool)
        number = int.__index__(scalar) if is_int else None  # type: ignore[arg-type]  # a class may equal anything
        wrong = number != value
        if declared.waives_scalar(name, wrong) or not wrong:
            continue
        if is_int:
            yield Finding(Kind.HOST_SCALAR, name, str(number), str(value))
        else:
            yield Finding(Kind.HOST_SCALAR, name, shown_value(scalar), f"{value}, an int of Python")


def _is_dense(field: Field, shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether neighbouring cells are adjacent. Rows of page tables may lie apart, those of other fields may not."""
    within = 1
    for axis, size, stride in reversed(list(zip(field.axes, shape, strides, strict=False))):
        if size > 1 and stride != within and 0 not in shape:
            return False
        if axis in (Axis.TOKEN_COLUMN, Axis.PAGE_COLUMN):
            return True
        within *= size
    return True


def _compare_field(
    field: Field,
    got: StepObservation,
    expected: torch.Tensor | None,
    want: Metadata,
    lengths: NDArray[np.int32],
    device: torch.device,
    labels: RowLabels,
    tally: Tally,
    declared: DeclaredStep,
) -> Iterator[Finding]:
    """Yields what is wrong with the field; its content even if the field is no longer where the graph reads it.

    The content comes first, unless it is right where the field is now: a backend that refreshes nothing may show the
    metadata of another call.
    """
    name = field.name
    seen = got.tensors.get(name)
    if declared.leaves_out(name, seen, expected):
        return
    if expected is None or seen is None:
        if expected is None and seen is None and name not in got.odd:
            return
        kind = Kind.UNEXPECTED if expected is None else Kind.MISSING
        yield Finding(kind, name, got.odd.get(name) or described(seen), described(expected))
        return
    content = _compare_content(field, got, seen, expected, want, lengths, device, labels, tally, declared)
    if name not in got.moved:
        yield from content
        return
    moved = Finding(Kind.ADDRESS, name, "another address", "the address the graph was captured with")
    now = got.elsewhere.get(name)
    is_stale = now is not None and not _is_right(field, now, expected, want, lengths)
    yield from (*content, moved) if is_stale else (moved, *content)


def _is_right(
    field: Field, now: torch.Tensor, expected: torch.Tensor, want: Metadata, lengths: NDArray[np.int32]
) -> bool:
    """Whether the live cells of ``now`` are as expected."""
    if now.shape != expected.shape:
        return False
    cells = expected.numpy()
    return not ((now.numpy() != cells) & _live_cells(field, cells, want, lengths)).any()


def _compare_content(
    field: Field,
    got: StepObservation,
    seen: torch.Tensor,
    expected: torch.Tensor,
    want: Metadata,
    lengths: NDArray[np.int32],
    device: torch.device,
    labels: RowLabels,
    tally: Tally,
    declared: DeclaredStep,
) -> Iterator[Finding]:
    """Yields the first thing that is wrong with the tensor of a field, if any."""
    name = field.name
    if name not in got.dtypes:
        return
    if got.devices[name].type != device.type:
        yield Finding(Kind.DEVICE, name, str(got.devices[name]), str(device))
        return
    if got.dtypes[name] != expected.dtype:
        yield Finding(Kind.DTYPE, name, str(got.dtypes[name]), str(expected.dtype))
        return
    if seen.shape != expected.shape:
        yield Finding(Kind.SHAPE, name, str(list(seen.shape)), str(list(expected.shape)))
        return
    strides = got.strides.get(name)
    if strides is not None and not _is_dense(field, tuple(seen.shape), strides):
        yield Finding(Kind.SHAPE, name, f"strides {list(strides)}", "adjacent cells")
        return

    got_cells, want_cells = seen.numpy(), expected.numpy()
    tally.fields += 1
    tally.cells += want_cells.size
    equal = np.array_equal(got_cells, want_cells)
    if equal and not declared.has_waivers:
        return
    live = _live_cells(field, want_cells, want, lengths) & declared.specified(field, want_cells.shape)
    wrong = declared.unwaived(field, (got_cells != want_cells) & live)
    if not wrong.any():
        return
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    yield Finding(
        Kind.VALUE,
        name,
        str(got_cells[first]),
        str(want_cells[first]),
        place=labels.place(field, first),
        differing=int(wrong.sum()),
        compared=int(live.sum()),
        neighbours=tuple(_neighbours(field, first, got_cells, want_cells, live, labels)),
        how=AS_CAPTURED if name in got.unchanged else "",
        picture=picture_of(
            got_cells,
            want_cells,
            wrong,
            labels.axes(field)[-1].value,
            lambda row: labels.at(labels.axes(field)[0], row),
            lambda row: labels.owner(labels.axes(field)[0], row),
            live,
        ),
    )


def _live_cells(
    field: Field, cells: NDArray[np.int32], want: Metadata, lengths: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Mask of cells whose content is specified: in a page table, those below the KV length of the row."""
    live = np.ones(cells.shape, dtype=np.bool_)
    if field.axes[-1] in (Axis.TOKEN_COLUMN, Axis.PAGE_COLUMN):
        is_prefill = want.token_to_batch_idx is not None  # one row per request, of which there may be as many as tokens
        if is_prefill or len(cells) != len(lengths):  # the reference of an adapter may have such rows in each mode
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
