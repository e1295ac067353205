"""What a compiled kernel found while it ran, as an exception at the kernel's line."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from typing import Any, NoReturn

from nsa_oracle.harness.compiled.emitter import Site
from nsa_oracle.harness.interpreter.bounds import Extent, OutOfBounds, out_of_bounds_line
from nsa_oracle.harness.interpreter.promises import BrokenPromise, broken


class FaultKind(enum.IntEnum):
    """As in runtime.h."""

    LOAD = 1
    STORE = 2
    ATOMIC = 3
    DIVISIBILITY = 4
    CONTIGUITY = 5
    ASSERTION = 6
    RACE = 7
    INTERRUPTED = 8
    NO_MEMORY = 9


_ACCESSES = {FaultKind.LOAD: "load", FaultKind.STORE: "store", FaultKind.ATOMIC: "atomic operation"}
_KINDS = ("loads", "stores", "stores", "updates", "updates")  # by the kind of an entry of the log


class Race(RuntimeError):
    """Two programs of a launch use the same memory, and the result depends on their order. The message is one line."""


class KernelFault(ctypes.Structure):
    """As in runtime.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "kind", "site", "other_site", "program", "other_program", "dim", "promised", "lane", "found",
        )),
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    ]  # fmt: skip


def raise_fault(kernel: str, fault: KernelFault, sites: Sequence[Site], extents: Sequence[Extent]) -> NoReturn:
    """Raise what ``fault`` says, from the line of the kernel that it is about."""
    if fault.kind == FaultKind.NO_MEMORY:
        raise MemoryError(f"{kernel}: the log of its accesses, in which races are found, does not fit")
    site = sites[fault.site]
    error: Exception
    if fault.kind in _ACCESSES:
        error = OutOfBounds(out_of_bounds_line(_ACCESSES[FaultKind(fault.kind)], extents, fault.address, fault.size))
    elif fault.kind in (FaultKind.DIVISIBILITY, FaultKind.CONTIGUITY):
        error = BrokenPromise(_broken(fault, site))
    elif fault.kind == FaultKind.RACE:
        error = Race(_race(kernel, fault, sites, extents))
    else:
        error = AssertionError(site.text)
    _raise_at(site.where, kernel, error)


def _broken(fault: KernelFault, site: Site) -> str:
    lane, rest = [], fault.lane
    for size in reversed(site.shape):
        lane.append(rest % size)
        rest //= size
    return broken(site.what, fault.promised, fault.dim, lane[::-1], fault.found)


def _race(kernel: str, fault: KernelFault, sites: Sequence[Site], extents: Sequence[Extent]) -> str:
    owner = next(part for part in extents if part.begin <= fault.address < part.end)
    before, after = _KINDS[fault.promised], _KINDS[fault.found]
    return (
        f"a race of two programs of {kernel}: program {fault.other_program} {before} byte "
        f"{fault.address - owner.begin} of {owner.name} (line {_line(sites[fault.other_site].where)}), program "
        f"{fault.program} {after} it (line {_line(sites[fault.site].where)}), and nothing orders them"
    )


def _line(where: str) -> str:
    return where.rpartition(":")[2]


def _raise_at(where: str, kernel: str, error: Exception) -> NoReturn:
    """Raise ``error`` in a frame that has the place of the kernel's line, where tracebacks and reports look for it."""
    file, _, line = where.rpartition(":")
    if file:
        code = compile("\n" * (int(line) - 1) + "raise error", file, "exec").replace(co_name=kernel)
        namespace: dict[str, Any] = {"error": error}
        exec(code, namespace)  # the two words above
    raise error
