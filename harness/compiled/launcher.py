"""Runs launches of Triton kernels on CPU tensors as compiled C, in place of Triton's interpreter.

The first launch of a variant (types, constants, integers that are 1) traces the kernel, writes it as C and builds it,
unless an earlier process has (``kept``).
A kernel that this cannot do is left to the interpreter, and ``interpreted`` says why; reports show it.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import torch

from nsa_oracle.harness.compiled import numerics, races
from nsa_oracle.harness.compiled.building import BuildError, build
from nsa_oracle.harness.compiled.emit import Interface, emit
from nsa_oracle.harness.compiled.faults import KernelFault, raise_fault
from nsa_oracle.harness.compiled.tier import interpreted, is_installed
from nsa_oracle.harness.compiled.ttir import Unsupported, parse
from nsa_oracle.harness.errors import BackendError, error_line, one_line
from nsa_oracle.harness.interpreter.bounds import Extent, extents_of

if TYPE_CHECKING:
    from nsa_oracle.harness.compiled.dependencies import Dependencies

TIER_VARIABLE = "NSA_ORACLE_KERNELS"  # of the environment; the tier is chosen by
COMPILED_TIER, INTERPRETED_TIER = "compiled", "interpreted"
LEFT_TO_THE_INTERPRETER = "left to Triton's interpreter, where no race is found: "  # begins a line of reports


def chosen_tier() -> str:
    """What the environment chooses, "" if it leaves the choice. Raises BackendError for a tier that does not exist."""
    value = os.environ.get(TIER_VARIABLE, "")
    if value not in ("", INTERPRETED_TIER, COMPILED_TIER):
        raise BackendError(f"{TIER_VARIABLE}: there is no '{value}'; choose {INTERPRETED_TIER} or {COMPILED_TIER}")
    return value


def left_to_the_interpreter() -> dict[str, str]:
    """Why, by the name of a kernel of which a launch was not compiled; or of all, if there is no C compiler."""
    return {"all kernels": _refused} if _refused else dict(interpreted)


class _ExtentC(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("argument", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
    ]


class _LaunchC(ctypes.Structure):
    _fields_ = [
        ("extents", ctypes.POINTER(_ExtentC)),
        ("unordered", ctypes.POINTER(_ExtentC)),
        ("count", ctypes.c_int64),
        ("unordered_count", ctypes.c_int64),
        ("programs", ctypes.c_int64),
        ("poll", ctypes.c_void_p),
        ("fault", KernelFault),
    ]


_POLL = ctypes.cast(ctypes.pythonapi.PyErr_CheckSignals, ctypes.c_void_p).value


class _Left(Exception):
    """A launch that is left to the interpreter. The message says why."""


@dataclass
class Variant:
    """A kernel compiled for some types and constants."""

    kernel: str
    interface: Interface
    run: Any
    pack: tuple[Callable[[Any], int], ...]  # for each runtime argument: its word
    places: tuple[int, ...]  # of the runtime arguments among all
    is_current: Callable[[], bool]
    library: ctypes.CDLL
    number: int = field(default_factory=itertools.count(1).__next__)

    def launch(self, names: Sequence[str], values: Sequence[Any], grid: Sequence[int]) -> None:
        """Run all programs. Raises what the kernel does wrong, and what a signal handler raises meanwhile."""
        _announce(self.kernel, self.number)
        words = [pack(values[place]) for pack, place in zip(self.pack, self.places, strict=True)]
        programs = grid[0] * grid[1] * grid[2]
        parts, extents = self._extents(names, values)
        log = int(programs > 1 and self.interface.is_checked)
        unordered = [_ExtentC(part.begin, part.end) for part in races.unordered()] if log else []
        launch = _LaunchC(extents, (_ExtentC * len(unordered))(*unordered), len(parts), len(unordered), programs, _POLL)
        if self.run((ctypes.c_uint64 * len(words))(*words), ctypes.byref(launch), (ctypes.c_int64 * 3)(*grid), log):
            raise_fault(self.kernel, launch.fault, self.interface.sites, parts)

    def _extents(self, names: Sequence[str], values: Sequence[Any]) -> tuple[list[Extent], Any]:
        """What the launch may touch, each part once, and whether the kernel may write to it."""
        parts: dict[tuple[int, int], Extent] = {}
        shared: dict[tuple[int, int], bool] = {}
        for place, is_written in zip(self.places, self.interface.written, strict=True):
            value = values[place]
            if isinstance(value, int | float):
                continue
            for part in extents_of(names[place], value):
                key = (part.begin, part.end)
                if key not in parts or (is_written and not shared[key]):
                    parts[key] = part
                    shared[key] = is_written
        found = [
            _ExtentC(part.begin, part.end, number, shared[key]) for number, (key, part) in enumerate(parts.items())
        ]
        return list(parts.values()), (_ExtentC * len(found))(*found)


class _Launched(NamedTuple):
    """What Triton's hook is given: the name of a kernel, and a number for what is compiled."""

    data: Mapping[str, Any]


def _announce(kernel: str, function: int) -> None:
    """Tell who listens to Triton's launches on a GPU, as the count of compiled variants does."""
    from triton import knobs  # late: importing Triton fixes how kernels run

    hook: Any = knobs.runtime.launch_enter_hook
    if getattr(hook, "calls", ()):
        hook(_Launched({"name": kernel, "function": function}))


class CompiledKernel:
    """A kernel of the interpreter, with the variants of it that are compiled."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._variants: dict[tuple[Any, ...], Variant | str] = {}
        self._dependencies: Dependencies | None = None
        parameters = inspect.signature(function.fn).parameters
        self._names = list(parameters)
        self._defaults = {p.name: p.default for p in parameters.values() if p.default is not p.empty}
        unspecialized = function.rewriter.kwargs.get("do_not_specialize") or ()
        self._kinds = []  # for each parameter: is it a constant, its type if annotated, may it be specialised
        for number, parameter in enumerate(_parameters(function)):
            may = number not in unspecialized and parameter.name not in unspecialized
            self._kinds.append((parameter.is_constexpr, parameter.annotation_type, may))

    def launch(self, executor: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raises _Left if the launch is left to the interpreter."""
        values = self._bound(args, kwargs)
        key = tuple(itertools.starmap(_key, zip(values, self._kinds, strict=True)))
        try:
            variant = self._variants.get(key)
        except TypeError:
            raise _Left("a constant that is not hashable") from None
        if variant is None or (isinstance(variant, Variant) and not variant.is_current()):
            with _time_limit_later():
                variant = self._variants[key] = self._compile(values, key)
        if isinstance(variant, str):
            raise _Left(variant)
        for hook in executor.pre_run_hooks:
            hook(*args, **kwargs)
        grid = executor.grid
        if callable(grid):
            grid = grid(dict(zip(self._names, values, strict=True)))
        grid = (grid,) if isinstance(grid, int) else tuple(grid)
        variant.launch(self._names, values, (*grid, 1, 1)[:3])

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        if len(args) == len(self._names):
            return args
        given = {**self._defaults, **dict(zip(self._names, args, strict=False)), **kwargs}
        missing = [name for name in self._names if name not in given]
        if missing:
            raise TypeError(f"{self._function.fn.__name__}() is called without {', '.join(missing)}")
        return [given[name] for name in self._names]

    def _compile(self, values: Sequence[Any], key: tuple[Any, ...]) -> Variant | str:
        """The variant, or why there is none."""
        from nsa_oracle.harness.compiled import kept, tracing  # late: importing Triton fixes how kernels run
        from nsa_oracle.harness.compiled.dependencies import dependencies

        try:
            signature = {
                n: _type(v, k, kind) for n, v, k, kind in zip(self._names, values, key, self._kinds, strict=True)
            }
            constants = {n: v for n, v in zip(self._names, values, strict=True) if signature[n] == "constexpr"}
            if self._dependencies is None or not self._dependencies.is_current():
                self._dependencies = dependencies(self._function)
            entry = kept.Entry.of(self._dependencies, signature, constants)
            if (found := entry.read()) is not None:
                return self._variant(signature, *found, self._dependencies.uses)
            traced = tracing.trace(self._function, signature, constants)
            source = emit(parse(traced.text))
            library = build(source.text)
            uses = traced.uses
            if self._dependencies.cover(traced):
                entry.write(source.interface, library)
                uses = self._dependencies.uses
            return self._variant(signature, source.interface, library, uses)
        except (Unsupported, BuildError, _Left) as error:
            reason = error_line(error)
        except Exception as error:  # the front end, or this tier, does not know what the kernel does
            # The front end shows the kernel's source first, and a caret below it.
            lines = [line for line in str(error).splitlines() if line.strip(" ^")]
            reason = f"{type(error).__name__}: {one_line(lines[-1] if lines else 'no message')}"
        return reason

    def _variant(self, signature: Mapping[str, str], interface: Interface, file: Path, uses: Sequence[Any]) -> Variant:
        from nsa_oracle.harness.compiled.tracing import are_current

        library = ctypes.PyDLL(str(file))  # holds the interpreter's lock: signals are looked for
        library.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        places = tuple(number for number, n in enumerate(self._names) if signature[n] != "constexpr")
        is_current = functools.partial(are_current, uses)
        name = self._function.fn.__name__
        return Variant(name, interface, library.run, _packers(interface.types), places, is_current, library)


@contextmanager
def _time_limit_later() -> Iterator[None]:
    """A case's time limit interrupts after this: the front end would take the exception for an error of the kernel."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _parameters(function: Any) -> Sequence[Any]:
    from triton.runtime.jit import KernelParam

    parameters = inspect.signature(function.fn).parameters.values()
    return [KernelParam(number, parameter, False, False) for number, parameter in enumerate(parameters)]


_Kind = tuple[bool, str, bool]


def _key(value: Any, kind: _Kind) -> Any:
    """What a variant depends on: the type of an argument, the value of a constant, whether an integer is 1."""
    is_constant, annotated, may_specialize = kind
    of = type(value)
    if is_constant:
        return of, value.hex() if of is float else value  # as keys, both zeros are equal
    if of is torch.Tensor:
        return value.dtype
    if of is int:
        if value == 1 and may_specialize and not annotated:
            return "1"
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64" if value < 1 << 63 else "u64"
    if isinstance(value, torch.Tensor):
        return value.dtype
    return of, value if value is None else getattr(value, "dtype", None)


def _type(value: Any, key: Any, kind: _Kind) -> str:
    """The type of a parameter as Triton writes it. Raises _Left for what this tier does not pass to kernels."""
    is_constant, annotated, _ = kind
    if is_constant or key == "1" or value is None:
        return "constexpr"
    if annotated:
        return f"*{annotated}" if hasattr(value, "data_ptr") else annotated
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return str(key)
    if isinstance(value, float):
        return "fp32"
    if hasattr(value, "data_ptr"):
        from triton.runtime.jit import mangle_type

        return str(mangle_type(value))
    raise _Left(f"an argument of type {type(value).__name__}")


def _packers(types: Sequence[str]) -> tuple[Callable[[Any], int], ...]:
    packers: dict[str, Callable[[Any], int]] = {"f32": _float_word, "f64": _double_word}
    return tuple(_address if of.startswith("!tt.ptr<") else packers.get(of, _integer_word) for of in types)


def _address(tensor: Any) -> int:
    return int(tensor.data_ptr())


def _integer_word(number: int) -> int:
    return int(number) & 0xFFFF_FFFF_FFFF_FFFF


def _float_word(number: float) -> int:
    return int.from_bytes(bytes(ctypes.c_float(number)), "little")


def _double_word(number: float) -> int:
    return int.from_bytes(bytes(ctypes.c_double(number)), "little")


@contextmanager
def installed() -> Iterator[None]:
    """Inside, the interpreter runs kernels as C that can be compiled. Raises BuildError if there is no C compiler.

    Enter it after what else changes the interpreter: kernels that are left to it are still checked there.
    """
    from triton.runtime import interpreter  # late: importing Triton fixes how kernels run

    from nsa_oracle.harness.compiled.tracing import remember_language

    remember_language()
    function, executor = interpreter.InterpretedFunction, interpreter.GridExecutor
    with (
        numerics.by_the_c_library(),
        patch.object(function, "rewrite", _remembering(function.rewrite, function)),
        patch.object(executor, "__call__", _compiling(executor.__call__)),
    ):
        yield


_for_good = ExitStack()
_refused = ""  # why kernels are interpreted although nobody asked for it


def install() -> None:
    """Compile kernels for the rest of the process, unless the environment wants them interpreted.

    Without a C compiler they are interpreted as well, unless the environment wants them compiled: then BuildError.
    Repeated calls do nothing.
    """
    global _refused
    tier = chosen_tier()
    if tier == INTERPRETED_TIER or is_installed():
        return
    try:
        _for_good.enter_context(installed())
    except BuildError as error:
        if tier == COMPILED_TIER:
            raise
        _refused = error_line(error)


def _remembering(rewrite: Callable[[Any], Any], of: type) -> Callable[[Any], Any]:
    """Wrap what gives a launch its Python function, to find the kernel by it."""

    @functools.wraps(rewrite)
    def remembered(function: Any) -> Any:
        rewritten = rewrite(function)
        if type(function) is of and "compiled" not in vars(rewritten):
            rewritten.compiled = CompiledKernel(function)
        return rewritten

    return remembered


def _compiling(call: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(call)
    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        kernel = vars(executor.fn).get("compiled")
        if kernel is not None:
            try:
                kernel.launch(executor, args, kwargs)
            except _Left as left:
                interpreted[executor.fn.__name__] = str(left)
            else:
                return
        call(executor, *args, **kwargs)

    launch.compiles = True  # type: ignore[attr-defined]
    return launch
