"""Pictures of wrong fields: the cells around the first wrong one, for pages that people look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness.findings import DEAD, LIVE, WRONG, Owner, Picture, PictureRow

MOST_PICTURED = 64  # rows, and columns
Cells2D = NDArray[Any]  # [rows, columns]


def picture_of(
    got: torch.Tensor | NDArray[Any],
    want: torch.Tensor | NDArray[Any],
    wrong: torch.Tensor | NDArray[np.bool_],
    axis: str,
    label: Callable[[int], str],
    owner: Callable[[int], Owner] = lambda row: Owner.REQUEST,
    live: NDArray[np.bool_] | None = None,
    shown: Callable[[Any], str] = str,
) -> Picture:
    """The cells of a field around the first of those ``wrong``, of which there is at least one.

    got, want, wrong, live: of one shape. One axis is drawn as rows of one cell; of three, the first two are drawn as
    one, so ``label`` then gets numbers in the order of both. axis: what a column is. shown: a cell as text.
    """
    if wrong.ndim > 2:
        got, want, wrong = (cells.reshape(-1, cells.shape[-1]) for cells in (got, want, wrong))
    first = _first(wrong)
    place = first if len(first) == 2 else (*first, 0)
    height, width = len(got), got.shape[1] if len(first) == 2 else 1
    rows, columns = _span(place[0], height), _span(place[1], width)
    parts = [_part(cells, rows, columns) for cells in (got, want, wrong)]
    specified = np.ones(parts[2].shape, dtype=np.bool_) if live is None else _part(live, rows, columns)
    drawn = []
    for number, (seen, expected, bad, good) in enumerate(zip(*parts, specified, strict=True), rows.start):
        states = "".join(WRONG if b else LIVE if g else DEAD for b, g in zip(bad, good, strict=True))
        texts = [tuple(shown(cell) for cell in cells.tolist()) for cells in (seen, expected)]
        drawn.append(PictureRow(label(number), owner(number), states, texts[0], texts[1]))
    return Picture((height, width), rows.start, columns.start, axis if len(first) == 2 else "", tuple(drawn))


def _first(wrong: torch.Tensor | NDArray[np.bool_]) -> tuple[int, ...]:
    places = wrong.nonzero()[0] if isinstance(wrong, torch.Tensor) else np.argwhere(wrong)[0]
    return tuple(int(i) for i in places)


def _span(place: int, count: int) -> range:
    """At most ``MOST_PICTURED`` numbers below ``count`` around ``place``."""
    start = max(0, min(place - MOST_PICTURED // 2, count - MOST_PICTURED))
    return range(start, min(count, start + MOST_PICTURED))


def _part(cells: torch.Tensor | NDArray[Any], rows: Sequence[int], columns: Sequence[int]) -> Cells2D:
    part = cells[rows[0] : rows[-1] + 1]
    part = part.reshape(len(rows), 1) if part.ndim == 1 else part[:, columns[0] : columns[-1] + 1]
    if isinstance(part, torch.Tensor):
        part = part.detach().cpu()
        part = (part.float() if part.is_floating_point() else part).numpy()
    return np.asarray(part)


def shown_number(number: float) -> str:
    """A number of a layer as text."""
    return f"{number:.6g}"
