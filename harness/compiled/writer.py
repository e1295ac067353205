"""Lines of C, and places of elements in arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class CodeWriter:
    """Lines of C with indentation, and names."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.statics: list[str] = []
        self._depth = 1
        self._names = 0

    def line(self, text: str) -> None:
        self.lines.append("    " * self._depth + text)

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        self.line(head + " {")
        self._depth += 1
        yield
        self._depth -= 1
        self.line("}")

    @contextmanager
    def loops(self, shape: Sequence[int], prefix: str = "i") -> Iterator[list[str]]:
        """Nested loops over ``shape``; yields the index variables."""
        index = [f"{prefix}{dim}" if size > 1 else "0" for dim, size in enumerate(shape)]
        for name, size in zip(index, shape, strict=True):
            if size > 1:
                self.line(f"for (int {name} = 0; {name} < {size}; {name}++) {{")
                self._depth += 1
        yield index
        for size in reversed(shape):
            if size > 1:
                self._depth -= 1
                self.line("}")

    def name(self, prefix: str = "v") -> str:
        self._names += 1
        return f"{prefix}{self._names}"

    def static_array(self, c_type: str, size: int) -> str:
        name = self.name("t")
        self.statics.append(f"static {c_type} {name}[{size}] __attribute__((aligned(64)));")
        return name


def flat(index: Sequence[str], shape: Sequence[int]) -> str:
    """The place of an element in an array of ``shape``."""
    terms, stride = [], 1
    for name, size in zip(reversed(index), reversed(shape), strict=True):
        if name != "0":
            terms.append(f"({name}) * {stride}" if stride > 1 else name)
        stride *= size
    return " + ".join(reversed(terms)) or "0"
