"""Reads the Markdown pages of the repository: their code, tables, sections, links and commands."""

from __future__ import annotations

import re

from tests.support.project import PROJECT

PAGES = {
    path.relative_to(PROJECT).as_posix(): path.read_text(encoding="utf-8")
    for path in (PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("**/*.md")))
}
_FENCE = r"^```.*?^```"


def fenced(language: str, text: str) -> list[str]:
    """The contents of the code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def inline_code(text: str) -> list[str]:
    """What the prose sets as code, each piece in one line."""
    prose = re.sub(_FENCE, "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def code(text: str) -> str:
    """Everything that is set as code: inline, and the blocks of shell, YAML and Python."""
    blocks = [block for language in ("sh", "yaml", "python") for block in fenced(language, text)]
    return "\n".join([*inline_code(text), *blocks])


def commands(text: str) -> list[str]:
    """The shell commands of a page, a line each: of its blocks, of steps in YAML, and of inline code."""
    lines = [line.strip() for block in fenced("sh", text) for line in block.splitlines()]
    lines += [line.strip().removeprefix("- run: ") for block in fenced("yaml", text) for line in block.splitlines()]
    return [line for line in [*lines, *inline_code(text)] if line and not line.startswith("#")]


def first_column(table: str) -> list[str]:
    """What the rows of Markdown tables begin with, headings left out."""
    cells = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    headings = re.findall(r"^\| ([^|]+) \|.*\n\| -", table, re.MULTILINE)
    return [cell for cell in cells if cell not in headings and not cell.startswith("---")]


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next of any level."""
    without_code = re.sub(_FENCE, _hide_headings, text, flags=re.MULTILINE | re.DOTALL)
    (found,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", without_code, re.MULTILINE | re.DOTALL)
    return str(found).replace("\0", "#")


def _hide_headings(fence: re.Match[str]) -> str:
    """A comment of a shell block is no heading."""
    return re.sub(r"^#", "\0", fence.group(0), flags=re.MULTILINE)


def links(text: str) -> list[tuple[str, str]]:
    """Relative links as (path, anchor); either may be empty."""
    prose = re.sub(_FENCE, "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    parts = [target.partition("#") for target in targets if "://" not in target]
    return [(path, anchor) for path, _, anchor in parts]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    prose = re.sub(_FENCE, "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
