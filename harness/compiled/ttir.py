"""Reads the text of Triton's first intermediate code (TTIR) into operations, values and source lines.

Triton's Python bindings walk a module, but show few attributes, and the text has them all. Each operation is one line,
apart from its regions. Names are unique in a region and those around it, and may recur in another region, so each
definition becomes a ``Value`` of its own while the text is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_LOCATION = re.compile(r" loc\((#loc\d*|unknown)\)$")
_DEFINITION = re.compile(r"^(#loc\d*) = loc\((.*)\)$")
_FILE = re.compile(r'^"([^"]*)":(\d+):')
_RESULTS = re.compile(r"^(%[\w$.-]+(?::\d+)?(?:, %[\w$.-]+(?::\d+)?)*) = ")
_ARGUMENT = re.compile(r"(%[\w$.-]+): (.+?) loc\(")
_OPERATION = re.compile(r'^"?([a-z_]\w*\.[\w.]+)"?')


class Unsupported(Exception):
    """Code that this tier does not run. The message is one line and says what it is."""


C_TYPES = {
    "i1": "uint8_t", "i8": "uint8_t", "i16": "uint16_t", "i32": "uint32_t", "i64": "uint64_t", "index": "uint64_t",
    "f32": "float", "f64": "double", "bf16": "uint16_t", "f16": "uint16_t", "f8E4M3FN": "uint8_t", "f8E5M2": "uint8_t",
}  # fmt: skip
_IN_MEMORY = {
    "uint8_t": "u8m", "uint16_t": "u16m", "uint32_t": "u32m", "uint64_t": "u64m", "float": "f32m", "double": "f64m",
}  # fmt: skip
_BYTES = {"uint8_t": 1, "uint16_t": 2, "uint32_t": 4, "uint64_t": 8, "float": 4, "double": 8}


@dataclass(frozen=True)
class Type:
    """An element type as TTIR spells it (``i32``, ``f32``, ``!tt.ptr<i32>``, ...) and a shape, () for a scalar.

    In C an element is kept so: integers unsigned, so that they wrap around; booleans as 0 or 1; pointers as numbers;
    floats of 16 and 8 bits as their bits.
    """

    element: str
    shape: tuple[int, ...] = ()

    @property
    def c(self) -> str:
        """The C type of an element. Raises Unsupported if there is none."""
        if self.is_pointer:
            return "uint64_t"
        if self.element not in C_TYPES:
            raise Unsupported(f"numbers of type {self.element}")
        return C_TYPES[self.element]

    @property
    def memory(self) -> str:
        """The C type by which an element is loaded and stored."""
        return _IN_MEMORY[self.c]

    @property
    def bytes(self) -> int:
        return _BYTES[self.c]

    @property
    def is_pointer(self) -> bool:
        return self.element.startswith("!tt.ptr<")

    @property
    def pointee(self) -> str:
        """The element type that a pointer points to, without an address space."""
        return self.element.removeprefix("!tt.ptr<").removesuffix(">").split(",")[0]

    @property
    def size(self) -> int:
        """Number of elements."""
        product = 1
        for extent in self.shape:
            product *= extent
        return product

    def of(self, element: str) -> Type:
        return Type(element, self.shape)


class Value:
    """A result of an operation, or an argument of a block. users: the operations that have it as an operand."""

    def __init__(self, name: str, type_: Type) -> None:
        self.name = name
        self.type = type_
        self.users: list[Op] = []
        self.definition: Op | None = None

    def __repr__(self) -> str:
        return self.name


@dataclass(eq=False)
class Region:
    """Arguments and operations of a region. Only a kernel that returns early has several blocks: see ``_label``."""

    arguments: list[Value] = field(default_factory=list)
    operations: list[Op] = field(default_factory=list)


@dataclass(eq=False)
class Op:
    """One operation. text: behind its name, without location. where: file and line, or "" if it is not known."""

    name: str
    text: str
    where: str
    operands: list[Value] = field(default_factory=list)
    results: list[Value] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)

    @property
    def result(self) -> Value:
        return self.results[0]

    def integer(self, name: str, default: int | None = None) -> int:
        """The attribute ``name = number``."""
        found = re.search(rf"\b{name} = (-?\d+)", self.text)
        if found is None and default is None:
            raise Unsupported(f"{self.name} without {name}")
        return int(found[1]) if found else default or 0

    def integers(self, name: str) -> list[int]:
        """The numbers of an attribute that is an array or a dense constant, empty if it is absent."""
        found = re.search(rf"{re.escape(name)} = (?:array<i\d+: |dense<)\[?([-\d, ]*)\]?>", self.text)
        return [int(number) for number in found[1].split(",")] if found else []

    def word(self, name: str) -> str:
        """The attribute ``name = word``, or "" if it is absent. Quotes are left out."""
        found = re.search(rf'\b{name} = "?([\w.]+)', self.text)
        return found[1] if found else ""


@dataclass
class Kernel:
    """One function: a kernel whose device functions have been inlined. promises: attributes of its parameters."""

    name: str
    body: Region
    promises: list[str]

    def operations(self) -> Iterator[Op]:
        """All operations, those of regions included."""
        waiting = [self.body]
        while waiting:
            for operation in waiting.pop().operations:
                yield operation
                waiting += operation.regions


def parse(text: str) -> Kernel:
    """The kernel of a module. Raises Unsupported for what this tier does not run."""
    return _Reader(text).kernel()


def type_of(text: str) -> Type:
    """``tensor<4x8xf32>``, ``i32``, ``!tt.ptr<f32>`` or ``tensor<4x!tt.ptr<f32>>`` as a Type."""
    text = text.strip()
    if not text.startswith("tensor<"):
        return Type(text)
    inner = text[len("tensor<") : -1]
    found = re.match(r"((?:\d+x)*)(.+)$", inner)
    assert found is not None
    return Type(found[2], tuple(int(size) for size in found[1].split("x")[:-1]))


def split_types(text: str) -> list[str]:
    """Splits at the commas that are outside of all brackets."""
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        if letter in "<([{":
            depth += 1
        elif letter in ")]}" or (letter == ">" and text[place - 1] != "-"):
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    return [part for part in (*parts, text[begin:]) if part.strip()]


class _Reader:
    def __init__(self, text: str) -> None:
        self._lines = [line.strip() for line in text.splitlines() if line.strip()]
        self._locations = {found[1]: found[2] for line in self._lines if (found := _DEFINITION.match(line))}
        self._lines = [line for line in self._lines if not line.startswith("#")]
        self._next = 0
        self._scopes: list[dict[str, Value]] = [{}]

    def kernel(self) -> Kernel:
        while not self._lines[self._next].startswith("tt.func"):
            self._next += 1
        if sum(line.startswith("tt.func") for line in self._lines) > 1:
            raise Unsupported("a device function that is not inlined")
        header = self._lines[self._next]
        self._next += 1
        found = re.match(r"tt\.func (?:public |private )?@([\w.]+)\((.*)\)(?: attributes \{.*\})? \{$", header)
        if found is None:
            raise Unsupported("a kernel with results")
        arguments, promises = [], []
        for name, parameter in _ARGUMENT.findall(found[2]):
            type_text, _, attributes = parameter.partition(" {")
            arguments.append(self._define(name, type_of(type_text)))
            promises.append(attributes.removesuffix("}"))
        block = Region(arguments)
        self._read_block(block)
        return Kernel(found[1], block, promises)

    def _define(self, name: str, type_: Type) -> Value:
        value = Value(name, type_)
        self._scopes[-1][name] = value
        return value

    def _named(self, name: str) -> Value:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        raise Unsupported(f"the name {name} is used before it is defined")

    def _read_block(self, block: Region) -> str:
        """Read operations up to the line that closes the region, which is returned."""
        while True:
            line = self._lines[self._next]
            self._next += 1
            if line.startswith("}"):
                return line
            if line.startswith("^bb"):
                arguments = [self._define(name, type_of(of)) for name, of in _ARGUMENT.findall(line)]
                if not block.operations:
                    block.arguments += arguments
                elif len(self._scopes) > 1:
                    raise Unsupported("control flow between the blocks of a region")
                else:
                    block.operations.append(_label(line, arguments))
                continue
            block.operations.append(self._operation(line))

    def _region(self, arguments: list[tuple[str, Type]]) -> tuple[Region, str]:
        self._scopes.append({})
        block = Region([self._define(*argument) for argument in arguments])
        end = self._read_block(block)
        self._scopes.pop()
        return block, end

    def _where(self, location: str) -> str:
        """File and line of a location; of a call site, those in the function that was called."""
        text = self._locations.get(location, "")
        for _ in range(64):
            if found := _FILE.match(text):
                return f"{found[1]}:{found[2]}"
            following = re.search(r"#loc\d*", text)
            if following is None:
                return ""
            parts = [part for part in re.findall(r"#loc\d*", text) if self._locations.get(part, "unknown") != "unknown"]
            text = self._locations.get(parts[0], "") if parts else ""
        return ""

    def _operation(self, line: str) -> Op:
        found = _LOCATION.search(line)
        where = self._where(found[1]) if found else ""
        if found:
            line = line[: found.start()]
        names: list[str] = []
        if results := _RESULTS.match(line):
            for result in results[1].split(", "):
                name, _, count = result.partition(":")
                names += [f"{name}#{number}" for number in range(int(count))] if count else [name]
            line = line[results.end() :]
        named = _OPERATION.match(line)
        if named is None:
            raise Unsupported(f"the line {line!r}")
        operation = Op(named[1], line[named.end() :].strip(), where)
        types = self._regions(operation) if line.endswith("{") else _result_types(operation)
        if operation.name not in _WITH_NAMES_OF_THEIR_OWN:
            self._use(operation, STRING.sub("", operation.text))
        if len(names) != len(types):
            raise Unsupported(f"{operation.name} with {len(names)} results for {len(types)} types")
        operation.results = [self._define(*result) for result in zip(names, types, strict=True)]
        for value in operation.results:
            value.definition = operation
        return operation

    def _use(self, operation: Op, text: str) -> None:
        for name in NAME.findall(text):
            value = self._named(name)
            operation.operands.append(value)
            value.users.append(operation)

    def _regions(self, operation: Op) -> list[Type]:
        """Read the regions of an operation, and give it its operands. Returns the types of its results."""
        text = operation.text
        match operation.name:
            case "scf.for":
                return self._for(operation, text)
            case "scf.if":
                self._use(operation, text.partition("->")[0])
                block, end = self._region([])
                operation.regions.append(block)
                if end.startswith("} else {"):
                    operation.regions.append(self._region([])[0])
                return _types_behind_arrow(text)
            case "scf.while":
                pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)", text)
                self._use(operation, " ".join(value for _, value in pairs))
                signature = re.search(r" : (.*) \{$", text)
                types = (
                    [type_of(part) for part in split_types(signature[1].partition(" -> ")[0].strip("()"))]
                    if signature
                    else []
                )
                before, _ = self._region([(name, of) for (name, _), of in zip(pairs, types, strict=True)])
                after, _ = self._region([])
                operation.regions += [before, after]
                return _types_behind_arrow(text)
            case "tt.reduce" | "tt.scan":
                self._use(operation, text.partition(")")[0])
                block, end = self._region([])
                operation.regions.append(block)
                end = _LOCATION.sub("", end)
                return [type_of(part) for part in split_types(end.partition(" -> ")[2].strip("()"))]
        raise Unsupported(operation.name)

    def _for(self, operation: Op, text: str) -> list[Type]:
        found = re.match(r"(?:unsigned )?(%[\w$.-]+) = (\S+) to (\S+) step (\S+)(.*) \{$", text)
        if found is None or text.startswith("unsigned"):
            raise Unsupported("a loop over unsigned numbers")
        self._use(operation, " ".join(found.group(2, 3, 4)))
        counter = Type(found[5].rpartition(" : ")[2].strip() or "index")
        pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)", found[5])
        self._use(operation, " ".join(value for _, value in pairs))
        types = _types_behind_arrow(found[5].rpartition(" : ")[0]) if pairs else []
        arguments = [(found[1], counter), *((name, of) for (name, _), of in zip(pairs, types, strict=True))]
        operation.regions.append(self._region(arguments)[0])
        return types


_WITH_NAMES_OF_THEIR_OWN = ("scf.for", "scf.if", "scf.while", "tt.reduce", "tt.scan")


def _types_behind_arrow(text: str) -> list[Type]:
    _, arrow, types = text.rpartition("-> ")
    types = types.removesuffix("{").strip()
    return [type_of(part) for part in split_types(types.removeprefix("(").removesuffix(")"))] if arrow else []


def _result_types(operation: Op) -> list[Type]:
    """The types of the results of an operation without regions, from the types behind its last colon."""
    name, text = operation.name, STRING.sub('""', operation.text)
    if name in _WITHOUT_RESULT:
        return []
    if text in ("true", "false"):
        return [Type("i1")]
    types = re.sub(r"^.*(?: : |^: )", "", text)
    if name in ("tt.elementwise_inline_asm", "tt.extern_elementwise", "tt.split") or " -> " in types:
        made = [type_of(part) for part in split_types(types.rpartition("-> ")[2].strip("()"))]
        return made * 2 if name == "tt.split" and len(made) == 1 else made
    if " to " in types:
        return [type_of(types.rpartition(" to ")[2])]
    listed = [type_of(part) for part in split_types(types)]
    if name in ("arith.cmpi", "arith.cmpf"):
        return [listed[0].of("i1")]
    if name == "tt.load":
        return [listed[0].of(listed[0].pointee)]
    if name in ("arith.select", "tt.atomic_rmw"):
        return [listed[-1]] if name == "arith.select" else [listed[0].of(listed[0].pointee)]
    return [listed[0]]


def _label(line: str, arguments: list[Value]) -> Op:
    """Where another block of a kernel begins, as an operation whose results are the arguments of the block."""
    label = Op("cf.label", line[1 : re.search(r"[(:]", line).start()], "", results=arguments)  # type: ignore[union-attr]
    for value in arguments:
        value.definition = label
    return label


_WITHOUT_RESULT = (
    "cf.br", "cf.cond_br",
    "tt.store", "tt.return", "scf.yield", "scf.condition", "tt.reduce.return", "tt.scan.return", "ttg.barrier",
    "gpu.barrier", "tt.grid_dependency_wait", "ttng.grid_dependency_wait", "tt.assert", "tt.print", "llvm.intr.assume",
    "tt.grid_dependency_launch_dependents",
)  # fmt: skip
