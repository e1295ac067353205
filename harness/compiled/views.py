"""Operations whose result has elements of their operands, in other places: an element is found by its index.

Constants and ranges are among them: their elements follow from the index alone.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from nsa_oracle.harness.compiled.ttir import Op, Type, Unsupported, Value

_NARROW = {
    "bf16": torch.bfloat16, "f16": torch.float16, "f8E4M3FN": torch.float8_e4m3fn, "f8E5M2": torch.float8_e5m2,
}  # fmt: skip
_At = Callable[[Value, Sequence[str]], str]
Index = list[str]


def bases(value: Value, names: Collection[Value]) -> Iterator[Value]:
    """The values that ``value`` is a view of, itself if it is none. names: those that have a C name already."""
    if value in names or value.definition is None or value.definition.name not in VIEWS:
        yield value
        return
    for operand in value.definition.operands:
        yield from bases(operand, names)


def element(value: Value, index: Index, at: _At) -> str:
    """C for the element of a view at ``index``. at: gives that of an operand."""
    assert value.definition is not None
    return VIEWS[value.definition.name](value.definition, value, index, at)


def _constant(operation: Op, value: Value, index: Index, at: _At) -> str:
    return _constant_text(operation)


def _poison(operation: Op, value: Value, index: Index, at: _At) -> str:
    return "0"


def _splat(operation: Op, value: Value, index: Index, at: _At) -> str:
    return at(operation.operands[0], [])


def _unsplat(operation: Op, value: Value, index: Index, at: _At) -> str:
    return at(operation.operands[0], ["0"] * len(operation.operands[0].type.shape))


def _range(operation: Op, value: Value, index: Index, at: _At) -> str:
    return f"(uint32_t)({index[0]} + {operation.integer('start')})"


def _expand(operation: Op, value: Value, index: Index, at: _At) -> str:
    axis = operation.integer("axis")
    return at(operation.operands[0], index[:axis] + index[axis + 1 :])


def _broadcast(operation: Op, value: Value, index: Index, at: _At) -> str:
    source = operation.operands[0]
    return at(source, [name if size > 1 else "0" for name, size in zip(index, source.type.shape, strict=True)])


def _transpose(operation: Op, value: Value, index: Index, at: _At) -> str:
    order = operation.integers("order")
    places = ["0"] * len(order)
    for name, dim in zip(index, order, strict=True):
        places[dim] = name
    return at(operation.operands[0], places)


def _reshape(operation: Op, value: Value, index: Index, at: _At) -> str:
    source = operation.operands[0]
    return at(source, reshaped(index, value.type, source.type))


def reshaped(index: Sequence[str], of: Type, to: Type) -> Index:
    """The index in a tensor of type ``to`` of the element that has ``index`` in one of type ``of``."""
    long = [(name, size) for name, size in zip(index, of.shape, strict=True) if size > 1]
    if [size for _, size in long] == [size for size in to.shape if size > 1]:
        names = iter(long)
        return [next(names)[0] if size > 1 else "0" for size in to.shape]
    terms, stride = [], 1
    for name, size in reversed(list(zip(index, of.shape, strict=True))):
        if name != "0":
            terms.append(f"({name}) * {stride}")
        stride *= size
    place, stride, found = f"({' + '.join(terms) or '0'})", to.size, []
    for dim, size in enumerate(to.shape):
        stride //= size
        quotient = f"{place} / {stride}" if stride > 1 else place
        found.append("0" if size == 1 else f"{quotient} % {size}" if dim else quotient)
    return found


def _join(operation: Op, value: Value, index: Index, at: _At) -> str:
    first, second = (at(operand, index[:-1]) for operand in operation.operands)
    return f"({index[-1]} ? {second} : {first})"


def _split(operation: Op, value: Value, index: Index, at: _At) -> str:
    return at(operation.operands[0], [*index, str(operation.results.index(value))])


def _concatenate(operation: Op, value: Value, index: Index, at: _At) -> str:
    first, second = operation.operands
    length = first.type.shape[0]
    # The index of the side that is not chosen is kept within its tensor.
    low = at(first, [f"({index[0]}) % {length}", *index[1:]])
    high = at(second, [f"({index[0]}) % {length}", *index[1:]])
    return f"(({index[0]}) < {length} ? {low} : {high})"


def _constant_text(operation: Op) -> str:
    """The C literal of ``arith.constant``: a number, or a tensor of one number."""
    text = re.sub(r"^\{[^}]*\} ", "", operation.text).rpartition(" : ")[0] or operation.text
    found = re.fullmatch(r"dense<([^\[\"]*)>", text)
    number, element = (found[1] if found else text), operation.result.type.element
    if number in ("true", "false"):
        return str(int(number == "true"))
    if element[0] == "i" and re.fullmatch(r"-?\d+", number):
        return f"({operation.result.type.c}){int(number) % (1 << int(element[1:]))}u" + "ll" * (int(element[1:]) == 64)
    if re.fullmatch(r"0x[0-9A-F]+|-?\d+(\.\d+)?([eE][-+]?\d+)?", number):
        return literal(number, element)
    raise Unsupported("a constant tensor of several numbers")


def literal(number: str, element: str) -> str:
    """A float as C: ``number`` is decimal, or the bits of the type in hexadecimal."""
    if element in _NARROW:
        bits = int(number, 16) if number.startswith("0x") else _narrow_bits(float(number), element)
        return f"({Type(element).c}){bits}"
    if element == "f32":
        bits = int(number, 16) if number.startswith("0x") else struct.unpack("<I", struct.pack("<f", float(number)))[0]
        return f"f32_of({bits:#x}u)"
    if element == "f64":
        bits = int(number, 16) if number.startswith("0x") else struct.unpack("<Q", struct.pack("<d", float(number)))[0]
        return f"f64_of({bits:#x}ull)"
    raise Unsupported(f"a constant of type {element}")


def _narrow_bits(number: float, element: str) -> int:
    bits = torch.tensor(number).to(_NARROW[element])
    return int(bits.view(torch.uint8 if bits.element_size() == 1 else torch.int16).item()) & 0xFFFF


VIEWS: dict[str, Callable[[Op, Value, Index, _At], str]] = {
    "arith.constant": _constant,
    "ub.poison": _poison,
    "tt.splat": _splat,
    "tt.unsplat": _unsplat,
    "tt.make_range": _range,
    "tt.expand_dims": _expand,
    "tt.broadcast": _broadcast,
    "tt.trans": _transpose,
    "tt.reshape": _reshape,
    "tt.join": _join,
    "tt.split": _split,
    "tt.cat": _concatenate,
}
