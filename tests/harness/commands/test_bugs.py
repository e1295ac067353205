"""The command ``bugs``: what it refuses, and what it reports when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nsa_oracle.harness.__main__ import app  # with all commands: a single one would need no name
from nsa_oracle.harness.bugs.kill import Kill
from nsa_oracle.harness.bugs.zoo import ZOO
from nsa_oracle.harness.checks.check import Check
from nsa_oracle.harness.commands import bugs
from nsa_oracle.harness.scenarios.files import to_json
from nsa_oracle.harness.signals import INTERRUPTED
from tests.support.command_line import assert_one_line_error, harness
from tests.support.metadata_cases import CROWDED


def test_report_that_cannot_be_written_is_refused_before_the_hunt(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for option in ("--json", "--html"):
        words = ("bugs", "--device", "cpu", option)
        assert_one_line_error(harness(*words, str(tmp_path / "absent" / "kills")), option, "cannot be written")
        assert_one_line_error(harness(*words, str(tmp_path)), option, "cannot be written")
        assert_one_line_error(harness(*words, str(pipe)), option, "cannot be written: it is a pipe")


BUG = ZOO["workspace-cleared-by-the-mirror"]
THREE = [ZOO["limit-frozen-above-the-capture"], BUG, ZOO["maximum-of-no-lengths"]]


def test_a_hunt_of_nothing_is_refused() -> None:
    name = next(bug.name for bug in ZOO.values() if bug.gpu)
    done = harness("bugs", "--only", name, "--device", "cpu")
    assert_one_line_error(done, f"nothing was hunted: {name}: to be seen it needs a GPU")


@pytest.mark.parametrize(("meant", "code"), [(True, INTERRUPTED), (False, 1)])
def test_a_hunt_that_is_interrupted_prints_its_results(
    meant: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tidied = []

    def one_kill(*_: Any) -> Iterator[Kill]:
        yield Kill(BUG.name, Check.CAPTURE, meant, 1, 0.0, case=to_json(CROWDED))
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # ``timeout`` sends two
            time.sleep(0.1)
            tidied.append(True)
        raise AssertionError("the signal was lost")

    monkeypatch.setattr(bugs, "hunt_all", one_kill)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))  # put back what --device cpu sets
    only = [word for bug in THREE for word in ("--only", bug.name)]
    file = tmp_path / "kills.json"
    done = CliRunner().invoke(app, ["bugs", "--device", "cpu", "--json", str(file), *only])
    assert done.exit_code == code, done.output
    assert done.output.splitlines()[-1] == "interrupted: 1 of 3 bugs"
    assert [kill["bug"] for kill in json.loads(file.read_text())] == [BUG.name]
    assert tidied
