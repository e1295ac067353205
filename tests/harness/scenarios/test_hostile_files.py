"""Whatever a file contains, it is read within limits or refused in one line that names place and remedy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import UNUSABLE, environment_of_children
from tests.support.hostile_files import ESCAPES, Hostile, case, hostile_files
from tests.support.process_memory import tells_memory
from tests.support.project import PROJECT

FILES = hostile_files()
MOST_MEMORY = 1 << 30
LIBRARY = re.compile(
    r"Input should|Field required|Extra inputs|Value error|valid (integer|string|boolean)|extract tag|should have"
    r"|discriminator|pydantic|Traceback|validation|\(and \d"
)
pytestmark = tells_memory


def outcomes(given: list[Any], most_seconds: float = 300) -> list[dict[str, Any]]:
    """What a child made of each path or command line. A hang ends in an error."""
    lines = "".join(json.dumps(one) + "\n" for one in given)
    command = [sys.executable, "-m", "tests.support.hostile_child"]
    environment = environment_of_children()
    done = subprocess.run(
        command, input=lines, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=most_seconds
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(given), f"the child ended at {given[len(found)]}: {done.stderr[-2000:]}"
    return found


def is_plain(text: str) -> bool:
    return all(character.isprintable() for character in text.replace("\n", ""))


def complaints(file: Hostile, path: str, refusal: str) -> list[str]:
    """What a refusal should not be."""
    rules = {
        "names the file first": refusal.startswith(f"{path}: "),
        "is one line": len(refusal.splitlines()) == 1 and is_plain(refusal),
        "is short": len(refusal) < len(path) + 420,
        "has the project's own words": LIBRARY.search(refusal.removeprefix(path)) is None,
        "says what is wrong": all(part in refusal for part in file.says),
    }
    return [f"{file.name}: not so: {rule}: {refusal[:600]}" for rule, holds in rules.items() if not holds]


def test_every_file_is_read_or_refused(tmp_path: Path) -> None:
    assert len(FILES) >= 500
    assert len({file.name for file in FILES}) > 500
    paths = [str(file.write(tmp_path, number)) for number, file in enumerate(FILES)]
    wrong, refused = [], 0
    for file, path, found in zip(FILES, paths, outcomes(paths), strict=True):
        if "fault" in found:
            wrong.append(f"{file.name}: {found['fault'][:300]}")
        elif "refusal" in found:
            refused += 1
            wrong += complaints(file, path, found["refusal"])
            if file.loads is True:
                wrong.append(f"{file.name}: should be read: {found['refusal'][:300]}")
        else:
            if file.loads is False:
                wrong.append(f"{file.name}: was read")
            if not is_plain(found["story"]):
                wrong.append(f"{file.name}: unprintable characters in the story")
        assert found["peak"] < MOST_MEMORY, file.name
    assert not wrong, f"{len(wrong)} of {len(FILES)}:\n" + "\n".join(wrong)
    assert refused > 400


def one_of_each_kind() -> list[Hostile]:
    """The files made by hand, and one of each kind of spoilt ones."""
    kinds: dict[str, Hostile] = {}
    for file in FILES:
        if file.loads is False:
            kinds.setdefault(re.sub(r"^.*?: |[\d.\[\]]+|0x\w+", "", file.name), file)
    return list(kinds.values())


def test_commands_refuse_in_one_line_with_exit_code_2(tmp_path: Path) -> None:
    files = one_of_each_kind()
    assert len(files) >= 60
    paths = [str(file.write(tmp_path, number)) for number, file in enumerate(files)]
    given = [
        [command, *options, path]
        for path in paths
        for command, *options in (("show",), ("replay", "--device", "cpu", "--in-process"), ("tiers",))
    ]
    wrong = []
    for words, found in zip(given, outcomes(given), strict=True):
        is_right = (
            found["code"] == UNUSABLE
            and not found["out"]
            and not found["fault"]
            and len(found["err"].splitlines()) == 1
            and found["err"].startswith(f"error: {words[-1]}: ")
        )
        if not is_right:
            wrong.append(f"{words}: {found}"[:600])
        assert found["peak"] < MOST_MEMORY, words
    assert not wrong, f"{len(wrong)} of {len(given)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (case([{"event": "join", "seq_len": 3}]), "it has no replay and no eager call"),
        (case(optimizations=[ESCAPES]), "unknown optimization '"),
        (case(optimizations=["x" * 9] * 9000), "unknown optimization '"),
    ],
    ids=["no call", "escapes", "many switches"],
)
def test_what_can_be_shown_but_not_judged_is_refused_by_replay(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    path.write_bytes(content)
    shown, judged = outcomes([["show", str(path)], ["replay", "--device", "cpu", "--in-process", str(path)]])
    assert shown["code"] == 0
    assert is_plain(shown["out"])
    assert (judged["code"], judged["out"]) == (UNUSABLE, "")
    assert len(judged["err"].splitlines()) == 1, judged["err"]
    line = judged["err"].strip()
    assert line.startswith(f"error: {path}: ")
    assert says in line, line


def test_name_of_a_file_does_not_break_the_line(tmp_path: Path) -> None:
    path = tmp_path / f"{ESCAPES}.json"
    path.write_bytes(b"{}")
    (found,) = outcomes([str(path)])
    assert is_plain(found["refusal"])
    assert len(found["refusal"].splitlines()) == 1
