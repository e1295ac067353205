"""A failure explained in reading order, and the command that replays it."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from rich.table import Table

from nsa_oracle.harness.judge import OracleFailure
from nsa_oracle.harness.report.text import render
from nsa_oracle.harness.scenarios.files import to_json
from nsa_oracle.harness.scenarios.story import story


def explain(failure: OracleFailure, saved: Path | None, command: str, unsaved: str = "") -> str:
    """The failure in reading order: verdict, cells around it, the story, the saved case, how to replay it.

    unsaved: why there is no saved case; it stands in the report then.
    """
    finding = failure.finding
    parts = [f"ORACLE FAILURE  {finding.sentence()}"]
    if finding.neighbours:
        table = Table(
            "cell", "got", "expected", "", title=f"{finding.field}, step {finding.step}", title_justify="left"
        )
        for cell in finding.neighbours:
            table.add_row(cell.place, cell.got, cell.expected, "" if cell.got == cell.expected else "<- differs")
        parts.append(render(table))
    parts.append(story(failure.scenario, failure.event))
    kept = str(saved) if saved is not None else f"nowhere, {unsaved}; as CASE.json it is\n{to_json(failure.scenario)}"
    parts.append(f"saved:  {kept}\nreplay: {command}")
    return "\n\n".join(parts)


def python_command() -> str:
    """How a shell in the current folder calls the Python that runs now: ``python``, or its path."""
    running = Path(sys.executable)
    if shutil.which("python") == str(running):
        return "python"
    return str(running.relative_to(Path.cwd())) if running.is_relative_to(Path.cwd()) else str(running)


def replay_command(saved: Path, backend: str | None, device: str, layer: str | None = None, graphs: bool = True) -> str:
    """The one line that replays a saved case where, and as, it was found, with the Python that runs now."""
    words = [python_command(), "-m", "nsa_oracle", "replay", str(saved), "--device", device]
    if backend is not None:
        words += ["--backend", backend]
    if layer is not None:
        words += ["--layer", layer]
    if not graphs:
        words.append("--no-graphs")
    return shlex.join(words)
