"""Mutants of ``optimized/``: every change that the operators find. A mutant's id is stable as long as its line is."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import linecache
import pkgutil
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from nsa_oracle.harness.mutants.operators import Edit, edits

PACKAGE = "nsa_oracle.optimized"
TREE = Path(__file__).parent.parent.parent / "optimized"
PROBE = "_reached"
KERNEL_FOLDER = "kernels"  # the folder of ``optimized/`` whose files contain kernels and launch none


@dataclass(frozen=True)
class Mutant:
    """One change of one file of ``optimized/``.

    id: ``file:line:operator:number``; number counts, from 1, the changes that the operator finds on the line.
    file: path relative to ``optimized/``. original: source of the whole file.
    """

    id: str
    file: str
    original: str
    edit: Edit

    @property
    def source(self) -> str:
        """The source of the whole file with the change."""
        return self.edit.apply(self.original)

    @property
    def needs_gpu(self) -> bool:
        """Whether the change can show only on a GPU: the interpreter runs all threads of a program as one."""
        return "barrier" in self.edit.operator

    @property
    def is_of_kernels(self) -> bool:
        return is_of_kernels(self.file)

    @property
    def before(self) -> str:
        """The replaced source text, in one line."""
        lines = self.original.encode().splitlines()
        node = self.edit.node
        replaced = lines[node.lineno - 1 : node.end_lineno]
        replaced[-1] = replaced[-1][: node.end_col_offset]
        replaced[0] = replaced[0][node.col_offset :]
        return " ".join(b" ".join(replaced).decode().split())

    @property
    def after(self) -> str:
        """The replacement, in one line."""
        return " ".join(self.edit.text.split())


def is_of_kernels(file: str) -> bool:
    """Whether ``file`` contains kernels, so that all its code is compiled."""
    return Path(file).parent.name == KERNEL_FOLDER


def module_name(file: str) -> str:
    """The full name of the module in ``file``, a path relative to ``optimized/``."""
    parts = Path(file).with_suffix("").parts
    return ".".join((PACKAGE, *parts[: -1 if parts[-1] == "__init__" else None]))


def mutants_of(file: str, source: str) -> list[Mutant]:
    """Every mutant of one file. file: path relative to ``optimized/``. source: its source."""
    seen: Counter[str] = Counter()
    found = []
    for edit in edits(source, launches=not is_of_kernels(file)):
        stem = f"{file}:{edit.node.lineno}:{edit.operator}"
        seen[stem] += 1
        found.append(Mutant(f"{stem}:{seen[stem]}", file, source, edit))
    return found


def all_mutants(pattern: str = "*") -> list[Mutant]:
    """Every mutant of the files of ``optimized/`` whose path matches ``pattern`` (fnmatch), by file and line."""
    sources = tree_sources().items()
    return [mutant for file, source in sources if fnmatch.fnmatch(file, pattern) for mutant in mutants_of(file, source)]


def sampled(mutants: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """A random sample of ``count`` mutants, or all if there are fewer, in the given order."""
    numbers = random.Random(seed).sample(range(len(mutants)), min(count, len(mutants)))
    return [mutants[number] for number in sorted(numbers)]


def probed(file: str, source: str) -> str:
    """``source`` with a call of ``PROBE`` before each statement of its functions.

    The call passes the file and the statement's line in ``source``. Formatting changes, behaviour does not, in Triton's
    interpreter either.
    """
    tree = ast.parse(source)
    bodies = [
        body
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        for body in (getattr(node, "body", None), getattr(node, "orelse", None))
        if isinstance(body, list) and not isinstance(node, ast.ClassDef)
    ]
    for body in {id(body): body for body in bodies}.values():
        probes = [ast.parse(f"{PROBE}({file!r}, {statement.lineno})").body for statement in body]
        body[:] = [new for probe, statement in zip(probes, body, strict=True) for new in (*probe, statement)]
    return ast.unparse(tree)


class _Replacements(importlib.abc.SourceLoader):
    """An importer that loads modules from other source, under the names and paths of the original files."""

    def __init__(self, sources: Mapping[str, str], probe: Callable[[str, int], None] | None) -> None:
        self.sources = {module_name(file): (str(TREE / file), source) for file, source in sources.items()}
        self.probe = probe
        for path, source in self.sources.values():
            # Triton reads source through linecache, which does not compare entries without a time with the disk.
            linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)

    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.sources:
            return None
        file, _ = self.sources[fullname]
        is_package = [str(Path(file).parent)] if Path(file).stem == "__init__" else None
        return importlib.util.spec_from_file_location(
            fullname, file, loader=self, submodule_search_locations=is_package
        )

    def exec_module(self, module: ModuleType) -> None:
        from nsa_oracle.harness.interpreter import gluon  # late: it imports Triton

        vars(module)[PROBE] = self.probe
        with gluon.as_installed(module.__name__):
            super().exec_module(module)

    def get_filename(self, fullname: str) -> str:
        return self.sources[fullname][0]

    def get_data(self, path: str | bytes) -> bytes:
        for file, source in self.sources.values():
            if file == path:
                return source.encode()
        raise OSError(path)  # the cached bytecode of the original file must not be used


def import_replaced(sources: Mapping[str, str], probe: Callable[[str, int], None] | None = None) -> None:
    """Imports all of ``optimized/``, with ``sources`` (path -> source) in place of some files.

    May be called once per process. Of ``optimized/`` only the package itself and ``optimizations``, its switches, may
    have been imported; they are imported again, which is safe because nothing else is derived from them. Raises what
    the imports raise. probe: the function that ``probed`` sources call, with file and line.
    """
    loaded = {name for name in sys.modules if f"{name}.".startswith(f"{PACKAGE}.")}
    assert loaded <= {PACKAGE, f"{PACKAGE}.optimizations"}, loaded
    for name in loaded:
        del sys.modules[name]
    sys.meta_path.insert(0, _Replacements(sources, probe))
    package = importlib.import_module(PACKAGE)
    for found in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        importlib.import_module(found.name)


def tree_sources() -> dict[str, str]:
    """The source of every file of ``optimized/``, by its path relative to that folder."""
    return {path.relative_to(TREE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(TREE.rglob("*.py"))}
