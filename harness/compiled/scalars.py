"""C expressions for the operations of TTIR that compute each element by itself.

Floats of 16 and 8 bits are kept as their bits, which are widened to float, computed with, and rounded to nearest even.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from nsa_oracle.harness.compiled.ttir import STRING, Op, Type, Unsupported

INTEGERS = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "index": 64}
NARROW = ("bf16", "f16", "f8E4M3FN", "f8E5M2")


def widened(text: str, element: str) -> str:
    """A float as C's float or double."""
    return f"widen_{element}({text})" if element in NARROW else text


def narrowed(text: str, element: str) -> str:
    return f"narrow_{element}({text})" if element in NARROW else text


def signed(text: str, element: str) -> str:
    """An integer as C's signed integer of its width."""
    bits = INTEGERS[element]
    return f"(-(int8_t)({text}))" if bits == 1 else f"((int{bits}_t)({text}))"


def _wrapped(text: str, element: str) -> str:
    return f"(({text}) & 1)" if element == "i1" else f"(({Type(element).c})({text}))"


_Rule = Callable[[Op, Sequence[str]], str]


def _element(operation: Op) -> str:
    return operation.result.type.element


def _from(operation: Op) -> str:
    return operation.operands[0].type.element


def _integer(template: str) -> _Rule:
    """An operation on unsigned numbers; ``{0}`` and ``{1}`` are the operands."""

    def rule(operation: Op, operands: Sequence[str]) -> str:
        return _wrapped(template.format(*operands), _element(operation))

    return rule


def _helper(name: str, signs: str) -> _Rule:
    """A function of the runtime for each width. signs: ``s`` or ``u`` for each operand."""

    def rule(operation: Op, operands: Sequence[str]) -> str:
        element = _element(operation)
        if element == "i1":
            raise Unsupported(f"{operation.name} of booleans")
        given = [signed(x, element) if sign == "s" else x for x, sign in zip(operands, signs, strict=True)]
        return f"{name}{INTEGERS[element]}({', '.join(given)})"

    return rule


def _extreme(comparison: str, is_signed: bool) -> _Rule:
    def rule(operation: Op, operands: Sequence[str]) -> str:
        a, b = operands
        one, other = (signed(a, _element(operation)), signed(b, _element(operation))) if is_signed else (a, b)
        return f"({one} {comparison} {other} ? {a} : {b})"

    return rule


def _float(template: str) -> _Rule:
    """An operation on floats. ``{f}``: the ending of the C library's functions; ``{d}``: of the runtime's."""

    def rule(operation: Op, operands: Sequence[str]) -> str:
        element = _element(operation)
        wide = [widened(text, element) for text in operands]
        is_double = element == "f64"
        return narrowed(template.format(*wide, f="" if is_double else "f", d="_f64" if is_double else ""), element)

    return rule


_SIGNED = {"slt": "<", "sle": "<=", "sgt": ">", "sge": ">="}
_UNSIGNED = {"ult": "<", "ule": "<=", "ugt": ">", "uge": ">=", "eq": "==", "ne": "!="}


def _compare_integers(operation: Op, operands: Sequence[str]) -> str:
    a, b = operands
    predicate, element = operation.text.partition(",")[0], _from(operation)
    if predicate in _SIGNED:
        return f"({signed(a, element)} {_SIGNED[predicate]} {signed(b, element)})"
    return f"({a} {_UNSIGNED[predicate]} {b})"


_FLOAT_PREDICATES = {
    "oeq": "{0} == {1}", "ogt": "{0} > {1}", "oge": "{0} >= {1}", "olt": "{0} < {1}", "ole": "{0} <= {1}",
    "one": "{0} < {1} || {0} > {1}", "ord": "{0} == {0} && {1} == {1}", "ueq": "!({0} < {1} || {0} > {1})",
    "ugt": "!({0} <= {1})", "uge": "!({0} < {1})", "ult": "!({0} >= {1})", "ule": "!({0} > {1})", "une": "{0} != {1}",
    "uno": "{0} != {0} || {1} != {1}",
}  # fmt: skip


def _compare_floats(operation: Op, operands: Sequence[str]) -> str:
    predicate = re.sub(r" fastmath<\w+>", "", operation.text.partition(",")[0])
    return f"({_FLOAT_PREDICATES[predicate].format(*(widened(x, _from(operation)) for x in operands))})"


def _select(operation: Op, operands: Sequence[str]) -> str:
    condition, a, b = operands
    return f"({condition} ? {a} : {b})"


def _extend_sign(operation: Op, operands: Sequence[str]) -> str:
    return _wrapped(signed(operands[0], _from(operation)), _element(operation))


def _cast(operation: Op, operands: Sequence[str]) -> str:
    return _wrapped(operands[0], _element(operation))


def _to_float(is_signed: bool) -> _Rule:
    def rule(operation: Op, operands: Sequence[str]) -> str:
        number = signed(operands[0], _from(operation)) if is_signed else operands[0]
        element = _element(operation)
        return narrowed(f"(({'double' if element == 'f64' else 'float'}){number})", element)

    return rule


def _to_integer(is_signed: bool) -> _Rule:
    """Towards zero. What does not fit saturates, and NaN gives 0, as on a GPU."""

    def rule(operation: Op, operands: Sequence[str]) -> str:
        number, bits = widened(operands[0], _from(operation)), INTEGERS[_element(operation)]
        if is_signed:
            least, most = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - (bits < 64)
            text = f"whole({number}, {least.hex()}, {most.hex()})"
        else:
            text = f"natural({number}, {(2.0**bits - (bits < 64)).hex()})"
        return _wrapped(text, _element(operation))

    return rule


def _convert(operation: Op, operands: Sequence[str]) -> str:
    """Between floats, to nearest even."""
    if operation.word("rounding") not in ("", "rtne"):
        raise Unsupported(f"rounding {operation.word('rounding')}")
    source, target = _from(operation), _element(operation)
    wide = widened(operands[0], source)
    if target in NARROW and source == "f64":
        raise Unsupported(f"a conversion of f64 to {target}")
    return narrowed(wide, target) if target in NARROW else f"(({Type(target).c}){wide})"


def _bitcast(operation: Op, operands: Sequence[str]) -> str:
    source, target = operation.operands[0].type.c, operation.result.type.c
    if source == target:
        return operands[0]
    named = {"float": "bits_of({})", "double": "bits_of_f64({})"}.get(source, "{}").format(operands[0])
    return {"float": "f32_of({})", "double": "f64_of({})"}.get(target, "{}").format(named)


def _add_pointer(operation: Op, operands: Sequence[str]) -> str:
    pointer, offset = operands
    element = operation.operands[1].type.element
    size = Type(operation.result.type.pointee).bytes
    return f"({pointer} + (uint64_t)((int64_t){signed(offset, element)} * {size}))"


_SYMBOLS = {  # of libdevice; those that the C library computes as accurately or better
    f"__nv_{name}f": f"{name}f({', '.join(f'{{{number}}}' for number in range(count))})"
    for name, count in {
        "log": 1, "log2": 1, "log10": 1, "log1p": 1, "exp": 1, "exp2": 1, "exp10": 1, "expm1": 1, "sin": 1, "cos": 1,
        "tan": 1, "tanh": 1, "sinh": 1, "cosh": 1, "asin": 1, "acos": 1, "atan": 1, "erf": 1, "erfc": 1, "sqrt": 1,
        "cbrt": 1, "floor": 1, "ceil": 1, "trunc": 1, "round": 1, "rint": 1, "fabs": 1, "pow": 2, "fmod": 2,
        "atan2": 2, "fma": 3, "copysign": 2,
    }.items()
} | {"__nv_rsqrtf": "(1.0f / sqrtf({0}))"}  # fmt: skip


def _extern(operation: Op, operands: Sequence[str]) -> str:
    symbol = operation.word("symbol")
    if symbol not in _SYMBOLS or _element(operation) != "f32":
        raise Unsupported(f"the function {symbol} of a library")
    return _SYMBOLS[symbol].format(*operands)


_PTX_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


def _inline_asm(operation: Op, operands: Sequence[str]) -> str:
    quoted = STRING.search(operation.text)
    asm = " ".join(quoted[1].replace("\\0A", " ").split()) if quoted else ""
    found = re.fullmatch(r"set\.(\w+)\.f32\.f32 \$0, \$1, \$2;", asm)
    if found is None or found[1] not in _PTX_COMPARISONS or operation.integer("packed_element") != 1:
        raise Unsupported(f"the inline assembly {asm!r}")
    if found[1] == "ne":  # of an ordered comparison, which is false for NaN
        return f"({operands[0]} < {operands[1]} || {operands[0]} > {operands[1]} ? 1.0f : 0.0f)"
    return f"({operands[0]} {_PTX_COMPARISONS[found[1]]} {operands[1]} ? 1.0f : 0.0f)"


def _high_product(operation: Op, operands: Sequence[str]) -> str:
    bits = INTEGERS[_element(operation)]
    wide = "unsigned __int128" if bits == 64 else "uint64_t"
    return f"((uint{bits}_t)((({wide}){operands[0]} * {operands[1]}) >> {bits}))"


def _clamp(operation: Op, operands: Sequence[str]) -> str:
    if _element(operation) != "f32":
        raise Unsupported("tt.clampf of another type than f32")
    x, least, most = operands
    if operation.word("propagateNan") == "all":
        return f"minimum(maximum({x}, {least}), {most})"
    return f"minnum(maxnum({x}, {least}), {most})"


def _absolute(operation: Op, operands: Sequence[str]) -> str:
    number = signed(operands[0], _element(operation))
    return _wrapped(f"{number} < 0 ? 0 - {operands[0]} : {operands[0]}", _element(operation))


def _mathematical(name: str) -> _Rule:
    return _float(f"{name}{{f}}({{0}})")


TABLE: dict[str, _Rule] = {
    "arith.addi": _integer("{0} + {1}"),
    "arith.subi": _integer("{0} - {1}"),
    "arith.muli": _integer("{0} * {1}"),
    "arith.andi": _integer("{0} & {1}"),
    "arith.ori": _integer("{0} | {1}"),
    "arith.xori": _integer("{0} ^ {1}"),
    "arith.divsi": _helper("divs", "ss"),
    "arith.remsi": _helper("rems", "ss"),
    "arith.divui": _helper("divu", "uu"),
    "arith.remui": _helper("remu", "uu"),
    "arith.shli": _helper("shl", "uu"),
    "arith.shrsi": _helper("shrs", "su"),
    "arith.shrui": _helper("shru", "uu"),
    "arith.maxsi": _extreme(">", True),
    "arith.minsi": _extreme("<", True),
    "arith.maxui": _extreme(">", False),
    "arith.minui": _extreme("<", False),
    "arith.cmpi": _compare_integers,
    "arith.cmpf": _compare_floats,
    "arith.select": _select,
    "arith.extsi": _extend_sign,
    "arith.extui": _cast,
    "arith.trunci": _cast,
    "arith.index_cast": _extend_sign,
    "arith.extf": _convert,
    "arith.truncf": _convert,
    "tt.fp_to_fp": _convert,
    "arith.sitofp": _to_float(True),
    "arith.uitofp": _to_float(False),
    "arith.fptosi": _to_integer(True),
    "arith.fptoui": _to_integer(False),
    "arith.bitcast": _bitcast,
    "tt.bitcast": _bitcast,
    "tt.ptr_to_int": _bitcast,
    "tt.int_to_ptr": _bitcast,
    "tt.addptr": _add_pointer,
    "arith.addf": _float("({0} + {1})"),
    "arith.subf": _float("({0} - {1})"),
    "arith.mulf": _float("({0} * {1})"),
    "arith.divf": _float("({0} / {1})"),
    "arith.remf": _float("fmod{f}({0}, {1})"),
    "arith.negf": _float("(-{0})"),
    "arith.maxnumf": _float("maxnum{d}({0}, {1})"),
    "arith.minnumf": _float("minnum{d}({0}, {1})"),
    "arith.maximumf": _float("maximum{d}({0}, {1})"),
    "arith.minimumf": _float("minimum{d}({0}, {1})"),
    "math.fma": _float("fma{f}({0}, {1}, {2})"),
    "math.absf": _mathematical("fabs"),
    "math.absi": _absolute,
    "math.rsqrt": _float("(1 / sqrt{f}({0}))"),
    **{
        f"math.{name}": _mathematical(name)
        for name in ("exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "floor", "ceil", "erf", "tanh", "trunc")
    },
    "tt.precise_sqrt": _mathematical("sqrt"),
    "tt.precise_divf": _float("({0} / {1})"),
    "tt.mulhiui": _high_product,
    "tt.clampf": _clamp,
    "tt.extern_elementwise": _extern,
    "tt.elementwise_inline_asm": _inline_asm,
}
