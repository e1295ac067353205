"""Errors that stop a run before anything is judged, in one line, and those that judged code is stopped with."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class BackendError(ValueError):
    """A backend or layer that cannot be judged at all. The message is one line and names the cause and the remedy.

    of_factory: whether judged code has raised it while it was built, and not in one of its methods.
    """

    of_factory = False


class ModuleMissing(BackendError):
    """A module of what is to be judged is not found in this process; another may find it."""


class ScenarioError(ValueError):
    """A scenario that cannot be used. The message is one line and names the cause. of_factory: as in BackendError."""

    of_factory = False


@contextmanager
def building() -> Iterator[None]:
    """Context for a call of a factory, which may say by one of these errors that it cannot be judged."""
    try:
        yield
    except (BackendError, ScenarioError) as error:
        error.of_factory = True
        raise


class CaseTimeout(Exception):
    """A case is still running after its time limit.

    stack: where judged code was when it had swallowed an earlier one, outermost frame first; empty if it has not.
    """

    stack: tuple[traceback.FrameSummary, ...] = ()


class CaptureError(Exception):
    """A body did something that a graph cannot contain.

    `operation` names the call, `where` has the form "file.py:123 in function", `reason` is one clause.
    """

    def __init__(self, operation: str, where: str, reason: str) -> None:
        super().__init__(operation, where, reason)
        self.operation = operation
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.operation} at {self.where}: {self.reason}"


def one_line(text: str, most: int = 200) -> str:
    """``text`` for one line of a terminal: unprintable characters escaped, and at most ``most`` characters."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return plain if len(plain) <= most else plain[:most] + "..."


def counted(count: float, noun: str) -> str:
    """A number of things, such as "1 case" and "1,200 cases"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def error_line(error: BaseException, most: int = 200, nothing: str = "no message") -> str:
    """The message of any exception for one line of a terminal, as by ``one_line``, with white space folded.

    nothing: what stands for an empty message.
    """
    try:
        return one_line(" ".join(str(error).split()), most) or nothing
    except Exception:  # the judged code may raise exceptions whose __str__ fails
        return "no text"


def meant(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The one of ``known`` that was probably meant by ``name``, whatever the case of its letters; or ""."""
    lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower()[:100], lower, n=1, cutoff=cutoff)
    return lower[near[0]] if near else ""
