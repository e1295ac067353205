"""Counts calls of the methods that a subject brings itself: a method that was never called was not judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_run: ContextVar[str] = ContextVar("run of a layer", default="elsewhere")


@contextmanager
def calls_counted_as(run: str) -> Iterator[None]:
    """Count calls inside the context as calls of ``run``, such as "isolated stage"."""
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


class MethodCalls:
    """How often each of ``names`` was called, by the run of the layer in which that happened."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in names}

    def counting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, each call of which is counted."""

        def counted(*arguments: Any, **options: Any) -> Any:
            self.counts[name][_run.get()] += 1
            return method(*arguments, **options)

        return counted

    def without(self, run: str) -> list[str]:
        """The methods that were not called in ``run``."""
        return [name for name in self.names if not self.counts[name][run]]
