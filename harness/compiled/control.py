"""C for TTIR's control flow: loops, branches, and the values that they carry."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nsa_oracle.harness.compiled.emitter import Emitter, Rule
from nsa_oracle.harness.compiled.scalars import signed
from nsa_oracle.harness.compiled.ttir import STRING, Op, Region, Unsupported, Value

_PAUSE = "if (pause_for_signals(launch)) return 1;"


def _declare(emitter: Emitter, values: Sequence[Value]) -> list[str]:
    """Variables and arrays for values that a branch or a loop assigns."""
    places = []
    for value in values:
        if value.type.shape:
            places.append(emitter.array(value.type))
        else:
            places.append(emitter.name())
            emitter.line(f"{value.type.c} {places[-1]} = 0;")
    return places


def _assign(emitter: Emitter, places: Sequence[str], values: Sequence[Value]) -> None:
    """Assign all values at once: none is read after its place, or that of another value, was written."""
    emitter.need(*values)
    ready: list[tuple[str, Value, str]] = []
    for place, value in zip(places, values, strict=True):
        if not value.type.shape:
            copy = emitter.name()
            emitter.line(f"{value.type.c} {copy} = {emitter.at(value, [])};")
            ready.append((place, value, copy))
            continue
        read = {emitter.names.get(base) for base in emitter.bases(value)}
        if read == {place} and value in emitter.names:
            continue  # it is there already
        if read & set(places):
            copy = emitter.array(value.type)
            emitter.copy(value, copy)
            ready.append((place, value, copy))
        else:
            ready.append((place, value, ""))
    for place, value, copy in ready:
        if not value.type.shape:
            emitter.line(f"{place} = {copy};")
        elif copy:
            emitter.line(f"memcpy({place}, {copy}, sizeof {place});")
        else:
            emitter.copy(value, place)


def yielded(region: Region) -> list[Value]:
    """The operands of the end of a region, which is not written if it has none."""
    last = region.operations[-1] if region.operations else None
    return last.operands if last is not None and last.name == "scf.yield" else []


def _for(emitter: Emitter, operation: Op) -> None:
    emitter.flush_all()
    begin, end, step, *initial = operation.operands
    body = operation.regions[0]
    counter, *carried = body.arguments
    kind = counter.type.element
    places = _declare(emitter, carried)
    _assign(emitter, places, initial)
    emitter.names.update(zip(carried, places, strict=True))
    limits = [f"(int64_t){signed(emitter.at(value, []), kind)}" for value in (begin, end, step)]
    name, place = emitter.name("n"), emitter.name()
    with emitter.block(f"for (int64_t {name} = {limits[0]}; {name} < {limits[1]}; {name} += {limits[2]})"):
        emitter.line(_PAUSE)
        emitter.line(f"{counter.type.c} {place} = ({counter.type.c}){name};")
        emitter.names[counter] = place
        emitter.emit_block(body)
        emitter.flush_all()
        _assign(emitter, places, yielded(body))
    emitter.names.update(zip(operation.results, places, strict=True))


def _if(emitter: Emitter, operation: Op) -> None:
    emitter.flush_all()
    places = _declare(emitter, operation.results)
    for number, region in enumerate(operation.regions):
        with emitter.block("else" if number else f"if ({emitter.at(operation.operands[0], [])})"):
            emitter.emit_block(region)
            emitter.flush_all()
            _assign(emitter, places, yielded(region))
    emitter.names.update(zip(operation.results, places, strict=True))


def _while(emitter: Emitter, operation: Op) -> None:
    emitter.flush_all()
    before, after = operation.regions
    carried = _declare(emitter, before.arguments)
    results = _declare(emitter, operation.results)
    _assign(emitter, carried, operation.operands)
    emitter.names.update(zip(before.arguments, carried, strict=True))
    with emitter.block("for (;;)"):
        emitter.line(_PAUSE)
        emitter.emit_block(before)
        emitter.flush_all()
        condition, *forwarded = before.operations[-1].operands
        proceeds = emitter.name()
        emitter.line(f"int {proceeds} = {emitter.at(condition, [])};")
        _assign(emitter, results, forwarded)
        emitter.line(f"if (!{proceeds}) break;")
        emitter.names.update(zip(after.arguments, results, strict=True))
        emitter.emit_block(after)
        emitter.flush_all()
        _assign(emitter, carried, yielded(after))
    emitter.names.update(zip(operation.results, results, strict=True))


def declare_labels(emitter: Emitter, body: Region) -> None:
    """Declare the arguments of the blocks of a kernel, which branches assign."""
    for operation in body.operations:
        if operation.name == "cf.label":
            emitter.targets[operation.text] = _declare(emitter, operation.results)
            emitter.names.update(zip(operation.results, emitter.targets[operation.text], strict=True))


def _label(emitter: Emitter, operation: Op) -> None:
    emitter.flush_all()
    emitter.line(f"{operation.text}: ;")
    del emitter.targets[operation.text]  # branches go forward: there is no loop of blocks


def _branch(emitter: Emitter, operation: Op) -> None:
    emitter.flush_all()
    _go(emitter, _targets(operation)[0], operation.operands)


def _conditional_branch(emitter: Emitter, operation: Op) -> None:
    emitter.flush_all()
    condition, *values = operation.operands
    first, second = _targets(operation)
    with emitter.block(f"if ({emitter.at(condition, [])})"):
        _go(emitter, first, values[: first[1]])
    _go(emitter, second, values[first[1] :])


def _targets(operation: Op) -> list[tuple[str, int]]:
    """The labels that a branch names, each with the number of values that it passes."""
    found = re.findall(r"\^(bb\d+)(?:\(([^)]*)\))?", operation.text)
    return [(label, values.count("%")) for label, values in found]


def _go(emitter: Emitter, target: tuple[str, int], values: Sequence[Value]) -> None:
    label, count = target
    if label not in emitter.targets or count != len(values):
        raise Unsupported("a loop of blocks")
    _assign(emitter, emitter.targets[label], values)
    emitter.line(f"goto {label};")


def _return(emitter: Emitter, operation: Op) -> None:
    emitter.flush_all()
    emitter.line("return 0;")


def _nothing(emitter: Emitter, operation: Op) -> None:
    """What ends a region: its operands are read where the region is emitted."""


def _program_number(what: str) -> Rule:
    def rule(emitter: Emitter, operation: Op) -> None:
        name = emitter.name()
        emitter.line(f"uint32_t {name} = (uint32_t){what}[{'xyz'.index(operation.text[0])}];")
        emitter.names[operation.result] = name

    return rule


def _assert(emitter: Emitter, operation: Op) -> None:
    emitter.flush_all()
    (condition,) = operation.operands
    message = STRING.search(operation.text)
    site = emitter.site("assertion", operation, text=message[1] if message else "")
    with emitter.loops(condition.type.shape) as index, emitter.block(f"if (!{emitter.at(condition, index)})"):
        fault = f".kind = ASSERTION, .site = {site}, .program = program_number"
        emitter.line(f"launch->fault = (KernelFault){{{fault}}};")
        emitter.line("return 1;")


def _print(emitter: Emitter, operation: Op) -> None:
    raise Unsupported("tl.device_print")


CONTROL: dict[str, Rule] = {
    "scf.for": _for,
    "scf.if": _if,
    "scf.while": _while,
    "scf.yield": _nothing,
    "scf.condition": _nothing,
    "tt.return": _return,
    "cf.label": _label,
    "cf.br": _branch,
    "cf.cond_br": _conditional_branch,
    "tt.assert": _assert,
    "tt.print": _print,
    "tt.get_program_id": _program_number("place"),
    "tt.get_num_programs": _program_number("grid"),
}
