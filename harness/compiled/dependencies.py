"""What the code that Triton's front end makes of a kernel depends on, as a digest that is the same in every process.

That is the kernel, the device functions that it may call, and each value of a module that one of them names. Of a
function it is the text of its whole file, so that nothing depends on where a definition ends; of a value its type and
content. A kernel that uses anything else, such as a function of Python, has no digest: it is traced in each process.
"""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import inspect
import json
import linecache
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import ConstexprFunction

from nsa_oracle.harness.compiled import tracing

_BUILTINS = (
    "abs", "all", "any", "bool", "divmod", "enumerate", "float", "int", "isinstance", "len", "list", "max", "min",
    "pow", "print", "range", "reversed", "round", "set", "sorted", "str", "sum", "tuple", "zip",
)  # fmt: skip
"""Those whose result depends on their arguments alone."""

Chain = tuple[str, ...]
"""A name of a function's source, and the attributes that follow it there: ``tl.extra.cuda`` is three."""


class NotKnown(Exception):
    """What a kernel uses has no digest. The message says what it is."""


@dataclass
class Dependencies:
    """What a kernel depends on.

    digest: of everything, or "" if it has none. uses: (namespace, name, value), as of ``tracing.Traced``. files: of the
    functions, in an order that depends on the kernel alone. functions: their texts were ``lines`` of these files.
    """

    digest: str = ""
    uses: list[tuple[Mapping[str, Any], str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    functions: dict[Any, list[str]] = field(default_factory=dict)

    def is_current(self) -> bool:
        """Whether the names still have the same values, and the files the same text."""
        return tracing.are_current(self.uses) and all(
            _lines(function.fn) is of for function, of in self.functions.items()
        )

    def cover(self, traced: tracing.Traced) -> bool:
        """Whether all that the front end found is among them, and it read the text that was digested."""
        known = {(id(namespace), name) for namespace, name, _ in self.uses}
        return (
            all((id(namespace), name) in known for namespace, name, _ in traced.uses)
            and traced.functions <= {function.fn for function in self.functions}
            and all(tracing.has_read(function, lines) for function, lines in self.functions.items())
        )


def dependencies(function: InterpretedFunction) -> Dependencies:
    """What ``function``, a kernel, depends on."""
    walk = _Walk()
    try:
        with tracing.as_where_compiled():
            content = walk.function(function)
    except Exception:  # whatever it is, the kernel is traced
        return walk.found
    walk.found.digest = hashlib.sha256(json.dumps([content, walk.contents]).encode()).hexdigest()
    return walk.found


def value_digest(value: Any) -> Any:
    """A value of a kernel's module, or of a constant parameter, as JSON. Raises NotKnown."""
    if value is None or type(value) in (bool, int, str):
        return [type(value).__name__, value if type(value) is not int else str(value)]
    if type(value) is float:
        return ["float", value.hex()]
    if type(value) in (tuple, list):
        return [type(value).__name__, [value_digest(item) for item in value]]
    if type(value) is tl.constexpr:
        return ["constexpr", value_digest(value.value)]
    if type(value) is tl.dtype:
        return ["dtype", value.name]
    raise NotKnown(f"a value of type {type(value).__name__}")


class _Walk:
    """Follows what a kernel names. contents: of all functions that were found."""

    def __init__(self) -> None:
        self.found = Dependencies()
        self.contents: list[Any] = []
        self._numbers: dict[Any, int] = {}
        self._noted: set[tuple[int, str]] = set()

    def function(self, function: Any) -> Any:
        """A device function of its own is a number: its content is noted once, and it may call itself."""
        if function in self._numbers:
            return ["function", self._numbers[function]]
        plain = function.fn
        self._numbers[function] = number = len(self._numbers)
        options = function.rewriter.kwargs if type(function) is InterpretedFunction else {}
        lines, chains = _lines(plain), _chains(plain)
        self.found.functions[function] = lines
        file = plain.__code__.co_filename
        if file not in self.found.files:
            self.found.files.append(file)
        content: list[Any] = [
            type(function).__name__, number, self.found.files.index(file), _digest_of(tuple(lines)), plain.__qualname__,
            plain.__code__.co_firstlineno, str(inspect.signature(plain)),
            [[name, value_digest(value)] for name, value in sorted(options.items())],
            [value_digest(value) for value in plain.__defaults__ or ()],
            [[name, value_digest(value)] for name, value in sorted((plain.__kwdefaults__ or {}).items())],
        ]  # fmt: skip
        self.contents.append(content)
        cells = dict(zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True))
        for chain in chains:
            name = chain[0]
            if name in cells:
                content.append([chain, self._value(cells[name].cell_contents, {}, chain)])
            elif name in plain.__globals__:
                content.append([chain, self._named(plain.__globals__, chain)])
            elif name in vars(builtins) and name not in _BUILTINS:
                raise NotKnown(f"what {name} does")
        return ["function", number]

    def _named(self, namespace: Mapping[str, Any], chain: Chain) -> Any:
        value = namespace[chain[0]]
        if not isinstance(value, ModuleType) and (id(namespace), chain[0]) not in self._noted:
            self._noted.add((id(namespace), chain[0]))
            self.found.uses.append((namespace, chain[0], value))
        return self._value(value, namespace, chain)

    def _value(self, value: Any, namespace: Mapping[str, Any], chain: Chain) -> Any:
        value, chain = _from_triton(value, chain)
        if tracing.is_of_triton(value):
            return ["triton", value.__name__, getattr(value, "__module__", "")]
        if isinstance(value, ModuleType):
            if len(chain) < 2 or chain[1] not in vars(value):
                raise NotKnown(f"the module {value.__name__}")
            return ["module", self._named(vars(value), chain[1:])]
        if type(value) in (InterpretedFunction, ConstexprFunction):
            return self.function(value)
        return value_digest(tracing.constant_where_compiled(value, namespace, chain[0]))


def _from_triton(value: Any, chain: Chain) -> tuple[Any, Chain]:
    """Follow a chain through Triton's modules, as they are where kernels are compiled."""
    language = tracing.remember_language()
    while isinstance(value, ModuleType) and tracing.is_of_triton(value) and len(chain) > 1:
        members = language.get(value, vars(value))
        if chain[1] not in members:
            raise NotKnown(f"{value.__name__}.{chain[1]}")
        value, chain = members[chain[1]], chain[1:]
    return value, chain


def _lines(function: FunctionType) -> list[str]:
    """The lines of its file, as Triton reads them. The same list as before, unless the file has changed."""
    file = function.__code__.co_filename
    linecache.checkcache(file)
    lines = linecache.getlines(file, function.__globals__)
    if not lines:
        raise NotKnown(f"{file} cannot be read")
    return lines


def _chains(function: FunctionType) -> Sequence[Chain]:
    """What the source of a function names, sorted; without its own variables."""
    definition = _definitions(tuple(_lines(function))).get(function.__code__.co_firstlineno)
    if definition is None or definition.name != function.__name__:
        raise NotKnown(f"the source of {function.__name__}")
    if any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(definition)):
        raise NotKnown("what it imports")
    local = {*function.__code__.co_varnames, *function.__code__.co_cellvars}
    return sorted({chain for chain in _named_by(definition) if chain[0] not in local})


@functools.lru_cache(maxsize=256)
def _definitions(lines: tuple[str, ...]) -> dict[int, ast.FunctionDef]:
    """The functions of a file, by the line at which they begin, decorators included."""
    return {
        min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]): node
        for node in ast.walk(ast.parse("".join(lines)))
        if isinstance(node, ast.FunctionDef)
    }


@functools.lru_cache(maxsize=256)
def _digest_of(lines: tuple[str, ...]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _named_by(definition: ast.FunctionDef) -> Iterator[Chain]:
    """What its parameters and its body name; decorators have done their work."""
    for part in (definition.args, *definition.body, *filter(None, [definition.returns])):
        yield from _named_below(part)


def _named_below(node: ast.AST) -> Iterator[Chain]:
    attributes: list[str] = []
    below = node
    while isinstance(below, ast.Attribute):
        attributes.append(below.attr)
        below = below.value
    if isinstance(below, ast.Name):
        yield (below.id, *reversed(attributes))
        return
    for child in ast.iter_child_nodes(below):
        yield from _named_below(child)
