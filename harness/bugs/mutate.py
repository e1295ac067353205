"""Changes one line of the clean tree at run time, Triton kernels included, and puts it back.

A mutation names a function and the text to replace in its source. That text must occur exactly once: when the code
changes under a mutation, it is refused instead of doing nothing.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import linecache
import pkgutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

_NUMBERS = itertools.count()


class MutationError(ValueError):
    """A mutation that does not fit the code it is meant for. One line."""


@dataclass(frozen=True)
class Mutation:
    """A changed piece of source.

    target: ``module:function`` or ``module:Class.method``, without ``super()`` in it. Device functions and kernels too,
    but not what torch holds itself, such as the implementation of an operator: change what that calls.
    old: a text that occurs once in the source of the target, as it reads when its first line is not indented.
    """

    target: str
    old: str
    new: str


@contextmanager
def mutated(*mutations: Mutation) -> Iterator[None]:
    """The tree with all ``mutations``, until the end of the context. Raises MutationError if one does not fit."""
    _import_all()
    with ExitStack() as stack:
        for mutation in mutations:
            stack.enter_context(_mutated(mutation))
        stack.enter_context(_recompiling())
        yield


@contextmanager
def _mutated(mutation: Mutation) -> Iterator[None]:
    module_name, _, path = mutation.target.partition(":")
    module = importlib.import_module(module_name)
    *owner_path, name = path.split(".")
    owner: Any = module
    for part in owner_path:
        owner = getattr(owner, part)
    original = vars(owner)[name]
    changed = _compile(mutation, original, module, name)
    places = [(owner, name)] if owner_path else _holders(original)
    for holder, attribute in places:
        setattr(holder, attribute, changed)
    try:
        yield
    finally:
        for holder, attribute in places:
            setattr(holder, attribute, original)


def _compile(mutation: Mutation, original: Any, module: ModuleType, name: str) -> Any:
    """The object that the changed source makes: a function, or a kernel with the decorator it has there."""
    source = textwrap.dedent(inspect.getsource(getattr(original, "fn", original)))
    if (found := source.count(mutation.old)) != 1:
        raise MutationError(f"{mutation.target}: {mutation.old!r} occurs {found} times; the code has changed")
    changed = source.replace(mutation.old, mutation.new)
    file = f"<mutation {next(_NUMBERS)} of {mutation.target}>"
    linecache.cache[file] = (
        len(changed),
        None,
        changed.splitlines(keepends=True),
        file,
    )  # Triton reads the source again
    before = vars(module).get(name)
    exec(compile(changed, file, "exec"), vars(module))  # our own source with one of our own texts replaced
    made = vars(module)[name]
    if before is None:
        delattr(module, name)
    else:
        setattr(module, name, before)
    return made


def _holders(original: Any) -> list[tuple[Any, str]]:
    """Every attribute of ``optimized/`` that is ``original``: modules that import it by name, and launchers."""
    from nsa_oracle.optimized.launch import Launcher

    found: list[tuple[Any, str]] = []
    for module in _modules():
        for attribute, value in vars(module).items():
            if value is original:
                found.append((module, attribute))
            elif isinstance(value, Launcher) and value.kernel is original:
                found.append((value, "kernel"))
    return found


@contextmanager
def _recompiling() -> Iterator[None]:
    """Nothing compiled before is used inside, nothing compiled inside is used after: device functions are inlined."""
    from nsa_oracle.optimized.launch import Launcher

    def forget() -> None:
        for module in _modules():
            for value in vars(module).values():
                if isinstance(value, Launcher):
                    value._compiled = {}
                elif hasattr(value, "device_caches"):  # a compiled kernel or device function of Triton
                    value.device_caches.clear()
                    value.hash = None

    forget()
    try:
        yield
    finally:
        forget()


def _import_all() -> None:
    """What is imported by name under a mutation, for the first time, would keep the changed object for good."""
    from nsa_oracle import optimized

    for found in pkgutil.walk_packages(optimized.__path__, f"{optimized.__name__}."):
        importlib.import_module(found.name)


def _modules() -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if f"{name}.".startswith("nsa_oracle.optimized.")]
