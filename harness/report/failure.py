"""The report of a failure, and the command that replays it."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from rich.table import Table

from nsa_oracle.harness.errors import one_line
from nsa_oracle.harness.judge import OracleFailure
from nsa_oracle.harness.report.text import render
from nsa_oracle.harness.scenarios.files import MAX_PATH, to_json
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.scenarios.story import story


def explain(failure: OracleFailure, saved: Path | None, command: str, unsaved: str = "") -> str:
    """The report in reading order: verdict, cells around it, the case in words, the saved file, the replay command.

    unsaved: why there is no saved file; the report then contains the case itself.
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
    if finding.stack:
        parts.append("raised through:\n" + "\n".join(f"  {line}" for line in finding.stack))
    if finding.thread_errors:
        raised = "\n".join(f"  {error}" for error in finding.thread_errors)
        parts.append(f"raised before in threads of the judged code:\n{raised}")
    parts.append(story(failure.scenario, failure.event))
    kept = one_line(str(saved), MAX_PATH)
    if saved is None:
        kept = f"nowhere ({unsaved}); write this to CASE.json to replay it:\n{to_json(failure.scenario)}"
    parts.append(f"saved:  {kept}\nreplay: {command}")
    return "\n\n".join(parts)


def explain_death(death: str, scenario: Scenario, saved: Path, command: str) -> str:
    """The report of a case that ended the process that judged it. death: how, in one line."""
    parts = [f"ORACLE FAILURE  {death} while it judged {saved}", story(scenario), f"saved:  {saved}\nreplay: {command}"]
    return "\n\n".join(parts)


def python_command() -> str:
    """The command that runs this process's Python in a shell in the current folder: ``python``, or its path."""
    running = Path(sys.executable)
    if shutil.which("python") == str(running):
        return "python"
    return str(running.relative_to(Path.cwd())) if running.is_relative_to(Path.cwd()) else str(running)


def replay_command(
    files: Sequence[Path],
    backend: str | None,
    device: str,
    layer: str | None = None,
    graphs: bool = True,
    timeout: float | None = None,
) -> str:
    """The command line that replays saved cases as they were found, on the same device and with the same Python.

    For a shell in the current folder. A backend or layer that pytest made importable, as it does with the folder of a
    test, needs that folder on PYTHONPATH.
    """
    words = [python_command(), "-m", "nsa_oracle", "replay", *map(str, files), "--device", device]
    if backend is not None:
        words += ["--backend", backend]
    if layer is not None:
        words += ["--layer", layer]
    if not graphs:
        words.append("--no-graphs")
    if timeout is not None:
        words += ["--timeout", f"{timeout:g}"]
    folders = list(dict.fromkeys(folder for spec in (backend, layer) if spec for folder in _added_folders(spec)))
    if not folders:
        return shlex.join(words)
    folders += filter(None, [os.environ.get("PYTHONPATH")])  # which the line would replace
    return f"PYTHONPATH={shlex.quote(os.pathsep.join(folders))} {shlex.join(words)}"


def _searched_afresh() -> set[Path]:
    """The folders that a fresh process of this Python searches besides the current one.

    Those of ``sys.path`` at this process's start are more: pytest adds those of its setting ``pythonpath`` before it
    loads plugins.
    """
    sites = {*site.getsitepackages(), site.getusersitepackages()}
    named = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    found = {Path(entry).absolute() for entry in (*sites, *sysconfig.get_paths().values(), *named)}
    for file in (file for folder in sites for file in sorted(Path(folder).glob("*.pth"))):
        with suppress(OSError, ValueError):
            lines = file.read_text(encoding="utf-8").splitlines()
            found |= {
                file.parent / line.strip() for line in lines if line.strip() and not line.startswith(("#", "import"))
            }
    return found


def _added_folders(spec: str) -> Iterator[str]:
    """The folder in which the module of ``spec`` is found, if this process has added it to those that are searched."""
    top = spec.partition(":")[0].partition(".")[0]
    found = sys.modules.get(top)
    try:
        place = found.__spec__ if found is not None else importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return
    if place is None or place.origin is None:
        return
    folder = Path(place.origin).parent.parent if place.submodule_search_locations else Path(place.origin).parent
    if str(folder) in sys.path and folder not in _searched_afresh() and folder != Path.cwd():
        yield str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)
