"""Writes the operations of a kernel as C, except for control flow and what combines elements of a tensor.

Scalars are C variables, tensors static arrays in row-major order. Operations that only rearrange elements (broadcast,
transpose, ...) are not computed: an element of their result is an element of their operand, found by its index.
Operations that compute each element by itself wait in a group of their shape, which becomes one loop as soon as
something outside the group needs one of its results, or has an effect that must not be overtaken.

Loads, stores and atomic operations are numbered: a *site* is one of them, with its line in the kernel's source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nsa_oracle.harness.compiled.ttir import Op, Region, Type, Unsupported, Value
from nsa_oracle.harness.compiled.writer import CodeWriter, flat

PROMISES = {"tt.divisibility": "DIVISIBILITY", "tt.contiguity": "CONTIGUITY"}
IGNORED = (
    "ttg.barrier", "gpu.barrier", "tt.grid_dependency_wait", "ttng.grid_dependency_wait", "llvm.intr.assume",
    "tt.grid_dependency_launch_dependents", "tt.reduce.return",
    "tt.scan.return",
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """An access, a promise or an assertion of the kernel. where: file and line. text: of an assertion."""

    what: str
    where: str
    text: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rules:
    """What writes C, by the name of an operation.

    views: an operation, its result, an index and what gives elements of operands, to the element at the index.
    elements: declares a variable that has the element of the result at an index.
    effects: what is done for each index, without a result.
    others: all that an operation does.
    """

    views: Mapping[str, Callable[[Op, Value, list[str], At], str]]
    elements: Mapping[str, Callable[[Emitter, Op, str, Sequence[str]], None]]
    effects: Mapping[str, Callable[[Emitter, Op, Sequence[str]], None]]
    others: Mapping[str, Rule]


class Emitter(CodeWriter):
    """The C of one kernel, while it is written. is_checked: whether accesses are checked and noted."""

    def __init__(self, rules: Rules, is_checked: bool) -> None:
        super().__init__()
        self._rules = rules
        self.names: dict[Value, str] = {}  # scalars: C variables; tensors: arrays
        self.local: dict[Value, str] = {}  # elements, in the loop of a group
        self._groups: dict[tuple[int, ...], list[Op]] = {}
        self._pending: dict[Value, tuple[int, ...]] = {}
        self.sites: list[Site] = []
        self.targets: dict[str, list[str]] = {}  # for each label: where the arguments of its block are
        self._is_checked = is_checked

    # Elements.

    def array(self, type_: Type) -> str:
        return self.static_array(type_.c, type_.size)

    def at(self, value: Value, index: Sequence[str]) -> str:
        """C for the element of ``value`` at ``index``; the index of a scalar is empty."""
        if value in self.local:
            return self.local[value]
        if value in self.names:
            name = self.names[value]
            return f"{name}[{flat(index, value.type.shape)}]" if value.type.shape else name
        return self._viewed(value, list(index))

    def _viewed(self, value: Value, index: list[str]) -> str:
        assert value.definition is not None
        return self._rules.views[value.definition.name](value.definition, value, index, self.at)

    def bases(self, value: Value) -> Iterator[Value]:
        """The values that ``value`` is a view of, itself if it is none."""
        if value in self.names or value.definition is None or value.definition.name not in self._rules.views:
            yield value
            return
        for operand in value.definition.operands:
            yield from self.bases(operand)

    def materialized(self, value: Value) -> str:
        """The array that holds a tensor."""
        self.need(value)
        if value not in self.names:
            self.names[value] = self.copy(value, self.array(value.type))
        return self.names[value]

    def copy(self, value: Value, array: str) -> str:
        """Fill ``array`` with the elements of a tensor, and return it."""
        with self.loops(value.type.shape) as index:
            self.line(f"{array}[{flat(index, value.type.shape)}] = {self.at(value, index)};")
        return array

    # Groups.

    def need(self, *values: Value) -> None:
        """Compute the groups that have something of the ``values``."""
        for value in values:
            for base in self.bases(value):
                if base in self._pending:
                    self._flush(self._pending[base])

    def flush_all(self) -> None:
        for shape in list(self._groups):
            self._flush(shape)

    def _wait(self, operation: Op) -> None:
        """Add an operation to the group of its shape."""
        shape = operation.results[0].type.shape if operation.results else operation.operands[0].type.shape
        for operand in operation.operands:
            if self._pending.get(operand) != shape:
                self.need(operand)
        self._groups.setdefault(shape, []).append(operation)
        for result in operation.results:
            self._pending[result] = shape

    def _flush(self, shape: tuple[int, ...]) -> None:
        group = self._groups.pop(shape, [])
        inside = set(group)
        for operation in group:
            for result in operation.results:
                del self._pending[result]
        kept: list[tuple[Value, str]] = []
        promised: list[tuple[Op, Value]] = []
        with self.loops(shape) as index:
            for operation in group:
                if operation.name in self._rules.effects:
                    self._rules.effects[operation.name](self, operation, index)
                    continue
                result = operation.result
                is_promised = _has_promise(operation)
                if is_promised:
                    promised.append((operation, result))
                leaves = is_promised or any(user not in inside for user in result.users)
                if not leaves and not result.users and operation.name != "tt.load":
                    continue
                name = self.name()
                self._rules.elements[operation.name](self, operation, name, index)
                self.local[result] = name
                if leaves:
                    kept.append((result, self.array(result.type)))
                    self.line(f"{kept[-1][1]}[{flat(index, shape)}] = {name};")
        self.local.clear()
        self.names.update(kept)
        for operation, result in promised:
            self.check_promises(operation, result)

    def declare(self, operation: Op, name: str, text: str) -> None:
        self.line(f"{operation.result.type.c} {name} = {text};")

    # Memory.

    def site(self, what: str, operation: Op, **more: object) -> int:
        self.sites.append(Site(what, operation.where, **more))  # type: ignore[arg-type]
        return len(self.sites) - 1

    def guard(self, call: str) -> None:
        """Leave the program if ``call``, which checks and notes an access, fails."""
        if self._is_checked:
            self.line(f"if (__builtin_expect({call}, 0)) return 1;")

    def _emit_effect(self, operation: Op) -> None:
        shape = operation.operands[0].type.shape
        for other in list(self._groups):
            if other != shape or any(waiting.name == "tt.load" for waiting in self._groups[other]):
                self._flush(other)
        self._wait(operation)
        self._flush(shape)

    def check_promises(self, operation: Op, value: Value) -> None:
        for name, kind in PROMISES.items():
            values = operation.integers(name)
            if not values or not value.type.is_pointer:
                continue
            shape = value.type.shape or (1,)
            site = self.site(name, operation, shape=shape)
            array = self.names[value] if value.type.shape else f"&{self.names[value]}"
            sizes, numbers = (f"(const int64_t[]){{{', '.join(map(str, given))}}}" for given in (shape, values))
            size = Type(value.type.pointee).bytes
            self.line(
                f"if (keeps(launch, {site}, {kind}, {array}, {len(shape)}, {sizes}, {numbers}, {size})) return 1;"
            )

    # Operations.

    def emit_block(self, block: Region) -> None:
        for operation in block.operations:
            self._emit(operation)

    def _emit(self, operation: Op) -> None:
        name, rules = operation.name, self._rules
        if name in rules.views:
            self._emit_view(operation)
        elif name in rules.effects:
            self._emit_effect(operation)
        elif name in rules.elements:
            if operation.result.type.shape:
                self._wait(operation)
            else:
                self._emit_scalar(operation)
        elif name in rules.others:
            rules.others[name](self, operation)
        elif name not in IGNORED:
            raise Unsupported(f"the operation {name}")

    def _emit_scalar(self, operation: Op) -> None:
        variable = self.name()
        self._rules.elements[operation.name](self, operation, variable, [])
        self.names[operation.result] = variable
        self.check_promises(operation, operation.result)

    def _emit_view(self, operation: Op) -> None:
        if any(not result.type.shape for result in operation.results):
            self.need(*operation.operands)
            variable = self.name()
            self.declare(operation, variable, self._viewed(operation.result, []))
            self.names[operation.result] = variable
        elif _has_promise(operation):
            self.materialized(operation.result)
        if _has_promise(operation):
            self.check_promises(operation, operation.result)


def _has_promise(operation: Op) -> bool:
    return operation.result.type.is_pointer and any(operation.integers(name) for name in PROMISES)


Rule = Callable[[Emitter, Op], None]
At = Callable[[Value, Sequence[str]], str]
