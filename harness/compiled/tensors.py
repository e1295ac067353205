"""C for the operations of TTIR that combine elements of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nsa_oracle.harness.compiled import scalars
from nsa_oracle.harness.compiled.emitter import Emitter, Rule
from nsa_oracle.harness.compiled.scalars import narrowed, widened
from nsa_oracle.harness.compiled.ttir import Block, Operation, Unsupported, Value
from nsa_oracle.harness.compiled.writer import flat


def _combine(emitter: Emitter, region: Block, totals: Sequence[str], elements: Sequence[str]) -> None:
    """Emit the region that combines two elements; the results replace ``totals``."""
    emitter.names.update(zip(region.arguments, [*totals, *elements], strict=True))
    emitter.emit_block(region)
    results = region.operations[-1].operands
    copies = []
    for value in results:
        copies.append(emitter.name())
        emitter.line(f"{value.type.c} {copies[-1]} = {emitter.at(value, [])};")
    for total, copy in zip(totals, copies, strict=True):
        emitter.line(f"{total} = {copy};")


def _first_elements(emitter: Emitter, sources: Sequence[Value], index: Sequence[str], prefix: str) -> list[str]:
    names = []
    for source in sources:
        names.append(emitter.name(prefix))
        emitter.line(f"{source.type.c} {names[-1]} = {emitter.at(source, index)};")
    return names


def _reduce(emitter: Emitter, operation: Operation) -> None:
    """In the order of the axis. (A GPU's order is another one, and not specified.)"""
    sources, axis = operation.operands, operation.integer("axis")
    emitter.need(*sources)
    shape = sources[0].type.shape
    outer = [*shape[:axis], *shape[axis + 1 :]]
    places = []
    for result in operation.results:
        places.append(emitter.array(result.type) if outer else emitter.name())
        if not outer:
            emitter.line(f"{result.type.c} {places[-1]};")
    with emitter.loops(outer, "o") as kept, emitter.block(""):
        totals = _first_elements(emitter, sources, [*kept[:axis], "0", *kept[axis:]], "r")
        with emitter.block(f"for (int k = 1; k < {shape[axis]}; k++)"):
            elements = _first_elements(emitter, sources, [*kept[:axis], "k", *kept[axis:]], "e")
            _combine(emitter, operation.regions[0], totals, elements)
        for place, total in zip(places, totals, strict=True):
            emitter.line(f"{place}[{flat(kept, outer)}] = {total};" if outer else f"{place} = {total};")
    emitter.names.update(zip(operation.results, places, strict=True))


def _scan(emitter: Emitter, operation: Operation) -> None:
    sources, axis = operation.operands, operation.integer("axis")
    emitter.need(*sources)
    shape = sources[0].type.shape
    outer = [*shape[:axis], *shape[axis + 1 :]]
    places = [emitter.array(result.type) for result in operation.results]
    is_reversed = operation.word("reverse") == "true"
    with emitter.loops(outer, "o") as kept, emitter.block(""):
        begin = str(shape[axis] - 1) if is_reversed else "0"
        first = [*kept[:axis], begin, *kept[axis:]]
        totals = _first_elements(emitter, sources, first, "r")
        for place, total in zip(places, totals, strict=True):
            emitter.line(f"{place}[{flat(first, shape)}] = {total};")
        with emitter.block(f"for (int s = 1; s < {shape[axis]}; s++)"):
            emitter.line(f"int k = {f'{begin} - s' if is_reversed else 's'};")
            here = [*kept[:axis], "k", *kept[axis:]]
            elements = _first_elements(emitter, sources, here, "e")
            _combine(emitter, operation.regions[0], totals, elements)
            for place, total in zip(places, totals, strict=True):
                emitter.line(f"{place}[{flat(here, shape)}] = {total};")
    emitter.names.update(zip(operation.results, places, strict=True))


def _dot(emitter: Emitter, operation: Operation) -> None:
    """A @ b + c, each element a sum in the order of the inner dimension that begins with c.

    Products of narrow floats are exact in float32. Of float32 operands with the precision tf32, the last 13 bits are
    dropped, as tensor cores do.
    """
    a, b, c = operation.operands
    result = operation.result
    element, inner = result.type.element, a.type.element
    is_integer = element in scalars.INTEGERS
    if element not in ("f32", "f64", "i32", "f16") or inner not in ("f32", "f64", "i8", *scalars.NARROW):
        raise Unsupported(f"a product of {inner} into {element}")
    kind = {"f64": "double", "i32": "int32_t"}.get(element, "float")
    *batch, rows, depth = a.type.shape
    columns = b.type.shape[-1]
    emitter.need(a, b, c)
    precision = operation.word("inputPrecision")
    if inner == "f32" and precision not in ("tf32", "ieee", ""):
        raise Unsupported(f"the input precision {precision}")

    def operand(value: Value, index: Sequence[str]) -> str:
        text = emitter.at(value, index)
        if is_integer:
            return f"(int8_t){text}"
        return (
            f"f32_of(bits_of({text}) & 0xFFFFE000u)" if inner == "f32" and precision == "tf32" else widened(text, inner)
        )

    left, right, total = (emitter.static_array(kind, size) for size in (a.type.size, b.type.size, result.type.size))
    for name, value in ((left, a), (right, b)):
        with emitter.loops(value.type.shape) as index:
            emitter.line(f"{name}[{flat(index, value.type.shape)}] = {operand(value, index)};")
    with emitter.loops(result.type.shape) as index:
        emitter.line(f"{total}[{flat(index, result.type.shape)}] = {widened(emitter.at(c, index), element)};")
    head = f"for (int i = 0; i < {rows}; i++) for (int k = 0; k < {depth}; k++)"
    with emitter.loops(batch, "z") as number, emitter.block(head):
        row, line = f"(({flat(number, batch)}) * {rows} + i)", f"(({flat(number, batch)}) * {depth} + k)"
        emitter.line(f"{kind} x = {left}[{row} * {depth} + k];")
        emitter.line(f"for (int j = 0; j < {columns}; j++)")
        emitter.line(f"    {total}[{row} * {columns} + j] += x * {right}[{line} * {columns} + j];")
    if element in ("f16", "i32"):
        array = emitter.array(result.type)
        emitter.line(f"for (int i = 0; i < {result.type.size}; i++) {array}[i] = {narrowed(f'{total}[i]', element)};")
        total = array
    emitter.names[result] = total


def _histogram(emitter: Emitter, operation: Operation) -> None:
    source, *masks = operation.operands
    emitter.need(*operation.operands)
    array, bins = emitter.array(operation.result.type), operation.result.type.size
    emitter.line(f"memset({array}, 0, sizeof {array});")
    with emitter.loops(source.type.shape) as index:
        mask = f"{emitter.at(masks[0], index)} && " if masks else ""
        number = emitter.at(source, index)
        emitter.line(f"if ({mask}{number} < {bins}u) {array}[{number}]++;")
    emitter.names[operation.result] = array


def _gather(emitter: Emitter, operation: Operation, name: str, index: Sequence[str]) -> None:
    """An index beyond the axis is wrong; it is kept within the tensor here."""
    source, chosen = operation.operands
    axis = operation.integer("axis")
    place = f"({emitter.at(chosen, index)} % {source.type.shape[axis]}u)"
    emitter.declare(operation, name, emitter.at(source, [*index[:axis], place, *index[axis + 1 :]]))


ELEMENTS: dict[str, Callable[[Emitter, Operation, str, Sequence[str]], None]] = {"tt.gather": _gather}
RULES: dict[str, Rule] = {
    "tt.reduce": _reduce,
    "tt.scan": _scan,
    "tt.dot": _dot,
    "tt.histogram": _histogram,
}
