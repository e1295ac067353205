"""Records of disagreements. Reports make text of them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple


class Kind(enum.Enum):
    """The kind of a disagreement. Reports show the values."""

    VALUE = "wrong value"
    BOUND = "beyond the error bound"
    RELATION = "depends on what must not matter"
    RESULT = "wrong result"
    SHAPE = "wrong shape"
    DTYPE = "wrong dtype"
    DEVICE = "wrong device"
    MISSING = "missing field"
    UNEXPECTED = "field that this mode does not have"
    HOST_SCALAR = "wrong host scalar"
    ADDRESS = "buffer moved after capture"
    GUARD = "write outside a buffer"
    INPUT = "input modified"
    STATE = "global state left changed"
    CAPTURE = "capture rejected"
    FROZEN = "frozen host value"
    VARIANTS = "compiled anew for each size"
    CRASH = "backend raised"
    LAYER_CRASH = "layer raised"
    TIMEOUT = "does not end"


RADIUS = 3  # cells that a report shows on either side of the first wrong one


def around(place: int, count: int) -> range:
    """The indices around ``place``, itself included, within ``count``."""
    return range(max(0, place - RADIUS), min(count, place + RADIUS + 1))


@dataclass(frozen=True)
class Neighbour:
    """One cell near the first difference."""

    place: str
    got: str
    expected: str


class Owner(enum.Enum):
    """Whose a row of a field is. Pages show the values."""

    REQUEST = "request"
    PADDING = "padding"
    TAIL = "unused tail"
    NOBODY = ""  # of one request or row


LIVE, DEAD, WRONG = ".", "-", "x"
"""How a cell of a picture is: as expected, without a specified content, not as expected."""


@dataclass(frozen=True)
class PictureRow:
    """One row of a picture. states: a letter for each cell, LIVE, DEAD or WRONG. got, expected: the cells' contents.

    label: the place of the row, such as "row 3 (request 1, draft token 0)".
    """

    label: str
    owner: Owner
    states: str
    got: tuple[str, ...]
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """The cells of a wrong field around the first wrong one, at most ``MOST_PICTURED`` along each axis.

    shape: of the whole field, in rows and columns. row, column: numbers of the first ones shown. axis: what a column
    is, such as "page column"; empty if there is one column only.
    """

    shape: tuple[int, int]
    row: int
    column: int
    axis: str
    rows: tuple[PictureRow, ...]


@dataclass(frozen=True)
class Finding:
    """One disagreement between a backend or a layer and what is expected.

    differing, compared: numbers of live cells of this field and step that differ, and that were compared. place: the
    first cell that differs. how: the run of the layer, or the relation, that shows it. stack: the lines of judged code
    through which an exception passed, outermost first. thread_errors: exceptions that had ended threads of judged code.
    picture: the cells of the field, if its content is what is wrong.
    """

    kind: Kind
    field: str
    got: str
    expected: str
    step: int | None = None
    place: str = ""
    differing: int = 0
    compared: int = 0
    neighbours: tuple[Neighbour, ...] = ()
    how: str = ""
    stack: tuple[str, ...] = ()
    thread_errors: tuple[str, ...] = ()
    picture: Picture | None = None

    def is_like(self, other: Finding) -> bool:
        """Whether both have the same kind and the same field."""
        return (self.kind, self.field) == (other.kind, other.field)

    def sentence(self) -> str:
        where = [part for part in (f"step {self.step}" if self.step is not None else "", self.place) if part]
        at = ", ".join(where)
        if at:
            at = f" {at}" if at.startswith(("of ", "from ")) else f" at {at}"
        count = f"; {self.differing} of {self.compared} live cells differ" if self.compared else ""
        how = f" ({self.how})" if self.how else ""
        return f"{self.kind.value}: {self.field}{at}{how}: got {self.got}, expected {self.expected}{count}"


class InputWrite(NamedTuple):
    """A write to the input ``name``, by an operator such as "add_", at ``place``: a file, a line and a function."""

    name: str
    operation: str
    place: str

    @property
    def shown(self) -> str:
        """What was done, of a write that leaves the content as it is."""
        return f"a write by {self.operation} that leaves its content as it is"
