"""Saved failures: small JSON files that replay on any machine. Killing the process at any moment loses none of them.

Each failure has up to two files, named after the digest of the case as it was found: ``<digest>.raw.json``, written
before shrinking starts, and ``<digest>.min.json``, rewritten whenever shrinking finds a smaller case. The case that is
being judged is in ``<digest>.<process id>.running.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from nsa_oracle.harness.destinations import device_at
from nsa_oracle.harness.errors import ScenarioError, one_line
from nsa_oracle.harness.scenarios.complaints import MOST_CHARACTERS, complaint
from nsa_oracle.harness.scenarios.scenario import SCHEMA_VERSION, Scenario

_TESTS = Path(__file__).resolve().parents[2] / "tests"
CORPUS = _TESTS / "cases"  # of this repository: every run judges these first
PRODUCTION = "production"  # subfolder of a corpus, for runs on a GPU alone: sizes that take the interpreter hours
MAX_FILE_BYTES = 1 << 20
MAX_PATH = 4096  # characters of a file's name in messages
BUG_CASES = _TESTS / "bugs"  # one case per bug that shows it, named after the bug


def digest(scenario: Scenario) -> str:
    """The scenario's name in files: 12 hex digits of the SHA-256 of its JSON without the note."""
    return hashlib.sha256(to_json(scenario.model_copy(update={"note": ""})).encode()).hexdigest()[:12]


def corpus(device: torch.device, folder: Path = CORPUS) -> list[Path]:
    """The files of the saved cases in ``folder`` that a run on ``device`` judges first."""
    folders = (folder, folder / PRODUCTION) if device.type == "cuda" else (folder,)
    return [file for each in folders for file in sorted(each.glob("*.json"))]


def shipped_cases() -> list[tuple[Path, Scenario]]:
    """The saved cases of metadata alone that come with the package, with their files: what chance rarely draws."""
    loaded = [(file, load(file)) for file in sorted((Path(__file__).parents[1] / "cases").glob("*.json"))]
    return [(file, case) for file, case in loaded if case.setup.layer is None]


def save(scenario: Scenario, path: Path) -> None:
    """Write the scenario to ``path`` atomically."""
    replace_file(path, to_json(scenario))


def replace_file(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically: other processes see the old file or the complete new one.

    A symbolic link is followed. A character device, and what this process prints to, stay what they are and are
    written to. Raises OSError for whatever else is no file: a pipe without a reader would block.
    """
    device = device_at(path)
    if device is not None:
        with os.fdopen(device, "w", encoding="utf-8") as file:
            file.write(text)
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_file(file: Path, option: str) -> None:
    """Raises ScenarioError, which names ``option``, if ``replace_file`` could not write ``file``.

    Neither the file nor its folder need exist yet.
    """
    try:
        device = device_at(file)
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}; name a file in a folder that can"
        raise ScenarioError(f"{option} {one_line(str(file), MAX_PATH)}: {reason}") from None
    if device is None:
        check_folder(Path(os.path.realpath(file)).parent, option)
    else:
        os.close(device)


def check_folder(folder: Path, option: str) -> None:
    """Raises ScenarioError, which names ``option``, if no file could be saved in ``folder``. It need not exist yet."""
    try:
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not existing.is_dir():
            raise ScenarioError(f"{option} {folder}: {existing} is a file; name a directory")
        with tempfile.TemporaryFile(dir=existing):  # permissions do not say it: there are read-only file systems
            pass
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}; name another directory"
        raise ScenarioError(f"{option} {one_line(str(folder), MAX_PATH)}: {reason}") from None


RUNNING = ".running.json"


@contextmanager
def saved_while_judged(scenario: Scenario, folder: Path) -> Iterator[None]:
    """Keep the case in ``folder`` while it is judged. The file stays behind if judging it kills the process.

    It also does if the process is interrupted, as judged code may do to itself.
    """
    folder = folder.absolute()  # judged code may change the current folder
    path = folder / f"{digest(scenario)}.{os.getpid()}{RUNNING}"
    created = not folder.exists()
    with suppress(OSError):  # if the folder is not writable, the report of a failure says so
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(scenario), encoding="utf-8")
    is_interrupted = False
    try:
        yield
    except KeyboardInterrupt:
        is_interrupted = True
        raise
    finally:
        with suppress(OSError):
            if not is_interrupted:
                path.unlink(missing_ok=True)
            if created:
                folder.rmdir()  # fails unless the folder is empty


def process_of(running: Path) -> int:
    """The number of the process that judges the case of the file ``running``; that of this process if it has none."""
    number = running.name.removesuffix(RUNNING).rpartition(".")[2]
    return int(number) if number.isdecimal() else os.getpid()


def cases_of_dead_processes(folder: Path, since: float) -> list[Path]:
    """Cases in ``folder`` that were being judged when their process died, in files not older than ``since``.

    since: a value of ``time.time()``.
    """

    def is_dead(path: Path) -> bool:
        try:
            os.kill(process_of(path), 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
        return False

    return sorted(path for path in folder.glob(f"*{RUNNING}") if is_dead(path) and path.stat().st_mtime >= since)


class FailureFiles:
    """The files of one failure while it is being shrunk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stem: str | None = None

    @property
    def raw(self) -> Path:
        return self.directory / f"{self._stem}.raw.json"

    @property
    def minimal(self) -> Path:
        return self.directory / f"{self._stem}.min.json"

    def record(self, scenario: Scenario, sentence: str, smaller: bool = True) -> None:
        """Save a failing scenario, noted with ``sentence``, as the smallest so far; the first one also as raw case.

        smaller: if False, as the raw case alone.
        """
        noted = scenario.model_copy(update={"note": sentence})
        if self._stem is None:
            self._stem = digest(scenario)
            save(noted, self.raw)
        if smaller:
            save(noted, self.minimal)


def to_json(scenario: Scenario) -> str:
    """The scenario as readable JSON: one event per line, without default values."""
    data = scenario.model_dump(mode="json", exclude_defaults=True)
    events = [e.model_dump(mode="json", exclude_defaults=True) | {"event": e.event} for e in scenario.events]
    data.pop("events", None)
    head = {"schema_version": SCHEMA_VERSION, **data}
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    body = ",\n".join("    " + json.dumps({"event": e.pop("event"), **e}) for e in events)
    lines.append('  "events": [\n' + body + "\n  ]" if events else '  "events": []')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def from_json(text: str, source: str = "scenario") -> Scenario:
    """Parse a scenario. Raises ScenarioError, in one line that names ``source``, if ``text`` is not a valid one."""
    scenario, reason = None, ""
    try:
        scenario = Scenario.model_validate_json(text, strict=True)  # true is not 1, and "4" is not 4
    except ValidationError as error:
        reason = complaint(error)
        if error.error_count() == 1 and error.errors(include_url=False)[0]["type"] == "json_invalid":
            raise ScenarioError(f"{source}: {reason}") from None
    try:
        names = json.loads(text, object_pairs_hook=_refuse_duplicate_names, parse_int=str, parse_float=str)
    except _DuplicateName as error:
        name = one_line(str(error), MOST_CHARACTERS)
        raise ScenarioError(f"{source}: '{name}' is given twice; remove one of them") from None
    if isinstance(names, dict) and "schema_version" not in names:
        raise ScenarioError(f'{source}: schema_version is missing; add "schema_version": {SCHEMA_VERSION}')
    if scenario is None:  # said last: the two reasons above explain it better
        raise ScenarioError(f"{source}: {reason}")
    return scenario


class _DuplicateName(Exception):
    """A JSON object contains a name more than once; the parser would silently keep only one of its values."""


def _refuse_duplicate_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = Counter(name for name, _ in pairs)
    for name, count in names.items():
        if count > 1:
            raise _DuplicateName(name)
    return dict(pairs)


def load(path: Path) -> Scenario:
    """Read a scenario file. Raises ScenarioError if it cannot be read or does not contain a valid scenario."""
    source = one_line(str(path), MAX_PATH)  # the name itself may contain a line break
    try:
        text = _read(path, source).decode("utf-8")
    except OSError as error:
        mend = f"; name the saved cases in it, as {source}/*.json" if isinstance(error, IsADirectoryError) else ""
        raise ScenarioError(f"{source}: cannot be read: {error.strerror or error}{mend}") from None
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{source}: cannot be read: {error}; save it as UTF-8") from None
    if text.startswith("\ufeff"):
        raise ScenarioError(f"{source}: begins with a byte order mark; save it as UTF-8 without one")
    return from_json(text, source)


def _read(path: Path, source: str) -> bytes:
    """The content of a regular file of a case's size. Raises ScenarioError for any other: a device may never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would block
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ScenarioError(f"{source}: is not a regular file")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ScenarioError(f"{source}: has more than {MAX_FILE_BYTES:,} bytes, which no case needs")
    return content
