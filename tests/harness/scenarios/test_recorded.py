"""Whatever a record contains, it is read within limits or refused in one line."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.scenarios.recorded import MAX_LINE_BYTES, read_record
from nsa_oracle.harness.scenarios.translation import Import, imported
from tests.support.recordings import HEAD, called, written

GOOD = {"n": 0, **called("DECODE", [1], [4])}


def text(*lines: Any) -> bytes:
    return b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "garbage": (bytes(random.Random(0).randbytes(5000)), "is no record of nsa-oracle"),
    "no head": (text(GOOD), "line 1: is no record of nsa-oracle"),
    "not JSON": (text(HEAD) + b"{'n': 0}\n", "line 2: it is not JSON"),
    "cut within": (text(HEAD) + text(GOOD)[:50] + b"\n" + text(GOOD), "line 2: it is not JSON"),
    "list": (text(HEAD, [1]), "line 2: the line: must be an object in braces"),
    "deep": (text(HEAD) + b"[" * 100_000 + b"\n", "line 2: it is not JSON"),
    "later version": (text(HEAD | {"nsa_oracle_record": 2}), "nsa_oracle_record: must be at most 1"),
    "text for a number": (text(HEAD, GOOD | {"n": "0"}), "n: must be a whole number"),
    "true for a number": (text(HEAD, GOOD | {"bs": True}), "bs: must be a whole number"),
    "negative": (text(HEAD, GOOD | {"seq_lens": [-4]}), "seq_lens[0]: must be at least 0"),
    "huge": (text(HEAD, GOOD | {"seq_lens": [10**4000]}), "seq_lens[0]: must be"),
    "many mistakes": (text(HEAD, GOOD | {"seq_lens": ["x"] * 10**6}), "seq_lens[0]: must be a whole number"),
    "NaN": (text(HEAD, GOOD | {"seq_lens": [float("nan")]}), "line 2"),
    "float": (text(HEAD, GOOD | {"pool_rows": [1.5]}), "pool_rows[0]: must be a whole number"),
    "null": (text(HEAD, GOOD | {"n": None}), "n: must be a whole number"),
    "table": (text(HEAD, GOOD | {"table": [[[4]]]}), "line 2: table[0][0]"),
    "pool": (text(HEAD | {"pool": [0, 5]}), "pool[0]: must be at least 1"),
    "config": (text(HEAD | {"config": {"page_size": [4]}}), "line 1: config"),
    "long line": (text(HEAD) + b" " * (MAX_LINE_BYTES + 2), "line 2: has more than"),
    "bytes": (text(HEAD) + b'{"n":0,"call":"\xff"}\n', "line 2: it is not JSON"),
    "pool too large": (text(HEAD | {"pool": [1 << 40, 5]}, GOOD), "pool_size: must be at most 4096"),
    "run of 2^31": (text(HEAD, GOOD | {"table": [[[-(1 << 31), (1 << 31) - 1]]]}), "belongs to no page"),
    "escapes": (text(HEAD, GOOD | {"mode": "\x1b[2J\u202e\n"}), "there is no such mode"),
    "size unknown to a case": (text(HEAD | {"config": {**HEAD["config"], "num_steps": 99}}, GOOD), "num_steps"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, reason = HOSTILE[name]
    file = tmp_path / "server.jsonl"
    file.write_bytes(content)
    with pytest.raises(ScenarioError) as refused:
        imported(read_record(file), Import())
    (line,) = str(refused.value).splitlines()
    assert line.startswith(str(file))
    assert reason in line
    assert len(line) < len(str(file)) + 420
    assert line.isprintable()


def test_a_last_line_that_is_cut_short_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "server.jsonl"
    whole = text(HEAD, GOOD, GOOD | {"n": 1})
    for length in range(len(text(HEAD, GOOD)), len(whole)):
        file.write_bytes(whole[:length])
        assert len(read_record(file).calls) == 1


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file, reason in (
        (tmp_path / "absent", "cannot be read"),
        (tmp_path, "cannot be read|regular"),
        (tmp_path / "pipe", "not a regular"),
    ):
        with pytest.raises(ScenarioError, match=reason):
            read_record(file)


def test_the_last_session_and_what_is_missing_are_said(tmp_path: Path) -> None:
    file = written(tmp_path, called("DECODE", [1], [4]))
    head = HEAD | {"session": "b"}
    file.write_bytes(file.read_bytes() + text(head, GOOD | {"seq_lens": [7], "dropped": 3}))
    found = read_record(file)
    assert [call.seq_lens for call in found.calls] == [(7,)]
    assert [note.removeprefix(str(file)) for note in found.notes] == [
        " has 2 sessions; the last one is imported",
        "3 calls could not be recorded in time",
    ]


def test_numbers_of_a_later_recorder_are_left_alone(tmp_path: Path) -> None:
    file = written(tmp_path, called("DECODE", [1], [4], something_new=[1]))
    assert len(read_record(file).calls) == 1
