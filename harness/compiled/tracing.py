"""Has Triton's own front end turn a kernel into TTIR, in a process whose kernels are interpreted.

There ``triton.jit`` makes functions for the interpreter. The front end wants functions of the other type, so each is
wrapped as one while a kernel is traced, and so are those of Triton's own language. No GPU and no driver is needed.

A module may have constants that say whether its kernels are interpreted. They are evaluated anew, as where kernels are
compiled: what is traced is the code that a GPU gets.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

import triton
import triton.language as tl
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import ConstexprFunction, JITFunction

from nsa_oracle.harness.compiled.ttir import Unsupported

FRONT_END = [
    Path(triton.__file__).parent / folder
    for folder in (
        "", "_C", "language", "language/extra", "language/extra/cuda", "compiler", "runtime", "backends",
        "backends/nvidia",
    )
]  # fmt: skip
TARGET = GPUTarget("cuda", 90, 32)
_FIXED = ("__dict__", "__weakref__", "__doc__", "__abstractmethods__", "_abc_impl")  # members that nobody sets
_HEAP_TYPE, _IMMUTABLE_TYPE = 1 << 9, 1 << 8  # flags of CPython's classes
_MENTIONS = ("interpret", "TRITON_INTERPRET")  # in the definition of a constant

Use = tuple[Mapping[str, Any], str, Any]


@dataclass
class Traced:
    """A kernel as TTIR.

    uses: (namespace, name, value) of all that it found in modules when it was traced. functions: of Python, which the
    kernel and its device functions are written as; without those of Triton.
    """

    text: str
    uses: list[Use] = field(default_factory=list)
    functions: set[Any] = field(default_factory=set)


def are_current(uses: Sequence[Use]) -> bool:
    """Whether the names that a kernel and its device functions use still have the same values."""
    return all(namespace.get(name) is value for namespace, name, value in uses)


def _options(backend: Any) -> Any:
    return backend.parse_options({"num_warps": 4, "enable_fp_fusion": False})


def trace(function: Any, signature: Mapping[str, str], constants: Mapping[str, Any]) -> Traced:
    """TTIR of the kernel for these types and constants. Raises what the front end raises.

    function: an InterpretedFunction. signature: the type of each parameter as Triton writes it, or ``constexpr``.
    """
    traced = Traced("")
    backend = make_backend(TARGET)
    with _front_end(traced):
        kernel = _compilable(function)
        source = ASTSource(kernel, dict(signature), {(kernel.arg_names.index(k),): v for k, v in constants.items()}, {})
        known = _options(backend)
        ir = triton._C.libtriton.ir
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        implementation = backend.get_codegen_implementation(known)
        module = source.make_ir(TARGET, known, implementation, backend.get_module_map(), context)
        _simplify(module)
        traced.text = str(module)
    return traced


def _simplify(module: Any) -> None:
    """The passes that Triton itself runs first, except the unrolling of loops, which changes no result."""
    ir, passes = triton._C.libtriton.ir, triton._C.libtriton.passes
    manager = ir.pass_manager(module.context)
    passes.common.add_inliner(manager)
    passes.ttir.add_rewrite_tensor_descriptor_to_pointer(manager)
    passes.common.add_canonicalizer(manager)
    passes.ttir.add_combine(manager)
    passes.ttir.add_reorder_broadcast(manager)
    passes.common.add_cse(manager)
    passes.common.add_symbol_dce(manager)
    manager.run(module, "make_ttir")


class _Driver:
    """What the front end asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return TARGET


class _Compilable(JITFunction):  # type: ignore[misc]
    """A device function or a kernel for the front end. It finds others like itself in its namespace."""

    @property
    def _is_of_triton(self) -> bool:
        return f"{self.__module__}.".startswith("triton.")

    @functools.cached_property
    def _tree(self) -> Any:
        return super().parse()

    def parse(self) -> Any:
        return self._tree

    @property
    def cache_key(self) -> str:  # Triton's own would look for the dependencies among functions of the other type
        return str(id(self))

    def get_capture_scope(self) -> dict[str, Any]:
        scope = dict(super().get_capture_scope())
        uses = _tracing[-1].uses if _tracing else []
        if _tracing and not self._is_of_triton:
            _tracing[-1].functions.add(self.fn)
        for name in _variables(self.fn.__code__) | set(self.fn.__code__.co_freevars):
            if name not in scope:
                continue
            value = scope[name]
            if name in self.__globals__ and not isinstance(value, ModuleType) and not self._is_of_triton:
                uses.append((self.__globals__, name, value))
            scope[name] = _as_compiled(value, self.__globals__, name)
        return scope


@functools.lru_cache(maxsize=1024)
def _variables(code: CodeType) -> frozenset[str]:
    """The names that a function looks up in its module. ``co_names`` has those of attributes as well."""
    return frozenset(one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL")


_tracing: list[Traced] = []
_wrapped: weakref.WeakKeyDictionary[Any, _Compilable] = weakref.WeakKeyDictionary()


def _compilable(function: Any) -> _Compilable:
    if function not in _wrapped:
        _wrapped[function] = _Compilable(function.fn, **function.rewriter.kwargs)
    return _wrapped[function]


def is_of_triton(value: Any) -> bool:
    """Whether a module, a class or a function comes with Triton's front end."""
    if type(value) in (InterpretedFunction, ConstexprFunction):
        value = value.fn
    if isinstance(value, FunctionType):
        return Path(value.__code__.co_filename).parent in FRONT_END
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__ if isinstance(value, type) else ""
    return f"{name}.".startswith("triton.")


def has_read(function: Any, lines: Sequence[str]) -> bool:
    """Whether the front end has taken the text of ``function`` from these lines of its file."""
    read = _compilable(function) if type(function) is InterpretedFunction else function
    begin = read.starting_line_number - 1
    return list(lines[begin : begin + len(read.raw_src)]) == list(read.raw_src)


def settings() -> list[str]:
    """What, beside a kernel, decides what the front end makes of it."""
    knobs = triton.knobs
    values = [vars(_options(make_backend(TARGET)))]
    values += [{**part.knobs, **vars(part)} for part in (knobs.language, knobs.compilation)]
    values += [{"debug": knobs.runtime.debug, "environment": get_cache_invalidating_env_vars()}]
    return [f"{name}={value!r}" for part in values for name, value in sorted(part.items())]


def _as_compiled(value: Any, namespace: Mapping[str, Any], name: str) -> Any:
    """What a name of a kernel's module stands for where kernels are compiled."""
    if type(value) is InterpretedFunction:
        return _compilable(value)
    if value is _volatile_load().__wrapped__:
        return _volatile_load()
    if isinstance(value, ModuleType) and not value.__name__.startswith("triton"):
        return _as_compiled_module(value)
    return constant_where_compiled(value, namespace, name)


def _as_compiled_module(module: ModuleType) -> ModuleType:
    """A module whose device functions are those for the front end, which wants a plain module."""

    def find(name: str) -> Any:
        value = getattr(module, name)
        if _tracing and not isinstance(value, ModuleType):
            _tracing[-1].uses.append((vars(module), name, value))
        return _as_compiled(value, vars(module), name)

    found = ModuleType(module.__name__)
    found.__getattr__ = find  # type: ignore[method-assign]
    return found


def constant_where_compiled(value: Any, namespace: Mapping[str, Any], name: str) -> Any:
    """A constant of a module; evaluated anew, from its definition, if that asks whether kernels are interpreted.

    Call it in ``as_where_compiled``.
    """
    if not isinstance(value, tl.constexpr | bool | tl.dtype):
        return value
    source = sys.modules.get(namespace.get("__name__", ""))
    for module, found in _definitions(source, name) if source is not None else ():
        return eval(found, vars(module))  # the definition that the module itself has run
    return value


@functools.cache
def _definitions(module: ModuleType, name: str) -> tuple[tuple[ModuleType, Any], ...]:
    """Where ``name`` is defined, and its definition compiled, if that mentions the interpreter; it may be imported."""
    for node in _statements(module):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            if any(word in ast.unparse(node.value) for word in _MENTIONS):
                return ((module, compile(ast.Expression(node.value), module.__file__ or name, "eval")),)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name and node.module in sys.modules:
                    return _definitions(sys.modules[node.module], alias.name)
    return ()


@functools.cache
def _statements(module: ModuleType) -> list[ast.stmt]:
    """The statements of a module; none if its source is not known."""
    try:
        return ast.parse(inspect.getsource(module)).body
    except (OSError, TypeError, SyntaxError):
        return []


@contextmanager
def as_where_compiled() -> Iterator[None]:
    """Inside, Triton says that kernels are compiled."""
    runtime = triton.knobs.runtime
    with patch.dict(vars(runtime), interpret=False), patch.object(triton.runtime.driver, "_active", _Driver()):
        yield


@contextmanager
def _front_end(traced: Traced) -> Iterator[None]:
    """Triton as its front end needs it: language, driver and knob."""
    with as_where_compiled(), ExitStack() as stack:
        for owner, members in _compilable_language().items():
            stack.enter_context(_having(owner, members))
        _tracing.append(traced)
        stack.callback(_tracing.pop)
        yield


@contextmanager
def _having(owner: Any, members: Mapping[str, Any]) -> Iterator[None]:
    """Give a module or a class exactly these members."""
    now = {name: value for name, value in vars(owner).items() if name not in _FIXED}
    changed = [name for name, value in members.items() if now.get(name) is not value]
    added = [name for name in now if name not in members]
    for name in changed:
        setattr(owner, name, members[name])
    for name in added:
        delattr(owner, name)
    try:
        yield
    finally:
        for name in (*changed, *added):
            if name in now:
                setattr(owner, name, now[name])
            else:
                delattr(owner, name)


@functools.cache
def remember_language() -> dict[Any, dict[str, Any]]:
    """The members of the modules and classes of Triton's language, as they are before the first launch.

    The interpreter patches the language at each launch and does not undo all of it.
    """
    modules = [module for name, module in sys.modules.items() if f"{name}.".startswith("triton.language.")]
    classes = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    ours = [
        kind
        for kind in classes
        if kind.__module__.startswith("triton.language.")
        and kind.__flags__ & (_HEAP_TYPE | _IMMUTABLE_TYPE) == _HEAP_TYPE
    ]
    return {owner: _original(vars(owner)) for owner in (*modules, *ours)}


@functools.cache
def _compilable_language() -> dict[Any, dict[str, Any]]:
    """The same, with functions that are written in the language, and ``tl.load``, as the front end needs them."""
    members = {owner: dict(own) for owner, own in remember_language().items()}
    for own in members.values():
        for name, value in own.items():
            if type(value) is InterpretedFunction:
                own[name] = _compilable(value)
            elif value is _volatile_load().__wrapped__:
                own[name] = _volatile_load()
    members[tl.pointer_type]["to_ir"] = _pointer_to_ir
    methods = members[tl.tensor]
    for name, function in members[tl.standard].items():
        if isinstance(function, _Compilable) and name in methods:  # a method, which the interpreter has wrapped
            methods[name] = function
    return members


def _pointer_to_ir(type_: Any, builder: Any) -> Any:
    """The type of a pointer. The front end ends the process for one that points to pointers."""
    if type_.element_ty.is_ptr():
        raise Unsupported("a pointer to pointers")
    return remember_language()[tl.pointer_type]["to_ir"](type_, builder)


@functools.cache
def _volatile_load() -> Any:
    """``tl.load`` as if it were always volatile: a load whose value is not used stays, so that it is checked."""
    plain = remember_language()[tl]["load"]

    @functools.wraps(plain)
    def load(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(plain).bind(*args, **kwargs)
        bound.arguments["volatile"] = True
        return plain(*bound.args, **bound.kwargs)

    return load


def _original(members: Mapping[str, Any]) -> dict[str, Any]:
    """Members without constructors that ``interpreter.speed`` has replaced, and what no class lets be set."""
    return {
        name: getattr(value, "__wrapped__", value) if name == "__init__" else value
        for name, value in members.items()
        if name not in _FIXED
    }
