"""Mutation operators: each finds places in a syntax tree and yields a small wrong change for each place.

Code that cannot matter by construction is not changed:

- annotations, decorators, docstrings and other strings: they compute nothing. Arguments of a Triton decorator only say
  which arguments of the kernel select compiled code;
- assertions, ``raise``, and the condition of an ``if`` that only raises: no engine passes such arguments;
- ``num_warps``, ``num_stages``, and numeric constants with upper-case names at the top level of a module that launches
  kernels: tile sizes and program counts, chosen by measurement;
- the second argument of a launch (``optimized.launch``), which names a compiled variant, and local variables that are
  only used for it;
- the arguments of hints to the compiler (``tl.multiple_of``), and whether a hint is given.
"""

from __future__ import annotations

import ast
import copy
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

Function = ast.FunctionDef | ast.AsyncFunctionDef
Change = tuple[str, ast.AST | str]
"""(name of the operator, replacement of the node as a node or as text)."""

_N = TypeVar("_N", bound=ast.AST)

BOUNDARIES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt
}  # fmt: skip
NEGATIONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
# The change of the right operand by one that, for integers, is not the same as shifting the boundary.
NEIGHBOURS: dict[type[ast.cmpop], int] = {ast.Lt: -1, ast.LtE: 1, ast.Gt: 1, ast.GtE: -1}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
}  # fmt: skip
BITWISE = (ast.BitAnd, ast.BitOr, ast.BitXor)  # mostly masks: each operand is dropped in turn
SHIFTED = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod)
OPPOSITES = {
    "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any",
}  # fmt: skip
LIMITS = {"min", "max", "minimum", "maximum"}
TEXTS = {"-inf": "inf", "inf": "-inf", "nan": "0"}  # arguments of float(...)
SYMMETRIC = {*OPPOSITES, "gcd", "is_dense", "is_wide", "zip", "fma"}  # in their first two arguments
TUNING_KEYWORDS = {"num_warps", "num_stages"}
HINTS = {"multiple_of", "max_contiguous"}
# Calls that raise at once if their arguments are swapped.
NOT_SWAPPED = {"load", "store", "arange", "zeros", "full", "cdiv", "isinstance", "getattr", "sum", "range", *HINTS}
CAPITALS = re.compile(r"_?[A-Z][A-Z0-9_]*")


@dataclass(frozen=True)
class Edit:
    """One change. operator: its name. node: the node that ``text`` replaces.

    statement: line of the statement that contains the node. at_import: whether it runs when the module is imported.
    """

    operator: str
    node: ast.expr | ast.stmt
    text: str
    statement: int
    at_import: bool

    def apply(self, source: str) -> str:
        """``source`` with this change and the same number of lines, so that line numbers in messages stay right."""
        lines = source.encode().splitlines(keepends=True)
        node = self.node
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        head = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
        tail = lines[node.end_lineno - 1][node.end_col_offset :] + b"".join(lines[node.end_lineno :])
        missing = "\n" * (node.end_lineno - node.lineno - self.text.count("\n"))
        is_statement = isinstance(node, ast.stmt)
        text = self.text + missing if is_statement else f"({self.text}{missing})"
        return (head + text.encode() + tail).decode()


def edits(source: str, launches: bool = True) -> list[Edit]:
    """Every change of a module, by line and column. launches: whether the module launches kernels and contains none."""
    walker = _Walker(ast.parse(source), launches)
    return sorted(walker.edits(), key=lambda edit: (edit.node.lineno, edit.node.col_offset))


class _Walker:
    """Applies every operator to every node of a module, and answers their questions about the context of a node."""

    def __init__(self, module: ast.Module, launches: bool) -> None:
        self.module = module
        self.launches = launches
        self.launchers = {
            target.id
            for statement in module.body
            if isinstance(statement, ast.Assign) and _called(statement.value) == "Launcher"
            for target in statement.targets
            if isinstance(target, ast.Name)
        }
        self.parents = {child: parent for parent in ast.walk(module) for child in ast.iter_child_nodes(parent)}
        variants = [a for n in ast.walk(module) if _called(n) in self.launchers for a in _arguments(n)[1:2]]
        self.in_variants = {name for variant in variants for name in _loads(variant)}

    def edits(self) -> Iterator[Edit]:
        yield from self._visit(self.module)

    def _visit(self, node: ast.AST) -> Iterator[Edit]:
        if self._is_skipped(node):
            return
        if isinstance(node, ast.expr | ast.stmt):
            for operator in OPERATORS:
                for name, new in operator(node, self):
                    yield self._edit(name, node, new)
        for child in ast.iter_child_nodes(node):
            yield from self._visit(child)

    def _edit(self, name: str, node: ast.expr | ast.stmt, new: ast.AST | str) -> Edit:
        statement = node if isinstance(node, ast.stmt) else self.statement(node)
        text = new if isinstance(new, str) else ast.unparse(new)
        return Edit(name, node, text, statement.lineno, self.function(node) is None)

    def _is_skipped(self, node: ast.AST) -> bool:
        """Whether ``node`` and everything below it is left unchanged, for the reasons at the top of this module."""
        parent = self.parents.get(node)
        match parent:
            case ast.FunctionDef() if node is parent.returns or node in parent.decorator_list:
                return True
            case ast.ClassDef() if node in parent.decorator_list or node in parent.bases:
                return True
            case ast.arg() | ast.AnnAssign() if node is parent.annotation:
                return True
            case ast.If() if node is parent.test and all(_cannot_matter(statement) for statement in parent.body):
                return True
            case ast.Call() if _called(parent) in self.launchers and node in parent.args[1:2]:
                return True
            case ast.Assign(targets=[ast.Name(id=name)]) if node is parent.value and self._is_for_variants(
                name, parent
            ):
                return True
            case ast.Call() if _called(parent) in HINTS and node in parent.args[1:]:
                return True
        match node:
            case ast.Assert() | ast.Raise() | ast.JoinedStr():
                return True
            case ast.keyword(arg=str(name)):
                return name in TUNING_KEYWORDS
            case ast.Assign(targets=[ast.Name(id=name)]) if not _cannot_matter(node):
                return self.launches and parent is self.module and bool(CAPITALS.fullmatch(name)) and _is_number(node)
        return False

    def _is_for_variants(self, name: str, assignment: ast.Assign) -> bool:
        """Whether the local ``name`` is read only in the second argument of launches."""
        function = self.function(assignment)
        if function is None:
            return False
        reads = [node for node in _loads(function) if node.id == name]
        return bool(reads) and self.in_variants.issuperset(reads)

    # The context of a node.

    def function(self, node: ast.AST) -> Function | None:
        """The function whose body contains ``node``; None for code that runs at import, such as a default value."""
        child, parent = node, self.parents.get(node)
        while parent is not None:
            if isinstance(parent, Function) and child in parent.body:
                return parent
            child, parent = parent, self.parents.get(parent)
        return None

    def statement(self, node: ast.AST) -> ast.stmt:
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    def bound_before(self, name: str, node: ast.stmt) -> bool:
        """Whether ``name`` is a parameter or is assigned on a line before ``node``."""
        function = self.function(node)
        if function is None:
            return False
        if name in _parameters(function):
            return True
        stores = (n for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        return any(n.id == name and n.lineno < node.lineno for n in stores)


# Operators. Each yields the replacements of a node.


def _comparisons(node: ast.AST, walker: _Walker) -> Iterator[Change]:
    if not isinstance(node, ast.Compare):
        return
    for number, op in enumerate(node.ops):
        for name, table in (("boundary-shifted", BOUNDARIES), ("comparison-negated", NEGATIONS)):
            if type(op) in table:
                changed = _copied(node)
                changed.ops[number] = table[type(op)]()
                yield name, changed
        if type(op) in NEIGHBOURS:
            changed = _copied(node)
            by = NEIGHBOURS[type(op)]
            changed.comparators[number] = _plus(node.comparators[number], by)
            yield f"operand{_sign(by)}", changed


def _constants(node: ast.AST, walker: _Walker) -> Iterator[Change]:
    if not isinstance(node, ast.Constant):
        return
    parent = walker.parents[node]
    match node.value:
        case bool():
            yield "boolean-flipped", ast.Constant(not node.value)
        case int():
            if isinstance(parent, ast.Compare) and any(type(op) in NEIGHBOURS for op in parent.ops):
                return  # see ``_comparisons``
            for by in (1, -1):
                yield f"constant{_sign(by)}", ast.Constant(node.value + by)
        case float():
            yield "constant+1", ast.Constant(node.value + 1)
        case str(text) if _called(parent) == "float" and text in TEXTS:
            yield "infinity-changed", ast.Constant(TEXTS[text])


def _arithmetic(node: ast.AST, walker: _Walker) -> Iterator[Change]:
    match node:
        case ast.AugAssign():
            yield "operator-swapped", ast.AugAssign(node.target, ARITHMETIC[type(node.op)](), node.value)
        case ast.BinOp():
            yield "operator-swapped", ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
            yield "right-operand-dropped", node.left
            if isinstance(node.op, BITWISE):
                yield "left-operand-dropped", node.right
            if isinstance(node.op, SHIFTED) and not isinstance(node.right, ast.Constant):
                yield "operand+1", ast.BinOp(node.left, node.op, _plus(node.right, 1))
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "sign-dropped" if isinstance(node.op, ast.USub) else "not-dropped", node.operand


def _booleans(node: ast.AST, walker: _Walker) -> Iterator[Change]:
    if not isinstance(node, ast.BoolOp):
        return
    changed = _copied(node)
    changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    yield "and-or-swapped", changed
    for number in range(len(node.values)):
        changed = _copied(node)
        del changed.values[number]
        yield "condition-dropped", changed if len(changed.values) > 1 else changed.values[0]


def _choices(node: ast.AST, walker: _Walker) -> Iterator[Change]:
    match node:
        case ast.IfExp():
            yield "choice-first", node.body
            yield "choice-second", node.orelse
        case ast.Call() if _called(node) == "where":
            for name, op, value in (("choice-first", ast.BitOr(), True), ("choice-second", ast.BitAnd(), False)):
                changed = _copied(node)
                changed.args[0] = ast.BinOp(node.args[0], op, ast.Constant(value))  # keeps the shape
                yield name, changed


def _guards(node: ast.AST, walker: _Walker) -> Iterator[Change]:
    parent = walker.parents.get(node)
    if isinstance(parent, ast.If | ast.While) and node is parent.test:
        if isinstance(parent, ast.If):
            yield "guard-true", ast.Constant(True)
        yield "guard-false", ast.Constant(False)


def _calls(node: ast.AST, walker: _Walker) -> Iterator[Change]:
    if not isinstance(node, ast.Call):
        return
    name = _called(node)
    if name in OPPOSITES:
        changed = _copied(node)
        if isinstance(changed.func, ast.Attribute):
            changed.func.attr = OPPOSITES[name]
        elif isinstance(changed.func, ast.Name):
            changed.func.id = OPPOSITES[name]
        yield "min-max-swapped", changed
        if len(node.args) == 2 and name in LIMITS and not _is_reduction(node):
            for change, argument in zip(("limit-dropped", "limit-alone"), node.args, strict=True):
                if not isinstance(argument, ast.Starred):
                    yield change, argument
    if name in ("clamp", "clamp_") and isinstance(node.func, ast.Attribute):
        changed = _copied(node)
        for keyword in changed.keywords:
            keyword.arg = OPPOSITES[keyword.arg or ""]
        yield "min-max-swapped", changed
        yield "limit-dropped", node.func.value
    if name == "to" and isinstance(node.func, ast.Attribute):
        yield "cast-dropped", node.func.value
    if name == "cumsum":
        yield "sum-dropped", node.args[0]
    if any(keyword.arg == "mask" for keyword in node.keywords):
        changed = _copied(node)
        changed.keywords = [keyword for keyword in node.keywords if keyword.arg not in ("mask", "other")]
        yield "mask-dropped", changed


def _ranges(node: ast.AST, walker: _Walker) -> Iterator[Change]:
    match node:
        case ast.Call(func=ast.Name(id="range"), args=args):
            end = 0 if len(args) == 1 else 1
            for name, number, by in (("range-end", end, -1), ("range-end", end, 1), ("range-begin", 0, 1)):
                if isinstance(args[number], ast.Constant) or (name == "range-begin" and not end):
                    continue
                changed = _copied(node)
                changed.args[number] = _plus(args[number], by)
                yield f"{name}{_sign(by)}", changed
        case ast.Subscript(slice=ast.Slice() as part):
            for name in ("lower", "upper"):
                bound = getattr(part, name)
                if bound is None or isinstance(bound, ast.Constant):
                    continue
                for by in (1, -1):
                    shifted = _copied(part)
                    setattr(shifted, name, _plus(bound, by))
                    yield f"slice-{name}{_sign(by)}", ast.Subscript(node.value, shifted, node.ctx)


def _swaps(node: ast.AST, walker: _Walker) -> Iterator[Change]:
    match node:
        case ast.Tuple(ctx=ast.Load(), elts=elements) if not isinstance(walker.parents[node], ast.Subscript):
            for number in _pairs(elements):
                changed = _copied(node)
                changed.elts[number : number + 2] = elements[number + 1], elements[number]
                yield "entries-swapped", changed
        case ast.Dict(values=values):
            for number in _pairs(values):
                swapped = _copied(node)
                swapped.values[number : number + 2] = values[number + 1], values[number]
                yield "entries-swapped", swapped
        case ast.Call(args=args) if _called(node) not in NOT_SWAPPED:
            first = 2 if _called(node) in walker.launchers else 1 if _called(node) in {"where", *SYMMETRIC} else 0
            for number in _pairs(args):
                if number >= first:
                    call = _copied(node)
                    call.args[number : number + 2] = args[number + 1], args[number]
                    yield "arguments-swapped", call
        case ast.Name(ctx=ast.Load(), id=name) if "stride" in name:
            function = walker.function(node)
            strides = [p for p in _parameters(function) if "stride" in p] if function is not None else []
            if name in strides and len(strides) > 1:
                yield "stride-swapped", ast.Name(strides[(strides.index(name) + 1) % len(strides)])


def _statements(node: ast.AST, walker: _Walker) -> Iterator[Change]:
    match node:
        case ast.Expr(value=ast.Call() as call):
            known = {"store", "debug_barrier", "atomic_add"}
            name = _called(call) if _called(call) in known else "statement"
            yield f"{name}-dropped", "pass"
        case ast.Assign(targets=targets):
            names = [n for target in targets for n in ast.walk(target)]
            stored = [n.id for n in names if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
            function = walker.function(node)
            sets_up = function is None or function.name in ("__init__", "__post_init__")
            if not sets_up and not _cannot_matter(node) and all(walker.bound_before(name, node) for name in stored):
                yield "statement-dropped", "pass"
        case ast.AugAssign():
            yield "statement-dropped", "pass"
        case ast.If() | ast.For() | ast.While() | ast.With():
            function = walker.function(node)
            if function is not None and node in function.body[1:] and not _returns_a_value(function):
                yield "early-return", "return"


OPERATORS: tuple[Callable[[ast.AST, _Walker], Iterator[Change]], ...] = (
    *(_comparisons, _constants, _arithmetic, _booleans, _choices, _guards),
    *(_calls, _ranges, _swaps, _statements),
)


def _copied(node: _N) -> _N:
    """A copy whose fields, and the items of its lists, can be changed; nodes further down are shared."""
    new = copy.copy(node)
    for name, value in ast.iter_fields(node):
        if isinstance(value, list):
            setattr(new, name, [copy.copy(item) for item in value])
        elif isinstance(value, ast.AST):
            setattr(new, name, copy.copy(value))
    return new


def _called(node: ast.AST | None) -> str:
    """The last part of the name that ``node`` calls; empty if it is no such call."""
    match node:
        case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
            return name
    return ""


def _arguments(node: ast.AST) -> list[ast.expr]:
    return node.args if isinstance(node, ast.Call) else []


def _loads(node: ast.AST) -> list[ast.Name]:
    return [n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]


def _plus(node: ast.expr, by: int) -> ast.expr:
    return ast.BinOp(node, ast.Add() if by > 0 else ast.Sub(), ast.Constant(abs(by)))


def _sign(by: int) -> str:
    return f"{by:+d}"


def _pairs(nodes: list[ast.expr]) -> Iterator[int]:
    """Indices of the nodes that differ from the next node. Starred nodes are excluded: they have no fixed position."""
    for number, pair in enumerate(itertools.pairwise(nodes)):
        if not any(isinstance(node, ast.Starred) for node in pair) and len({ast.unparse(node) for node in pair}) == 2:
            yield number


def _is_reduction(node: ast.Call) -> bool:
    """Whether the second argument of ``min`` or ``max`` is an axis, as in ``tl.max(x, 1)``."""
    return isinstance(node.func, ast.Attribute) and node.func.attr in ("min", "max")


def _is_number(node: ast.Assign) -> bool:
    return all(isinstance(n, ast.Constant | ast.Dict | ast.BinOp | ast.operator) for n in ast.walk(node.value))


def _cannot_matter(statement: ast.stmt) -> bool:
    """Whether ``statement`` is a ``raise`` or a hint to the compiler."""
    return isinstance(statement, ast.Raise) or (isinstance(statement, ast.Assign) and _called(statement.value) in HINTS)


def _parameters(function: Function) -> list[str]:
    return [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]


def _returns_a_value(function: Function) -> bool:
    return any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(function))
