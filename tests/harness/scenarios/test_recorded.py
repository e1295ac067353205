"""Whatever a record contains, it is read within limits or refused in one line."""

from __future__ import annotations

import codecs
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
    "a byte order mark": (codecs.BOM_UTF8 + text(HEAD, GOOD), "line 1: begins with a byte order mark"),
    "no size": (
        text(HEAD | {"config": {"page_size": 16.5}}, GOOD),
        "line 1: config.page_size: must be a whole number or a name, not 16.5",
    ),
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
    "unknown act": (text(HEAD, GOOD | {"act": "replai"}), "line 2: act: cannot be \"replai\"; choose from 'capture', "),
    "no act": (text(HEAD, {"n": 0, "call": "c"}), "line 2: act: is missing; add one of 'capture', 'replay'"),
    "unknown dtype": (
        text(HEAD, GOOD | {"dtypes": {"seq_lens": "int46"}}),
        "line 2: dtypes.seq_lens: cannot be \"int46\"; choose from 'int32' or 'int64'",
    ),
    "unknown tables": (text(HEAD | {"tables": "all"}, GOOD), 'line 1: tables: cannot be "all"'),
    "few digests": (text(HEAD, GOOD | {"digest": []}), "line 2: digest: has 0 rows for 1 of pool_rows; give each one"),
    "many tables": (text(HEAD, GOOD | {"table": [[], []]}), "line 2: table: has 2 rows for 1 of pool_rows"),
    "a call is missing": (
        text(HEAD, GOOD, GOOD | {"n": 3}, GOOD | {"n": 5}),
        "line 3: call 1 is missing in front of call 3; put its line back, or remove the calls before this one",
    ),
    "two calls of one number": (text(HEAD, GOOD, GOOD | {"seq_lens": [5]}), "line 3: call 0 is also in "),
    "more are missing than were dropped": (
        text(HEAD, GOOD, GOOD | {"n": 2, "dropped": 1}, GOOD | {"n": 5, "dropped": 1}),
        "line 4: call 3 is missing in front of call 5",
    ),
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


def test_a_last_line_that_is_cut_short_may_have_a_session_behind_it(tmp_path: Path) -> None:
    """A full disk cuts a line; the server that is started again ends it and appends."""
    file = tmp_path / "server.jsonl"
    for first in (text(HEAD, GOOD)[:-20] + b"\n", text(HEAD)[:-20] + b"\n"):
        file.write_bytes(first + text(HEAD | {"session": "b"}, GOOD, GOOD | {"n": 1}))
        assert len(read_record(file).calls) == 2
    file.write_bytes(text(HEAD, GOOD)[:-20] + b"\n" + text(GOOD | {"n": 1}, HEAD | {"session": "b"}))
    with pytest.raises(ScenarioError, match="line 2: it is not JSON"):
        read_record(file)


def test_calls_may_be_missing_where_the_recorder_left_them_out(tmp_path: Path) -> None:
    """Those that could not be recorded in time, and those of files that are gone: captures are kept of these."""
    file = tmp_path / "server.jsonl"
    captures = ({"n": 0, "call": "c", "sizes": [2, 4]}, {"n": 2, "call": "c", "act": "capture", "mode": "DECODE"})
    kept = (GOOD | {"n": 900}, GOOD | {"n": 901}, GOOD | {"n": 904, "dropped": 2})
    file.with_name("server.jsonl.1").write_bytes(text(HEAD, *captures, *kept))
    file.write_bytes(text(HEAD, *captures, GOOD | {"n": 905}))
    found = read_record(file)
    assert [call.n for call in found.calls] == [0, 2, 900, 901, 904, 905]
    assert found.places[905] == f"{file}, line 4"
    assert found.notes == ("2 calls could not be recorded in time",)


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
