"""What a backend declares about itself beyond ``sizes`` and ``modes``. Every default asks the most of the backend.

Declarations are attributes of the callable that builds the backend. They say how an engine drives it (``roles``,
``step_backends``, ``padding``, ``mirrors``, ``empty_batches``, ``empty_replays``, ``empty_chunks``, ``fewer_steps``)
and what its metadata holds (``absent``, ``unjudged``, ``own_fields``, ``waivers``). A difference that is declared is
counted and printed in every report, and so is what is not the backend's own (``stand_ins``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness import fields
from nsa_oracle.harness.errors import building
from nsa_oracle.harness.fields import FIELDS, HOST_SCALARS, Axis, Field
from nsa_oracle.harness.protocol import BackendFactory
from nsa_oracle.harness.scenarios.batch import Batch, Padding
from nsa_oracle.harness.scenarios.scenario import graph_mode
from nsa_oracle.harness.scenarios.setup import Setup
from nsa_oracle.harness.subjects.names import BuiltBackend
from nsa_oracle.reference.types import BackendConfig, ForwardMode, Metadata

_T = TypeVar("_T")
ANY_MODE = "*"
STEP_COUNTS = ("N", "N-1", "1")


@dataclass(frozen=True)
class Call:
    """One replay (``in_graph``) or eager call whose metadata is compared, at draft step ``step``.

    batch: padded to the graph's bucket; its first ``raw_bs`` requests are real.
    """

    config: BackendConfig
    batch: Batch
    raw_bs: int
    in_graph: bool
    step: int

    @property
    def rows_of_requests(self) -> tuple[int, ...]:
        """Rows of each request, padding included."""
        match self.batch.mode:
            case ForwardMode.EXTEND:
                return self.batch.extend_lens
            case ForwardMode.DRAFT_EXTEND:
                return self.batch.accept_lengths
            case mode:
                return (self.config.rows_per_request(mode),) * self.batch.size


Cells = Callable[[Call, Field, tuple[int, ...]], NDArray[np.bool_]]
"""(call, field, shape of the field) -> mask of cells, which broadcasts to that shape."""


def everywhere(call: Call, field: Field, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """All cells of the field."""
    return np.ones(shape, dtype=np.bool_)


def behind_last_token(call: Call, field: Field, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Rows behind the last token of the batch, which only a graph of DRAFT_EXTEND has, and bounds behind them."""
    return _from_row(sum(call.rows_of_requests), field, shape)


def of_padding(call: Call, field: Field, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Requests that only pad the batch, their rows, and bounds behind them."""
    if field.axes[0] in (Axis.REQUEST, Axis.REQUEST_BOUND):
        return _from(call.raw_bs + (field.axes[0] is Axis.REQUEST_BOUND), shape)
    return _from_row(sum(call.rows_of_requests[: call.raw_bs]), field, shape)


def of_negative_lengths(call: Call, field: Field, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Rows that stand before the first token of their request, whose length is 0 and would be negative without the
    rule, and all bounds behind the first of them. Only a request with more rows than tokens has any.
    """
    mask, row = np.zeros(shape, dtype=np.bool_), 0
    is_bound = field.axes[0] is Axis.ROW_BOUND
    for length, rows in zip(call.batch.seq_lens, call.rows_of_requests, strict=True):
        negative = max(0, rows - length - 1)  # the row behind them has length 0 either way
        if is_bound and negative:
            mask[row + 1 :] = True
        elif field.axes[0] is Axis.ROW:
            mask[row : row + negative] = True
        row += rows
    return mask


def _from_row(row: int, field: Field, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    if field.axes[0] not in (Axis.ROW, Axis.ROW_BOUND):
        return np.zeros(shape, dtype=np.bool_)
    return _from(row + (field.axes[0] is Axis.ROW_BOUND), shape)


def _from(first: int, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    mask = np.zeros(shape, dtype=np.bool_)
    mask[first:] = True
    return mask


@dataclass(frozen=True)
class Waiver:
    """Cells of a field that may differ in a mode, and why. A run that reaches such cells and needs no waiver fails.

    mode: the name of a forward mode. field: a tensor of the metadata, or a host scalar, which is one cell. cells: by
    default all of them, the field's shape, dtype and presence not included. in_graph: only in replays (True) or eager
    calls (False); None: in both.
    """

    mode: str
    field: str
    reason: str
    cells: Cells = everywhere
    in_graph: bool | None = None

    @property
    def name(self) -> str:
        """The waiver in words, without its reason."""
        where = {None: "", True: " in graphs", False: " eagerly"}[self.in_graph]
        cells = getattr(self.cells, "__name__", type(self.cells).__name__)
        return f"{self.field} in {self.mode}{where}, {cells.strip('_').replace('_', ' ')}"

    def covers(self, field: str, call: Call) -> bool:
        """Whether it is about ``field`` in ``call``."""
        return self.field == field and self.mode == call.batch.mode.value and self.in_graph in (None, call.in_graph)


@dataclass(frozen=True)
class OwnField:
    """A field with a reference function of the author's own, judged like any other; it may replace a known field's.

    name: an attribute of the backend's metadata, an int32 tensor. reference: gives the right content from the
    reference's metadata of the step, or None if the field must be absent. modes: where it applies. axes: what its
    dimensions mean, for reports and for cells of waivers; those of a known field if it replaces one. dead: cells
    whose content is unspecified, because nothing reads them.
    """

    name: str
    reference: Callable[[Metadata, Call], torch.Tensor | None]
    modes: tuple[str, ...] = (ANY_MODE,)
    axes: tuple[Axis, ...] = (Axis.FLAT,)
    dead: Cells | None = None

    @property
    def field(self) -> Field:
        known = {field.name: field for field in FIELDS}
        return known.get(self.name, Field(self.name, self.axes))


@dataclass(frozen=True)
class Role:
    """One instance of the backend and the modes that it serves. name: None if it is the only instance.

    steps: its number of single-step backends: "N", "N-1" or "1".
    """

    name: str | None
    modes: tuple[ForwardMode, ...]
    steps: str = "N"

    def count(self, num_steps: int) -> int:
        return {"N": num_steps, "N-1": num_steps - 1, "1": 1}[self.steps]


@dataclass(frozen=True)
class Declarations:
    """See the module. stand_ins: gives the dotted names of parts that are not the backend's own, so not judged.

    owner: how messages name the backend that declares all this.
    """

    roles: tuple[Role, ...] = (Role(None, tuple(ForwardMode)),)
    padding: Mapping[ForwardMode, Padding] = field(default_factory=dict)
    absent: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unjudged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    own_fields: tuple[OwnField, ...] = ()
    waivers: tuple[Waiver, ...] = ()
    stand_ins: Callable[[], Sequence[str]] = tuple
    owner: str = "declarations"

    def role_of(self, mode: ForwardMode) -> Role:
        return next(role for role in self.roles if mode in role.modes)

    def padded(self, batch: Batch, bs: int, setup: Setup) -> Batch:
        """``batch`` filled up to the bucket ``bs`` with this backend's padding, or else with that of ``setup``."""
        padding = self.padding.get(graph_mode(batch.mode), Padding(setup.padding_len))
        return batch.padded(bs, setup.num_draft_tokens, padding)

    def padded_eagerly(self, batch: Batch, setup: Setup) -> Batch:
        """``batch`` with the padding of ``setup`` for eager calls. A prefill has none."""
        if batch.mode is ForwardMode.EXTEND or not setup.eager_padding:
            return batch
        return self.padded(batch, batch.size + setup.eager_padding, setup)

    def own(self, mode: ForwardMode) -> list[OwnField]:
        """The author's fields that apply in ``mode``."""
        return [own for own in self.own_fields if ANY_MODE in own.modes or mode.value in own.modes]

    @property
    def own_names(self) -> tuple[str, ...]:
        """Names of the author's fields that the contract does not have."""
        known = {known.name for known in FIELDS}
        return tuple(dict.fromkeys(own.name for own in self.own_fields if own.name not in known))

    def lists(self, what: Mapping[str, tuple[str, ...]], mode: ForwardMode, name: str) -> bool:
        """Whether ``what``, ``absent`` or ``unjudged``, names the field in ``mode``."""
        return name in what.get(mode.value, ()) or name in what.get(ANY_MODE, ())

    def build(
        self, factory: BackendFactory, role: Role, config: BackendConfig, pool: torch.Tensor, switches: tuple[str, ...]
    ) -> BuiltBackend:
        """The instance for ``role``: ``factory`` gets the role's name if it has one."""
        build: Callable[..., BuiltBackend] = factory
        with building():
            return build(config, pool, switches) if role.name is None else build(config, pool, switches, role.name)


ASKS_THE_MOST = Declarations()


def declarations_of(factory: object) -> Declarations:
    """The declarations that travel with a loaded backend; of any other factory, those that ask the most."""
    found: Declarations = getattr(factory, "declarations", ASKS_THE_MOST)
    return found


def read_declarations(owner: object) -> Declarations:
    """What ``owner`` declares in its attributes. Raises ValueError, in one line, if a declaration is malformed."""
    get: Callable[[str, Any], Any] = lambda name, default: getattr(owner, name, default)  # noqa: E731
    own_fields, waivers = _listed("own_fields", OwnField, get), _listed("waivers", Waiver, get)
    if not callable(stand_ins := get("stand_ins", tuple)):
        raise ValueError(f"stand_ins must be a function that gives names; it is {_kind(stand_ins)}")
    if not isinstance(empty_batches := get("empty_batches", True), bool):
        raise ValueError(f"empty_batches must be True or False; it is {_kind(empty_batches)}")
    for own in own_fields:
        _known_modes("own_fields", [mode for mode in own.modes if mode != ANY_MODE])
    own_names = {own.name for own in own_fields}
    names = {*HOST_SCALARS, *own_names, *(known.name for known in FIELDS)}
    for waiver in waivers:
        _known_modes("waivers", [waiver.mode])
        _known_fields("waivers", [waiver.field], names)
        if not waiver.reason.strip():
            raise ValueError(f"waivers: '{waiver.name}' has no reason; say why the cells may differ")
    found = Declarations(
        _roles(get("roles", None), get("step_backends", "N"), get("modes", None)),
        _padding(get("padding", {})),
        _fields_by_mode("absent", get("absent", {}), names),
        _fields_by_mode("unjudged", get("unjudged", {}), names),
        own_fields,
        waivers,
        stand_ins,
    )
    _check_modes(get("modes", None), found)
    return found


def _listed(what: str, kind: type[_T], get: Callable[[str, Any], Any]) -> tuple[_T, ...]:
    """The elements of the declaration ``what``, which are all of the class ``kind``."""
    given, named = get(what, ()), f"{kind.__module__}.{kind.__name__}"
    if not isinstance(given, list | tuple):
        mend = f"; write {what} = ({kind.__name__}(...),)" if isinstance(given, kind) else ""
        raise ValueError(f"{what} must be a list or tuple of {named}; it is {_kind(given)}{mend}")
    for one in given:
        if not isinstance(one, kind):
            raise ValueError(f"{what} must be a list of {named}; one is {_kind(one)}")
    return tuple(given)


def _check_modes(modes: object, found: Declarations) -> None:
    """Raises ValueError if ``modes`` lists a mode twice, or if something is declared for a mode that it excludes."""
    if isinstance(modes, str) or not isinstance(modes, Sequence | set | frozenset | None):
        return  # what is malformed is refused with the limits
    listed = [mode.value if isinstance(mode, ForwardMode) else mode for mode in modes or ()]
    if twice := [mode for mode in listed if listed.count(mode) > 1]:
        raise ValueError(f"modes: {twice[0]} is listed twice; remove one of them")
    served = [mode for mode in ForwardMode if modes is None or mode.value in listed]
    declared_for = {
        "absent": [*found.absent],
        "unjudged": [*found.unjudged],
        "waivers": [waiver.mode for waiver in found.waivers],
        "own_fields": [mode for own in found.own_fields for mode in own.modes],
    }
    for what, named in declared_for.items():
        for mode in named:
            if mode != ANY_MODE and ForwardMode(mode) not in served:
                raise ValueError(f"{what}: modes excludes {mode}; remove it there, or add it to modes")
    for padded in found.padding:
        if padded not in {graph_mode(mode) for mode in served}:
            raise ValueError(f"padding: modes excludes {padded.value}; remove it there, or add it to modes")
    _check_absent(found, served)


def _roles(roles: object, step_backends: object, modes: Any) -> tuple[Role, ...]:
    def count(name: str | None) -> str:
        steps = step_backends.get(name, "N") if isinstance(step_backends, Mapping) else step_backends
        if steps not in STEP_COUNTS:
            raise ValueError(f"step_backends cannot be {steps!r}; choose from {', '.join(STEP_COUNTS)}")
        return str(steps)

    if roles is None:
        return (Role(None, tuple(ForwardMode), count(None)),)
    if isinstance(roles, Mapping) and not roles:
        raise ValueError("roles names no role; leave it out if one backend serves all modes")
    if not isinstance(roles, Mapping):
        raise ValueError(
            f"roles must map names to modes, as {{'verify': ('TARGET_VERIFY',)}} does; it is {_kind(roles)}"
        )
    found = tuple(Role(str(name), _known_modes("roles", served), count(name)) for name, served in roles.items())
    if isinstance(step_backends, Mapping) and (unknown := [name for name in step_backends if name not in roles]):
        raise ValueError(f"step_backends: there is no role {unknown[0]!r}; choose from {', '.join(map(str, roles))}")
    asked = tuple(ForwardMode) if modes is None else _known_modes("modes", modes)
    serving = {mode: [role.name for role in found if mode in role.modes] for mode in asked}
    if several := [f"{mode.value} in {' and '.join(map(str, names))}" for mode, names in serving.items() if names[1:]]:
        raise ValueError(f"roles: {', '.join(several)}; a mode must have one role")
    if without := [mode.value for mode, names in serving.items() if not names]:
        raise ValueError(f"roles: none has {', '.join(without)}; give each mode one, or leave it out of modes")
    return found


def _padding(padding: object) -> dict[ForwardMode, Padding]:
    if not isinstance(padding, Mapping):
        raise ValueError(f"padding must map modes to {Padding.__module__}.Padding; it is {_kind(padding)}")
    for value in padding.values():
        if not isinstance(value, Padding):
            raise ValueError(f"padding must map modes to {Padding.__module__}.Padding; one is {_kind(value)}")
    return {_known_modes("padding", [mode])[0]: value for mode, value in padding.items()}


def _fields_by_mode(what: str, given: object, names: set[str]) -> dict[str, tuple[str, ...]]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} must map modes to fields; it is {_kind(given)}")
    found = {}
    for mode, listed in given.items():
        key = ANY_MODE if mode == ANY_MODE else _known_modes(what, [mode])[0].value
        found[key] = _known_fields(what, listed, names)
    return found


def _check_absent(found: Declarations, served: Sequence[ForwardMode]) -> None:
    """Raises ValueError for a field that no call could expect where it is declared absent: no run would need that."""
    for key, listed in found.absent.items():
        for name in listed:
            own = [own.modes for own in found.own_fields if own.name == name]
            if not any(
                fields.may_be_expected(name, mode) or any(ANY_MODE in by or mode.value in by for by in own)
                for mode in served
                if key in (ANY_MODE, mode.value)
            ):
                raise ValueError(f"absent: no call expects '{name}' in {_words(key)}; remove it")


def _words(key: str) -> str:
    return "any mode" if key == ANY_MODE else key


def _known_modes(what: str, modes: Any) -> tuple[ForwardMode, ...]:
    if isinstance(modes, str) or not isinstance(modes, Sequence | set | frozenset):
        raise ValueError(f"{what}: modes must be a list or tuple, not {_kind(modes)}")
    known = {mode.value: mode for mode in ForwardMode}
    for mode in modes:
        if mode not in known and mode not in known.values():
            raise ValueError(f"{what}: there is no mode {mode!r}; choose from {', '.join(known)}")
    return tuple(mode if isinstance(mode, ForwardMode) else known[mode] for mode in modes)


def _known_fields(what: str, listed: Any, names: set[str]) -> tuple[str, ...]:
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise ValueError(f"{what}: fields must be a list or tuple, not {_kind(listed)}")
    for name in listed:
        if name not in names:
            stem = str(name).removesuffix("_start_end")  # a pair of the contract, of which each half is a field
            halves = [f"'{half}'" for half in (f"{stem}_start", f"{stem}_end") if half in names]
            others = f"there are {' and '.join(halves)}" if halves else f"known are {', '.join(sorted(names))}"
            raise ValueError(f"{what}: there is no field '{name}'; {others}")
    return tuple(listed)


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"
