"""Warnings of judged code are shown; whatever filters the caller has, they are neither errors nor verdicts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Show each warning once per place."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield
