"""Measures the structure of ``harness/``: ``python -m tests.support.structure`` prints it, and fails beyond the limits.

Files and classes are counted in lines; imports are those that import-linter sees, without the ones inside functions
left out.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import grimp

from tests.support.project import PROJECT

MOST_LINES_OF_A_FILE = 450
MOST_LINES_OF_A_CLASS = 200
LONGEST_CHAIN = 14


@dataclass(frozen=True)
class Structure:
    """What was measured. chain: modules, each importing the next. circles: groups of modules that import each other."""

    files: dict[str, int]
    classes: dict[str, int]
    chain: tuple[str, ...]
    circles: tuple[frozenset[str], ...]

    def faults(self) -> list[str]:
        """Whatever is beyond a limit, one line each."""
        found = [f"{name} has {n} lines" for name, n in self.files.items() if n > MOST_LINES_OF_A_FILE]
        found += [f"class {name} has {n} lines" for name, n in self.classes.items() if n > MOST_LINES_OF_A_CLASS]
        found += [f"circle of imports: {', '.join(sorted(circle))}" for circle in self.circles]
        if len(self.chain) > LONGEST_CHAIN:
            found.append(f"a chain of {len(self.chain)} imports: {' -> '.join(self.chain)}")
        return found

    def __str__(self) -> str:
        file, lines = max(self.files.items(), key=lambda item: item[1])
        owner, size = max(self.classes.items(), key=lambda item: item[1])
        return "\n".join(
            (
                f"files          {len(self.files)}, the longest {lines} lines ({file}; at most {MOST_LINES_OF_A_FILE})",
                f"classes        {len(self.classes)}, the longest {size} lines ({owner}; "
                f"at most {MOST_LINES_OF_A_CLASS})",
                f"circles        {len(self.circles)}",
                f"longest chain  {len(self.chain)} modules (at most {LONGEST_CHAIN}): {' -> '.join(self.chain)}",
            )
        )


def measured(folder: Path = PROJECT / "harness", package: str = "nsa_oracle.harness") -> Structure:
    """The structure of ``folder``, which is imported as ``package``."""
    files, classes = {}, {}
    for path in sorted(folder.rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(folder.parent).as_posix()
        files[name] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.end_lineno is not None:
                classes[f"{name}:{node.name}"] = node.end_lineno - node.lineno + 1
    graph = grimp.build_graph("nsa_oracle", cache_dir=None)
    imports = {
        module: {other for other in graph.find_modules_directly_imported_by(module) if other.startswith(package)}
        for module in graph.modules
        if module.startswith(package)
    }
    circles = circles_of(imports)
    return Structure(files, classes, longest_chain(imports, circles), circles)


def public_names(folder: Path = PROJECT / "harness") -> dict[str, list[str]]:
    """Public classes, functions and constants of modules, each with the files that define it."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for name in _defined(node):
                if not name.startswith("_"):
                    found.setdefault(name, []).append(path.relative_to(folder).as_posix())
    return found


def _defined(node: ast.stmt) -> list[str]:
    match node:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            return [node.name]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Assign():
            return [part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    return []


def circles_of(imports: dict[str, set[str]]) -> tuple[frozenset[str], ...]:
    """Groups of modules each of which can be reached from each other."""
    reached = {module: _reachable(module, imports) for module in imports}
    groups = {frozenset({o for o in reached[m] if m in reached[o]}) for m in imports if m in reached[m]}
    return tuple(sorted(groups, key=sorted))


def _reachable(module: str, imports: dict[str, set[str]]) -> set[str]:
    """All modules that ``module`` imports, directly or not; itself if it is in a circle."""
    found: set[str] = set()
    new = set(imports[module])
    while new:
        found |= new
        new = {other for one in new for other in imports[one]} - found
    return found


def longest_chain(imports: dict[str, set[str]], circles: tuple[frozenset[str], ...]) -> tuple[str, ...]:
    """The longest path of imports; within a circle no further than into it."""
    circle_of = {module: circle for circle in circles for module in circle}
    known: dict[str, tuple[str, ...]] = {}

    def longest_from(module: str) -> tuple[str, ...]:
        if module not in known:
            others = (o for o in imports[module] if circle_of.get(o, o) != circle_of.get(module, module))
            known[module] = (module, *max((longest_from(other) for other in others), key=len, default=()))
        return known[module]

    return max((longest_from(module) for module in imports), key=len, default=())


if __name__ == "__main__":
    structure = measured()
    print(structure)
    faults = structure.faults()
    print("\n".join(faults))
    sys.exit(1 if faults else 0)
