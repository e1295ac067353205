"""Replaces functions of ``optimized/``, Triton kernels included, by changed versions at run time, and restores them.

A mutation names a function and a text to replace in its source. The text must occur exactly once, so that a mutation
that no longer fits the code is an error and not a mutation without effect.
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
    """A mutation does not fit the code of its target. The message is one line."""


@dataclass(frozen=True)
class Mutation:
    """One replacement in the source of one function.

    target: ``module:function`` or ``module:Class.method``; a kernel and a device function are allowed. It must not use
    ``super()``. A function that torch has stored, such as the implementation of an operator, cannot be replaced: mutate
    a function that it calls.
    old: a text that occurs exactly once in the dedented source of the target. new: the text to replace it with.
    """

    target: str
    old: str
    new: str


@contextmanager
def mutated(*mutations: Mutation) -> Iterator[None]:
    """Applies all ``mutations`` until the end of the context. Raises MutationError if one does not fit."""
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
    """The object that the changed source defines: a function, or a kernel with its decorators applied."""
    source = textwrap.dedent(inspect.getsource(getattr(original, "fn", original)))
    if (found := source.count(mutation.old)) != 1:
        raise MutationError(f"{mutation.target}: {mutation.old!r} occurs {found} times; the code has changed")
    changed = source.replace(mutation.old, mutation.new)
    file = f"<mutation {next(_NUMBERS)} of {mutation.target}>"
    # Triton reads the source of a kernel through linecache.
    linecache.cache[file] = (
        len(changed),
        None,
        changed.splitlines(keepends=True),
        file,
    )
    before = vars(module).get(name)
    exec(compile(changed, file, "exec"), vars(module))  # the source is the repository's own, and so is the replacement
    made = vars(module)[name]
    if before is None:
        delattr(module, name)
    else:
        setattr(module, name, before)
    return made


def _holders(original: Any) -> list[tuple[Any, str]]:
    """Every (object, attribute) in ``optimized/`` that is ``original``: module globals, and kernels of launchers."""
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
    """Drops all compiled code on entry and on exit.

    A kernel must be recompiled even if only a device function has changed, since device functions are inlined.
    """
    from nsa_oracle.optimized.launch import Launcher

    def forget() -> None:
        for module in _modules():
            for value in vars(module).values():
                if isinstance(value, Launcher):
                    value._compiled = {}
                elif hasattr(value, "device_caches"):  # a JIT function of Triton: a kernel or a device function
                    value.device_caches.clear()
                    value.hash = None

    forget()
    try:
        yield
    finally:
        forget()


def _import_all() -> None:
    """Imports all of ``optimized/``.

    A module that is first imported under a mutation and imports the target by name would keep the changed object after
    the end of the context.
    """
    from nsa_oracle import optimized

    for found in pkgutil.walk_packages(optimized.__path__, f"{optimized.__name__}."):
        importlib.import_module(found.name)


def _modules() -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if f"{name}.".startswith("nsa_oracle.optimized.")]
