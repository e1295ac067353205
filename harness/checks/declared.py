"""Applies what a backend declares about its metadata to a comparison, and counts how often it was needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness.engine.observations import Observation
from nsa_oracle.harness.errors import BackendError, error_line
from nsa_oracle.harness.fields import FIELDS, HOST_SCALARS, Axis, Field, tensors
from nsa_oracle.harness.subjects.declarations import ANY_MODE, ASKS_THE_MOST, Call, Cells, Declarations
from nsa_oracle.harness.subjects.result_checks import described
from nsa_oracle.reference.types import BackendConfig, Metadata

_SCALAR = Field("", (Axis.FLAT,))
NO_CONFIG = BackendConfig(1, 1, 1, 1, 1)  # nothing is declared, so nothing asks


@dataclass
class WaiverTally:
    """Comparisons that reached cells of a waiver, those in which such a cell differed, and how many cells did."""

    reason: str = ""
    reached: int = 0
    needed: int = 0
    cells: int = 0

    def add(self, other: WaiverTally) -> None:
        self.reason = self.reason or other.reason
        self.reached += other.reached
        self.needed += other.needed
        self.cells += other.cells


@dataclass
class AbsentTally:
    """Comparisons in which a field was expected that is declared absent, and those in which it was absent."""

    reached: int = 0
    needed: int = 0

    def add(self, other: AbsentTally) -> None:
        self.reached += other.reached
        self.needed += other.needed


@dataclass
class DeclaredTally:
    """How often each declared difference of a backend was met.

    waivers: by name. absent: by field and mode, as declared. left_out: comparisons that a field was left out of, by
    field and mode. own: comparisons of the author's own fields in which they had to be there, by field. stand_ins:
    cases in which a part that is not the backend's own took part.
    """

    waivers: dict[str, WaiverTally] = field(default_factory=dict)
    absent: dict[str, AbsentTally] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    own: dict[str, int] = field(default_factory=dict)
    stand_ins: dict[str, int] = field(default_factory=dict)

    def add(self, other: DeclaredTally) -> None:
        for name, tally in other.waivers.items():
            self.waivers.setdefault(name, WaiverTally()).add(tally)
        for name, absent in other.absent.items():
            self.absent.setdefault(name, AbsentTally()).add(absent)
        pairs = ((self.left_out, other.left_out), (self.own, other.own), (self.stand_ins, other.stand_ins))
        for counts, others in pairs:
            for name, count in others.items():
                counts[name] = counts.get(name, 0) + count

    def count_stand_ins(self, declarations: Declarations) -> None:
        """Count the cases in which each stand-in of the backend took part. Raises BackendError if they are no names."""
        try:
            given: object = declarations.stand_ins()
            names = None if isinstance(given, str) or not isinstance(given, Iterable) else [*map(str, given)]
        except Exception as error:
            raised = f"{type(error).__name__}: {error_line(error)}"
            raise BackendError(f"{declarations.owner}: stand_ins raised {raised}") from error
        if names is None:
            kind = type(given).__name__
            raise BackendError(f"{declarations.owner}: stand_ins must give a list of names; it gives one {kind}")
        for name in names:
            self.stand_ins[name] = self.stand_ins.get(name, 0) + 1

    @property
    def never_needed(self) -> list[str]:
        """Waivers whose cells were compared and never differed: they hide nothing yet, and might hide a defect."""
        return [name for name, tally in self.waivers.items() if tally.reached and not tally.needed]

    @property
    def never_absent(self) -> list[str]:
        """Fields that are declared absent and were there whenever they were expected; losing one would not be seen."""
        return [name for name, tally in self.absent.items() if tally.reached and not tally.needed]

    @property
    def never_there(self) -> list[str]:
        """The author's own fields for which his reference had no value in any comparison: no cell was judged."""
        return [name for name, count in self.own.items() if not count]


class Declared:
    """The declarations of one backend in the comparison of one observation's step. tally: is counted in."""

    def __init__(
        self,
        config: BackendConfig = NO_CONFIG,
        declarations: Declarations = ASKS_THE_MOST,
        tally: DeclaredTally | None = None,
    ) -> None:
        self.config = config
        self.declarations = declarations
        self.tally = DeclaredTally() if tally is None else tally

    def compared(self, seen: Observation, expected: Sequence[Metadata]) -> list[str]:
        """Names of the fields that a comparison of ``seen`` with ``expected`` looks at."""
        if not expected:
            return []
        step, quiet = seen.steps[0], Declared(self.config, self.declarations)
        at = quiet.at(seen, 0)
        right = at.expected(tensors(expected[0]), expected[0])
        names = (field.name for field in at.fields())
        return [
            name for name in names if name in right and not at.leaves_out(name, step.tensors.get(name), right[name])
        ]

    def at(self, seen: Observation, step: int) -> DeclaredStep:
        """The declarations for step ``step`` of ``seen``."""
        return DeclaredStep(self, Call(self.config, seen.batch, seen.raw_bs, seen.in_graph, step))


@dataclass(frozen=True)
class DeclaredStep:
    """The declarations for one step of one call."""

    declared: Declared
    call: Call

    @property
    def has_waivers(self) -> bool:
        return bool(self.declared.declarations.waivers)

    def fields(self) -> Sequence[Field]:
        """The fields to compare: those of the contract, then the author's own."""
        known = {known.name for known in FIELDS}
        own = self.declared.declarations.own(self.call.batch.mode)
        return (*FIELDS, *(one.field for one in own if one.name not in known))

    def expected(self, tensors: dict[str, torch.Tensor], reference: Metadata) -> dict[str, torch.Tensor]:
        """The right content of each field: that of ``tensors``, unless the author has a reference of his own.

        Raises BackendError if such a reference fails or gives anything but an int32 tensor.
        """
        for own in self.declared.declarations.own(self.call.batch.mode):
            named = f"{self.declared.declarations.owner}: own_fields: the reference of '{own.name}'"
            try:
                content = own.reference(dataclasses.replace(reference), self.call)
            except Exception as error:
                raise BackendError(f"{named} raised {error!r}") from error
            if content is None:
                tensors.pop(own.name, None)
            elif not isinstance(content, torch.Tensor) or content.dtype is not torch.int32:
                raise BackendError(f"{named} must give an int32 tensor or None")
            elif content.dim() != len(own.field.axes):
                raise BackendError(f"{named} gives {content.dim()} dimensions, axes names {len(own.field.axes)}")
            else:
                tensors[own.name] = content
            self.declared.tally.own[own.name] = self.declared.tally.own.get(own.name, 0) + (content is not None)
        return tensors

    def leaves_out(self, name: str, seen: object, expected: object) -> bool:
        """Whether the field is not compared: absent, or present and unjudged, as declared. Counted if so."""
        declarations, mode = self.declared.declarations, self.call.batch.mode
        absent = expected is not None and self._is_declared_absent(name, seen is None)
        unjudged = seen is not None and declarations.lists(declarations.unjudged, mode, name)
        if not absent and not unjudged:
            return False
        place = f"{name} {'absent' if absent else 'not judged'} in {mode.value}"
        self.declared.tally.left_out[place] = self.declared.tally.left_out.get(place, 0) + 1
        return True

    def _is_declared_absent(self, name: str, is_absent: bool) -> bool:
        """Whether the field is absent as declared. Counts each declaration of it that the mode reaches."""
        declarations, mode = self.declared.declarations, self.call.batch.mode
        listed = [key for key in (mode.value, ANY_MODE) if name in declarations.absent.get(key, ())]
        for key in listed:
            where = f"{name} in {'every mode' if key == ANY_MODE else key}"
            self.declared.tally.absent.setdefault(where, AbsentTally()).add(AbsentTally(1, int(is_absent)))
        return is_absent and bool(listed)

    def specified(self, field: Field, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """The cells of a field that the author does not call dead."""
        live = np.ones(shape, dtype=np.bool_)
        for own in self.declared.declarations.own(self.call.batch.mode):
            if own.name == field.name and own.dead is not None:
                live &= ~self._cells(own.dead, f"dead cells of '{own.name}'", field, shape)
        return live

    def _cells(self, cells: Cells, what: str, field: Field, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        try:
            given = cells(self.call, field, shape)
            mask = np.broadcast_to(given, shape)
        except Exception as error:
            raise BackendError(f"{self.declared.declarations.owner}: the {what} raised {error!r}") from error
        if mask.dtype != np.bool_:
            kind = described(given) if given is None or mask.dtype == object else f"numbers of {mask.dtype}"
            raise BackendError(
                f"{self.declared.declarations.owner}: the {what} must be a mask of bool that broadcasts to "
                f"{list(shape)}, not {kind}"
            )
        return mask

    def unwaived(self, field: Field, wrong: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The cells of ``wrong`` that no waiver covers. Counts the waivers that are reached and needed."""
        left = wrong.copy()
        for waiver in self.declared.declarations.waivers:
            if not waiver.covers(field.name, self.call):
                continue
            cells = self._cells(waiver.cells, f"cells of the waiver '{waiver.name}'", field, wrong.shape)
            needed = int((wrong & cells).sum())
            tally = self.declared.tally.waivers.setdefault(waiver.name, WaiverTally(waiver.reason))
            tally.add(WaiverTally(waiver.reason, int(cells.any()), int(needed > 0), needed))
            left &= ~cells
        return left

    def waives_scalar(self, name: str, is_wrong: bool) -> bool:
        """Whether a waiver covers the host scalar ``name``, which is one cell."""
        assert name in HOST_SCALARS
        scalar = dataclasses.replace(_SCALAR, name=name)
        return not self.unwaived(scalar, np.array([is_wrong])).any()
