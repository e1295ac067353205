"""The command ``mutants``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from nsa_oracle.harness.mutants.mutants import all_mutants
from tests.support.command_line import UNUSABLE, assert_one_line_error, harness
from tests.support.mutants import STORE


def mutants(*words: str) -> subprocess.CompletedProcess[str]:
    return harness("mutants", *words)


def test_the_list() -> None:
    done = mutants("--list", "--file", STORE)
    assert done.returncode == 0, done.stderr
    assert f"{STORE}:" in done.stdout
    assert "store-dropped" in done.stdout


def test_one_mutant_from_end_to_end(tmp_path: Path) -> None:
    chosen = next(m for m in all_mutants("multi_step.py") if m.edit.operator == "not-dropped")  # any replay sees it
    records = tmp_path / "records.jsonl"
    done = mutants("--only", chosen.id, "--cases", "0", "--jobs", "1", "--json", str(records))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mutants: 1 of 1 killed, 0 survived" in done.stdout
    (record,) = (json.loads(line) for line in records.read_text().splitlines())
    assert (record["id"], record["fate"]) == (chosen.id, "killed")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--file", "no/such.py"), ("--file no/such.py", "no file of optimized/")),
        (("--only", "topk.py:1:none:1"), ("--only topk.py:1:none:1", "--list names them all")),
        (("--sample", "1", "--json", "/no/such/folder/x"), ("--json", "cannot be written")),
    ],
)
def test_options_that_cannot_be_used(words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert_one_line_error(mutants(*words), *parts)


def test_a_number_that_cannot_be_used() -> None:
    done = mutants("--sample", "0")
    assert done.returncode == UNUSABLE
    assert "Traceback" not in done.stderr
