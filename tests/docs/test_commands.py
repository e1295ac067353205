"""Every command of every page is a real one: targets of make, options of pytest, commands and their options."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from nsa_oracle.harness.__main__ import app
from nsa_oracle.harness.search.drawing import PROFILES, SHARDS
from nsa_oracle.harness.signals import INTERRUPTED, TERMINATED
from tests.support.pages import PAGES, commands, fenced, first_column, section
from tests.support.project import PROJECT

OPTIONS = PAGES["docs/options.md"]
TOOL = Path(sys.executable).with_name("nsa-oracle")  # where an installation puts the command
IN_THE_ENVIRONMENT = {"pytest", "nsa-oracle", "python"}
ALL_COMMANDS = sorted({command for text in PAGES.values() for command in commands(text)})


@cache
def tool() -> dict[str, Any]:
    """The commands of the tool by name, as click sees them (newer versions of typer have a click of their own)."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def words_behind(pattern: str) -> list[list[str]]:
    """The words of each command behind its beginning, which ``pattern`` matches as a whole."""
    found = []
    for command in ALL_COMMANDS:
        if match := re.match(rf"(?:[A-Z_]+=\S+ )?(?:{pattern})(?= |$)", command):
            found.append(shlex.split(command[match.end() :], comments=True))
    return found


def tool_calls() -> list[list[str]]:
    """Arguments of the command-line tool, however it is called."""
    calls = words_behind(r"(?:\.venv/bin/)?nsa-oracle|(?:\.venv/bin/)?python3? -m (?:nsa_oracle|harness)")
    for words in words_behind("make oracle"):
        calls += [shlex.split(word.removeprefix("ARGS=")) for word in words if word.startswith("ARGS=")]
    return [call for call in calls if call]


def pytest_calls() -> list[list[str]]:
    """Arguments of pytest, however it is called."""
    calls = words_behind(r"(?:\.venv/bin/)?pytest|(?:\.venv/bin/)?python3? -m pytest")
    for words in words_behind("make check|make test"):
        calls += [shlex.split(word.removeprefix("ARGS=")) for word in words if word.startswith("ARGS=")]
    return calls


@pytest.mark.parametrize("call", tool_calls(), ids=shlex.join)
def test_calls_of_the_tool_are_understood(call: list[str]) -> None:
    """Commands exist, and their options, with values of the right kind."""
    name, *words = call
    if name in ("--help", "COMMAND"):
        return
    command = tool()[name]
    if words and not words[0].startswith("-") and "..." in words[0]:
        words = ["FILE", *words[1:]]
    command.make_context(name, words)


def test_every_command_is_described() -> None:
    assert {call[0] for call in tool_calls()} >= set(tool())


def test_table_of_commands_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)[^`]*` \| .* \| (.*)\|$", section(OPTIONS, "Commands"), re.MULTILINE)
    said = {name: set(re.findall(r"`(--[\w-]+)`", options)) for name, options in rows}
    offered = {}
    for name, command in tool().items():
        options = [param for param in command.params if param.param_type_name == "option" and param.name != "help"]
        # A switch is named by the side that is not the default.
        offered[name] = {(option.secondary_opts or option.opts)[0] for option in options}
    assert said == offered


@cache
def options_of_pytest() -> set[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "--help"]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=True)
    return set(re.findall(r"(?<![\w-])(--[\w-]+)", done.stdout))


def test_table_of_options_is_complete() -> None:
    offered = {option for option in options_of_pytest() if option.startswith("--oracle-")}
    assert offered
    assert set(re.findall(r"^\| `(--oracle-[\w-]+)", OPTIONS, re.MULTILINE)) == offered
    assert {option for text in PAGES.values() for option in re.findall(r"--oracle-[\w-]*\w", text)} <= offered


def test_calls_of_pytest_name_options_and_files_that_exist() -> None:
    calls = pytest_calls()
    assert calls
    for call in calls:
        named = {word.partition("=")[0] for word in call if word.startswith("--")}
        assert named <= options_of_pytest(), shlex.join(call)
        ours = {word for word in call if word.startswith("tests/")} - {"tests/test_my_backend.py"}  # the reader's
        assert all((PROJECT / word).exists() for word in ours), shlex.join(call)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {match.group(1) for command in ALL_COMMANDS if (match := re.match(r"make ([\w-]+)(?= |$)", command))}
    assert {"check", "test", "setup", "oracle"} <= named <= targets


def test_commands_of_the_readme_need_no_activated_environment() -> None:
    for block in fenced("sh", PAGES["README.md"]):
        for line in block.splitlines():
            assert line.startswith(("make ", ".venv/bin/")), line


def test_commands_of_the_environment_are_installed_there() -> None:
    named = {name for text in PAGES.values() for name in re.findall(r"\.venv/bin/([\w-]+)", text)}
    assert {"pytest", "nsa-oracle"} <= named <= IN_THE_ENVIRONMENT | {"activate"}


@pytest.mark.skipif(not TOOL.exists(), reason="nsa-oracle is not installed beside this Python")
def test_the_installed_tool_judges_a_backend_of_the_folder_it_runs_in(tmp_path: Path) -> None:
    """It looks for modules where it is run, as ``python -m`` does."""
    (tmp_path / "my_backend.py").write_text(fenced("python", PAGES["README.md"])[0], encoding="utf-8")
    case = PROJECT / "tests/cases/revert-vectorised-as-shown.json"
    command = [str(TOOL), "replay", str(case), "--device", "cpu", "--backend", "my_backend:Nothing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "has no attribute Nothing" in done.stderr


def test_exit_codes_are_those_of_pytest_and_of_the_tool() -> None:
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", section(OPTIONS, "Exit codes"), re.MULTILINE))
    codes = {command: [int(code) for code in re.findall(r"(?:^|, )(\d+) ", said)] for command, said in rows.items()}
    assert codes == {
        # pytest has 6 only if it is told to count warnings.
        "pytest": [*(code for code in pytest.ExitCode if code <= 5), INTERRUPTED, TERMINATED],
        "nsa-oracle": [0, 1, 2, INTERRUPTED, TERMINATED],
        "make": [0, 2],
    }


def test_numbers_of_cases_are_those_of_the_profiles() -> None:
    smoke, dev, pr, nightly = (
        f"{profile.cases:,} + {profile.layer_cases:,}"
        for profile in (PROFILES[name] for name in ("smoke", "dev", "pr", "nightly"))
    )
    assert f"{smoke}, {dev}, {pr} or {nightly} cases" in OPTIONS
    named = {said for text in PAGES.values() for said in re.findall(r"[\d,]+ \+ [\d,]+(?= (?:generated )?cases)", text)}
    assert named == {smoke, dev, pr, nightly}
    said = " ".join(OPTIONS.split())
    assert f"{2 * SHARDS} test items, {SHARDS} of metadata alone and {SHARDS} with a layer" in said


def test_table_of_options_names_every_profile() -> None:
    (profiles,) = re.findall(r"`--oracle-profile ([^`]*)`", section(OPTIONS, "Options of a run"))
    assert profiles.replace("\\", "").split("|") == list(PROFILES)
    assert len(first_column(section(OPTIONS, "Options of a run"))) > len(PROFILES)
