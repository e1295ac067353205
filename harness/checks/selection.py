"""Compares the results of top-k entry by entry, or as sets of tokens if a layer declares only that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from nsa_oracle.harness.checks.cells import picture_of
from nsa_oracle.harness.checks.tally import LayerTally
from nsa_oracle.harness.content.edge_logits import EdgeLogits, LogitKind
from nsa_oracle.harness.engine.judged_layer import JudgedLayer
from nsa_oracle.harness.engine.observations import Selected
from nsa_oracle.harness.findings import Finding, Kind, Neighbour, around
from nsa_oracle.harness.protocol import Strictness
from nsa_oracle.reference.topk import topk_indices, transform_paged, transform_ragged


class SelectableRows(Protocol):
    """Rows that top-k selects from: their lengths, and the tables that transform positions."""

    @property
    def seqlens_expanded(self) -> torch.Tensor: ...

    @property
    def page_table_1(self) -> torch.Tensor: ...

    @property
    def topk_indices_offset(self) -> torch.Tensor | None: ...


@dataclass(frozen=True)
class SelectedEntries:
    """One result of top-k, positions or transformed positions. got, want: [R, index_topk] int32.

    scores: the score of each entry that a row may select. row_name, entry_name: names of a row, and of an entry of a
    row, in reports.
    """

    name: str
    got: torch.Tensor
    want: torch.Tensor
    scores: Callable[[int], Mapping[int, float]]
    row_name: Callable[[int], str]
    entry_name: Callable[[int, int], str]

    def wrong_form(self) -> Finding | None:
        """A wrong device type, dtype or shape, or None."""
        got, want = self.got, self.want
        if got.device.type != want.device.type:
            return Finding(Kind.DEVICE, self.name, str(got.device), str(want.device))
        if got.dtype is not want.dtype:
            return Finding(Kind.DTYPE, self.name, str(got.dtype), str(want.dtype))
        if got.shape != want.shape:
            return Finding(Kind.SHAPE, self.name, str(list(got.shape)), str(list(want.shape)))
        return None

    def wrong(self, as_sets: bool) -> torch.Tensor:
        """The wrong entries, bool [R, index_topk]. as_sets: any order within a row and any choice among ties is
        right.
        """
        wrong = self.got != self.want
        for row in wrong.any(1).nonzero().flatten().tolist() if as_sets else ():
            if _equally_good(self.got[row], self.want[row], self.scores(row)):
                wrong[row] = False
        return wrong

    def first(self, wrong: torch.Tensor) -> Finding | None:
        """A finding of the first entry of those ``wrong``, or None."""
        if not bool(wrong.any()):
            return None
        row, column = (int(i) for i in wrong.nonzero()[0])
        got, want = self.got[row].tolist(), self.want[row].tolist()
        at = self.row_name(row)
        return Finding(
            Kind.VALUE,
            self.name,
            self.entry_name(row, got[column]),
            self.entry_name(row, want[column]),
            place=f"{at}, entry {column}",
            differing=int(wrong.sum()),
            compared=self.want.numel(),
            neighbours=tuple(
                Neighbour(f"{at}, entry {i}", str(got[i]), str(want[i])) for i in around(column, len(want))
            ),
            picture=picture_of(self.got, self.want, wrong, "entry", self.row_name),
        )


def entries_of(name: str, rows: SelectableRows, row: int) -> list[int]:
    """The entry of each token of a row in the result ``name``: a position, a slot or a place in the concatenated KV."""
    length = int(rows.seqlens_expanded[row])
    match name:
        case "indices":
            return rows.page_table_1[row, :length].tolist()
        case "topk_ragged":
            assert rows.topk_indices_offset is not None
            first = int(rows.topk_indices_offset[row])
            return list(range(first, first + length))
        case _:
            return list(range(length))


def scores_of(name: str, rows: SelectableRows, logits: torch.Tensor, row: int) -> dict[int, float]:
    """The score of each entry that a row may select. NaN counts as -inf."""
    entries = entries_of(name, rows, row)
    scores = logits[row, : len(entries)].nan_to_num(nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf)
    return dict(zip(entries, scores.tolist(), strict=True))


def _equally_good(got: torch.Tensor, want: torch.Tensor, scores: Mapping[int, float]) -> bool:
    """Whether ``got`` has as many entries as ``want``, all different, with the same scores."""
    chosen = [entry for entry in got.tolist() if entry != -1]
    best = [entry for entry in want.tolist() if entry != -1]
    if len(set(chosen)) != len(chosen) or any(entry not in scores for entry in chosen):
        return False
    return sorted(scores[entry] for entry in chosen) == sorted(scores[entry] for entry in best)


def compare_entries(entries: SelectedEntries, declared: Strictness | None, tally: LayerTally) -> Finding | None:
    """Compare entry by entry, or as the layer declares. declared: its weaker comparison of this stage, if any."""
    finding = entries.wrong_form()
    if finding is not None:
        return finding
    stage, as_sets = tally.stage(entries.name), declared is Strictness.SAME_SET
    if declared is Strictness.SAME_SET:
        stage.count_weaker(entries.want.numel(), declared)
    else:
        stage.exact += entries.want.numel()
    return entries.first(entries.wrong(as_sets))


def compare_edge_logits(seen: Selected, layer: JudgedLayer, tally: LayerTally) -> Finding | None:
    """Compare top-k and one of its transforms on edge-case logits."""
    for entries in _edge_entries(seen, layer):
        finding = compare_entries(entries, layer.weaker.get(entries.name), tally)
        if finding is not None:
            return finding
    for kind in seen.given.kinds:
        tally.selections[kind.value] = tally.selections.get(kind.value, 0) + 1
    return None


def edge_logits_by_kind(seen: Selected, layer: JudgedLayer) -> Iterator[tuple[LogitKind, Finding | None]]:
    """The first disagreement, or None, in each result and row of edge-case logits, with the row's kind."""
    for entries in _edge_entries(seen, layer):
        form = entries.wrong_form()
        wrong = None if form else entries.wrong(layer.weaker.get(entries.name) is Strictness.SAME_SET)
        for row, kind in enumerate(seen.given.kinds):
            if wrong is None:
                yield kind, form
            else:
                others = torch.arange(len(wrong), device=wrong.device)[:, None] != row
                yield kind, entries.first(wrong.masked_fill(others, False))


def _edge_entries(seen: Selected, layer: JudgedLayer) -> Iterator[SelectedEntries]:
    """The results of top-k and its transforms on edge-case logits."""
    given = seen.given
    positions = topk_indices(given.logits, given.seqlens_expanded, layer.setup.index_topk)
    for name, got, want in (
        ("topk_indices", seen.positions, positions),
        ("indices", seen.indices, transform_paged(positions, given.page_table_1)),
        ("topk_ragged", seen.ragged, transform_ragged(positions, given.topk_indices_offset)),
    ):
        if got is not None:
            yield SelectedEntries(
                name,
                got,
                want.to(layer.device),
                scores=partial(scores_of, name, given, given.logits),
                row_name=partial(_row_of_edge_logits, given),
                entry_name=partial(_entry_of_edge_logits, name, given),
            )


def _row_of_edge_logits(given: EdgeLogits, row: int) -> str:
    return f"row {row} (made-up logits: {given.kinds[row].value}, length {int(given.seqlens_expanded[row])})"


def _entry_of_edge_logits(name: str, given: EdgeLogits, row: int, entry: int) -> str:
    """Name of an entry, with the logit of its token."""
    entries = entries_of(name, given, row)
    if entry not in entries:
        return str(entry)
    position = entries.index(entry)
    at = "" if name == "topk_indices" else f"position {position}, "
    return f"{entry} ({at}logit {float(given.logits[row, position]):.9g})"
