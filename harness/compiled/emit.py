"""Writes a kernel as a C file: the runtime, a function that runs one program, and one that runs a launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nsa_oracle.harness.compiled import control, memory, scalars, tensors, views
from nsa_oracle.harness.compiled.emitter import Emitter, Rules, Site
from nsa_oracle.harness.compiled.ttir import Kernel, Op, Unsupported, Value

HEADERS = [Path(__file__).parent / name for name in ("runtime.h", "races.h", "numbers.h")]


@dataclass(frozen=True)
class Interface:
    """What a launch has to know of a kernel.

    types: of each parameter. written: whether it is a pointer that the kernel may store through. is_checked: whether
    accesses are checked and noted.
    """

    types: tuple[str, ...]
    written: tuple[bool, ...]
    sites: tuple[Site, ...]
    is_checked: bool


@dataclass(frozen=True)
class Source:
    """C for a kernel."""

    text: str
    interface: Interface


def emit(kernel: Kernel) -> Source:
    """Raises Unsupported for operations that this tier does not run."""
    # A pointer made from an integer may point anywhere, so nothing is checked.
    is_checked = all(operation.name != "tt.int_to_ptr" for operation in kernel.operations())
    emitter = Emitter(_RULES, is_checked)
    _parameters(emitter, kernel)
    control.declare_labels(emitter, kernel.body)
    emitter.emit_block(kernel.body)
    emitter.flush_all()
    body = "\n".join([*emitter.statics, "", _PROGRAM, *emitter.lines, "    return 0;", "}"])
    head = [f"#define SITES {max(1, len(emitter.sites))}", *(file.read_text(encoding="utf-8") for file in HEADERS)]
    text = "\n".join([*head, body, _LAUNCH])
    types = tuple(parameter.type.element for parameter in kernel.body.arguments)
    return Source(text, Interface(types, _written(kernel), tuple(emitter.sites), is_checked))


def _parameters(emitter: Emitter, kernel: Kernel) -> None:
    for number, parameter in enumerate(kernel.body.arguments):
        kind, name = parameter.type.element, emitter.name("a")
        if parameter.type.shape or kind in scalars.NARROW:
            raise Unsupported(f"a parameter of type {kind}")
        word = f"arguments[{number}]"
        text = {"f32": f"f32_of((uint32_t){word})", "f64": f"f64_of({word})"}.get(kind, f"({parameter.type.c}){word}")
        emitter.line(f"{parameter.type.c} {name} = {text}; /* {parameter.name} */")
        emitter.names[parameter] = name
        promises = kernel.promises[number]
        if parameter.type.is_pointer and promises:
            attributes = promises.replace(" : i32", ">").replace("= ", "= dense<")
            emitter.check_promises(Op("parameter", attributes, ""), parameter)


def _written(kernel: Kernel) -> tuple[bool, ...]:
    """For each parameter whether a store or an atomic operation may go through it: it follows where pointers come from.

    A pointer that comes from anything else than arithmetic on parameters may be any of them.
    """
    roots: dict[Value, frozenset[Value]] = {value: frozenset([value]) for value in kernel.body.arguments}
    everything = frozenset(value for value in kernel.body.arguments if value.type.is_pointer)

    def roots_of(value: Value) -> frozenset[Value]:
        if value not in roots:
            made = value.definition
            if made is None or made.regions or made.name in ("tt.load", "tt.int_to_ptr", "cf.label"):
                roots[value] = everything
            else:
                given = [roots_of(operand) for operand in made.operands if operand.type.is_pointer]
                roots[value] = frozenset().union(*given)
        return roots[value]

    found: frozenset[Value] = frozenset()
    for operation in kernel.operations():
        if operation.name in ("tt.store", "tt.atomic_rmw", "tt.atomic_cas"):
            found |= roots_of(operation.operands[0])
    return tuple(value in found for value in kernel.body.arguments)


def _computed(emitter: Emitter, operation: Op, name: str, index: Sequence[str]) -> None:
    operands = [emitter.at(operand, index) for operand in operation.operands]
    emitter.declare(operation, name, scalars.TABLE[operation.name](operation, operands))


_RULES = Rules(
    views=views.VIEWS,
    elements={**dict.fromkeys(scalars.TABLE, _computed), **memory.LOADS, **tensors.GATHERS},
    effects=memory.STORED_LANES,
    others={**control.CONTROL, **tensors.COMBINATIONS, **memory.ATOMICS},
)

_PROGRAM = """static int program(const uint64_t *arguments, Launch *launch, const int64_t *grid, const int64_t *place)
{"""

_LAUNCH = """
int run(const uint64_t *arguments, Launch *launch, const int64_t *grid, int log)
{
    int failed = 0;
    is_logging = log;
    used = 0;
    moment = 0;
    program_number = 0;
    memset(last_extents, 0, sizeof last_extents);
    memset(open_runs, 0, sizeof open_runs);
    int64_t place[3];
    for (place[0] = 0; place[0] < grid[0]; place[0]++)
        for (place[1] = 0; place[1] < grid[1]; place[1]++)
            for (place[2] = 0; place[2] < grid[2]; place[2]++, program_number++) {
                if (pause_for_signals(launch) || program(arguments, launch, grid, place))
                    return 1;
                for (int site = 0; log && site < SITES; site++)
                    if (close_run(launch, site))
                        return 1;
            }
    if (log)
        failed = find_race(launch);
    if (room > 1 << 16) { /* a large log is not kept */
        free(entries);
        entries = NULL;
        room = 0;
    }
    return failed;
}
"""
