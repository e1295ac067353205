"""C for the operations of TTIR that combine elements of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from nsa_oracle.harness.compiled import scalars
from nsa_oracle.harness.compiled.emitter import Emitter, Rule
from nsa_oracle.harness.compiled.scalars import narrowed, widened
from nsa_oracle.harness.compiled.ttir import Op, Region, Unsupported, Value
from nsa_oracle.harness.compiled.writer import flat

TERMS = 8  # products that are summed by themselves
PER_THREAD = 4  # neighbours along an axis that one thread of a GPU has


def _combine(emitter: Emitter, region: Region, totals: Sequence[str], elements: Sequence[str]) -> None:
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


def _reduce(emitter: Emitter, operation: Op) -> None:
    """As a GPU does: first neighbours, which a thread has, then halves of the threads until one is left.

    So the bits of a sum depend on the places of its terms, and a kernel that puts the same terms in other places for
    another batch is found.
    """
    sources, axis = operation.operands, operation.integer("axis")
    emitter.need(*sources)
    shape = sources[0].type.shape
    outer, length = [*shape[:axis], *shape[axis + 1 :]], shape[axis]
    places = [emitter.array(result.type) if outer else emitter.name() for result in operation.results]
    lanes = [emitter.static_array(source.type.c, length) for source in sources]
    with emitter.loops(outer, "o") as kept:
        for lane, source in zip(lanes, sources, strict=True):
            element = emitter.at(source, [*kept[:axis], "k", *kept[axis:]])
            emitter.line(f"for (int k = 0; k < {length}; k++) {lane}[k] = {element};")
        of_a_thread = min(length, PER_THREAD)
        with emitter.block(f"for (int k = 0; k < {length // of_a_thread}; k++)"):
            totals = _declared(emitter, sources, [f"{lane}[k * {of_a_thread}]" for lane in lanes])
            with emitter.block(f"for (int e = 1; e < {of_a_thread}; e++)"):
                _combine(emitter, operation.regions[0], totals, [f"{lane}[k * {of_a_thread} + e]" for lane in lanes])
            _store(emitter, lanes, totals)
        halves = f"for (int half = {length // of_a_thread // 2}; half > 0; half /= 2)"
        with emitter.block(f"{halves} for (int k = 0; k < half; k++)"):
            totals = _declared(emitter, sources, [f"{lane}[k]" for lane in lanes])
            _combine(emitter, operation.regions[0], totals, [f"{lane}[k + half]" for lane in lanes])
            _store(emitter, lanes, totals)
        for place, lane, result in zip(places, lanes, operation.results, strict=True):
            emitter.line(
                f"{place}[{flat(kept, outer)}] = {lane}[0];" if outer else f"{result.type.c} {place} = {lane}[0];"
            )
    emitter.names.update(zip(operation.results, places, strict=True))


def _store(emitter: Emitter, lanes: Sequence[str], totals: Sequence[str]) -> None:
    for lane, total in zip(lanes, totals, strict=True):
        emitter.line(f"{lane}[k] = {total};")


def _declared(emitter: Emitter, values: Sequence[Value], elements: Sequence[str]) -> list[str]:
    """Variables with elements of ``values``."""
    names = []
    for value, element in zip(values, elements, strict=True):
        names.append(emitter.name())
        emitter.line(f"{value.type.c} {names[-1]} = {element};")
    return names


def _scan(emitter: Emitter, operation: Op) -> None:
    sources, axis = operation.operands, operation.integer("axis")
    emitter.need(*sources)
    shape = sources[0].type.shape
    outer = [*shape[:axis], *shape[axis + 1 :]]
    places = [emitter.array(result.type) for result in operation.results]
    is_reversed = operation.word("reverse") == "true"
    with emitter.loops(outer, "o") as kept, emitter.block(""):
        begin = str(shape[axis] - 1) if is_reversed else "0"
        first = [*kept[:axis], begin, *kept[axis:]]
        totals = _declared(emitter, sources, [emitter.at(source, first) for source in sources])
        for place, total in zip(places, totals, strict=True):
            emitter.line(f"{place}[{flat(first, shape)}] = {total};")
        with emitter.block(f"for (int s = 1; s < {shape[axis]}; s++)"):
            emitter.line(f"int k = {f'{begin} - s' if is_reversed else 's'};")
            here = [*kept[:axis], "k", *kept[axis:]]
            elements = _declared(emitter, sources, [emitter.at(source, here) for source in sources])
            _combine(emitter, operation.regions[0], totals, elements)
            for place, total in zip(places, totals, strict=True):
                emitter.line(f"{place}[{flat(here, shape)}] = {total};")
    emitter.names.update(zip(operation.results, places, strict=True))


def _dot(emitter: Emitter, operation: Op) -> None:
    """A @ b + c. Each element begins with c, to which sums of products are added: of 8 neighbours, in pairs.

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
    step = math.gcd(depth, TERMS)
    head = f"for (int i = 0; i < {rows}; i++) for (int k = 0; k < {depth}; k += {step})"
    with emitter.loops(batch, "z") as number, emitter.block(head):
        row, line = f"(({flat(number, batch)}) * {rows} + i)", f"(({flat(number, batch)}) * {depth} + k)"
        emitter.line(f"const {kind} *x = {left} + {row} * {depth} + k, *y = {right} + {line} * {columns};")
        terms = [f"x[{term}] * y[{term} * {columns} + j]" for term in range(step)]
        while len(terms) > 1:
            terms = [f"({one} + {other})" for one, other in zip(terms[::2], terms[1::2], strict=True)]
        emitter.line(f"for (int j = 0; j < {columns}; j++) {total}[{row} * {columns} + j] += {terms[0]};")
    if element in ("f16", "i32"):
        array = emitter.array(result.type)
        emitter.line(f"for (int i = 0; i < {result.type.size}; i++) {array}[i] = {narrowed(f'{total}[i]', element)};")
        total = array
    emitter.names[result] = total


def _histogram(emitter: Emitter, operation: Op) -> None:
    source, *masks = operation.operands
    emitter.need(*operation.operands)
    array, bins = emitter.array(operation.result.type), operation.result.type.size
    emitter.line(f"memset({array}, 0, sizeof {array});")
    with emitter.loops(source.type.shape) as index:
        mask = f"{emitter.at(masks[0], index)} && " if masks else ""
        number = emitter.at(source, index)
        emitter.line(f"if ({mask}{number} < {bins}u) {array}[{number}]++;")
    emitter.names[operation.result] = array


def _gather(emitter: Emitter, operation: Op, name: str, index: Sequence[str]) -> None:
    """An index beyond the axis is wrong; it is kept within the tensor here."""
    source, chosen = operation.operands
    axis = operation.integer("axis")
    place = f"({emitter.at(chosen, index)} % {source.type.shape[axis]}u)"
    emitter.declare(operation, name, emitter.at(source, [*index[:axis], place, *index[axis + 1 :]]))


GATHERS: dict[str, Callable[[Emitter, Op, str, Sequence[str]], None]] = {"tt.gather": _gather}
COMBINATIONS: dict[str, Rule] = {
    "tt.reduce": _reduce,
    "tt.scan": _scan,
    "tt.dot": _dot,
    "tt.histogram": _histogram,
}
