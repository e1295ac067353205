"""C for loads, stores and atomic operations, each checked and noted before it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nsa_oracle.harness.compiled import scalars
from nsa_oracle.harness.compiled.emitter import Emitter, Rule
from nsa_oracle.harness.compiled.ttir import Op, Type, Unsupported, Value
from nsa_oracle.harness.compiled.writer import flat


def _load(emitter: Emitter, operation: Op, name: str, index: Sequence[str]) -> None:
    pointer, *others = operation.operands
    loaded = operation.result.type
    other = emitter.at(others[1], index) if len(others) > 1 else "0"
    site = emitter.site("load", operation)
    emitter.declare(operation, name, other)
    head = f"if ({emitter.at(others[0], index)})" if others else ""
    with emitter.block(head):
        emitter.line(f"uint64_t p = {emitter.at(pointer, index)};")
        emitter.guard(f"reads(launch, p, {loaded.bytes}, {site}, &last_extents[{site}])")
        read = f"*(const {loaded.memory} *)p"
        emitter.line(f"{name} = {f'({read}) & 1' if loaded.element == 'i1' else read};")


def _store(emitter: Emitter, operation: Op, index: Sequence[str]) -> None:
    pointer, value, *masks = operation.operands
    stored = value.type
    site = emitter.site("store", operation)
    with emitter.block(f"if ({emitter.at(masks[0], index)})" if masks else ""):
        emitter.line(f"uint64_t p = {emitter.at(pointer, index)};")
        emitter.line(f"{stored.c} x = {emitter.at(value, index)};")
        emitter.guard(f"writes(launch, p, {stored.bytes}, {site}, &last_extents[{site}], &x)")
        emitter.line(f"*({stored.memory} *)p = x;")


def _atomic_result(emitter: Emitter, operation: Op) -> tuple[str, tuple[int, ...]]:
    emitter.flush_all()
    type_ = operation.result.type
    if type_.shape:
        return emitter.array(type_), type_.shape
    name = emitter.name()
    emitter.line(f"{type_.c} {name} = 0;")
    return name, ()


def _guarded_update(emitter: Emitter, operation: Op, size: int, semantics: str) -> None:
    site = emitter.site("atomic operation", operation)
    kind = "RELAXED" if semantics == "relaxed" else "ORDERED"
    emitter.guard(f"updates(launch, p, {size}, {site}, &last_extents[{site}], {kind})")


_UPDATES = {
    "add": "arith.addi", "and": "arith.andi", "or": "arith.ori", "xor": "arith.xori", "fadd": "arith.addf",
    "max": "arith.maxsi", "min": "arith.minsi", "umax": "arith.maxui", "umin": "arith.minui",
}  # fmt: skip


def _update(emitter: Emitter, operation: Op) -> None:
    kind, semantics = (word.strip() for word in operation.text.split(",")[:2])
    pointer, value, *masks = operation.operands
    name, shape = _atomic_result(emitter, operation)
    of = operation.result.type
    if kind != "exch" and kind not in _UPDATES:
        raise Unsupported(f"the atomic operation {kind}")
    with emitter.loops(shape) as index, emitter.block(f"if ({emitter.at(masks[0], index)})" if masks else ""):
        emitter.line(f"uint64_t p = {emitter.at(pointer, index)};")
        _guarded_update(emitter, operation, of.bytes, semantics)
        emitter.line(f"{of.c} x = {emitter.at(value, index)};")
        emitter.line(f"{of.c} old = *({of.memory} *)p;")
        updated = "x"
        if kind != "exch":
            updated = scalars.TABLE[_UPDATES[kind]](_like(_UPDATES[kind], operation.result), ["old", "x"])
        emitter.line(f"*({of.memory} *)p = {updated};")
        emitter.line(f"{name}[{flat(index, shape)}] = old;" if shape else f"{name} = old;")
    emitter.names[operation.result] = name


def _like(name: str, result: Value) -> Op:
    operand = Value("", Type(result.type.element))
    return Op(name, "", "", [operand, operand], [operand])


def _compare_and_swap(emitter: Emitter, operation: Op) -> None:
    semantics = operation.text.partition(",")[0].strip()
    pointer, compared, value = operation.operands
    name, shape = _atomic_result(emitter, operation)
    of = operation.result.type
    with emitter.loops(shape) as index, emitter.block(""):
        emitter.line(f"uint64_t p = {emitter.at(pointer, index)};")
        _guarded_update(emitter, operation, of.bytes, semantics)
        emitter.line(f"{of.c} old = *({of.memory} *)p, wanted = {emitter.at(compared, index)};")
        emitter.line(f"if (!memcmp(&old, &wanted, sizeof old)) *({of.memory} *)p = {emitter.at(value, index)};")
        emitter.line(f"{name}[{flat(index, shape)}] = old;" if shape else f"{name} = old;")
    emitter.names[operation.result] = name


LOADS: dict[str, Callable[[Emitter, Op, str, Sequence[str]], None]] = {"tt.load": _load}
STORED_LANES: dict[str, Callable[[Emitter, Op, Sequence[str]], None]] = {"tt.store": _store}
ATOMICS: dict[str, Rule] = {"tt.atomic_rmw": _update, "tt.atomic_cas": _compare_and_swap}
