"""Imports a few modules of a package without the rest of it, which a machine without a GPU cannot import.

``Partial`` is an import hook. It runs the modules that it is told to run from the package's folder. Every other module
of the package, and of the other packages that it is told of, becomes a stand-in: an empty module that gives the values
that were set for it, and for any other name an object that raises ``NotStoodIn`` when it is called.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any


class NotStoodIn(RuntimeError):
    """Judged code called something that is neither imported nor stood in for."""


class Partial(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An import hook for ``package`` in ``folder``.

    real: full names of the modules that are run, or with ``.*`` of packages that are run with all that is below them.
    Assertions of modules in ``without_asserts`` are left out. values: attributes of stand-in modules, by module name.
    others: other top-level packages that get a stand-in, installed or not. used: full names of the given values that
    judged code has imported or called. refused: full names of what it called without being given; it may have swallowed
    the NotStoodIn.
    """

    def __init__(
        self,
        package: str,
        folder: Path,
        real: Collection[str],
        values: Mapping[str, Mapping[str, object]],
        others: Collection[str] = (),
        without_asserts: Collection[str] = (),
    ) -> None:
        self.package = package
        self.folder = folder
        self.real = frozenset(real)
        self.real_packages = tuple(name.removesuffix("*") for name in real if name.endswith(".*"))
        self.values = values
        self.others = frozenset(others)
        self.without_asserts = frozenset(without_asserts)
        self.used: set[str] = set()
        self.refused: set[str] = set()

    def install(self) -> None:
        """Take part in imports from now on. Raises ImportError if the package has been imported otherwise."""
        if self.package in sys.modules:
            raise ImportError(f"{self.package} has been imported already")
        sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module that this hook provides, or None."""
        root = fullname.partition(".")[0]
        if root != self.package and root not in self.others:
            return None
        if fullname in self.real or f"{fullname}.".startswith(self.real_packages):
            return self._real_spec(fullname)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def _real_spec(self, fullname: str) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module, or package, that is run from the folder."""
        location = self.folder.joinpath(*fullname.split("."))
        is_package = location.is_dir()
        file = location / "__init__.py" if is_package else location.with_suffix(".py")
        loader = _WithoutAsserts(fullname, str(file)) if fullname in self.without_asserts else None
        return importlib.util.spec_from_file_location(
            fullname, file, loader=loader, submodule_search_locations=[str(location)] if is_package else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """An empty module with the values that are set for it."""
        return _StandIn(spec.name, self)

    def exec_module(self, module: ModuleType) -> None:
        """A stand-in has nothing to run."""


class _WithoutAsserts(importlib.machinery.SourceFileLoader):
    """Loads a module as ``python -O`` does: kernels' wrappers assert that their tensors are on a GPU."""

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.get_data(self.path), self.path, "exec", dont_inherit=True, optimize=1)


class _StandIn(ModuleType):
    def __init__(self, name: str, hook: Partial) -> None:
        super().__init__(name)
        self.__dict__["_hook"] = hook

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        given = self._hook.values.get(self.__name__, {})
        value = given[name] if name in given else _unavailable(full, self._hook.refused)
        if name in given:
            self._hook.used.add(full)
        self.__dict__[name] = value
        return value


def _unavailable(full: str, refused: set[str]) -> type:
    """A class that can be named, inherited from and annotated with, but not called."""

    def refuse(cls: type, *_: object, **__: object) -> Any:
        refused.add(full)
        raise NotStoodIn(f"{full} is only a stand-in here: it cannot be called")

    return type(full.rpartition(".")[2], (), {"__new__": refuse})


def constant(value: object) -> Callable[..., Any]:
    """A function that returns ``value`` for any arguments."""
    return lambda *_, **__: value
