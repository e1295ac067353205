"""What stops a run before anything is judged. Each message is one line that names the cause and the mend."""

from __future__ import annotations


class BackendError(ValueError):
    """A backend that cannot be judged at all. The message is one line and names the cause and the mend."""


class ScenarioError(ValueError):
    """A scenario that cannot be used. The message is one line and names the cause."""


def one_line(text: str, most: int = 200) -> str:
    """Text from a file, fit for one line of a terminal: nothing unprintable, nothing endless."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return plain if len(plain) <= most else plain[:most] + "..."


def error_line(error: BaseException, most: int = 200) -> str:
    """What an exception of any kind says, fit for one line; white space is folded."""
    try:
        return one_line(" ".join(str(error).split()), most)
    except Exception:  # an exception of the judged code that cannot even say what it is
        return "no text"
