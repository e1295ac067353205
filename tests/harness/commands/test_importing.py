"""The import command: cases that replay, the same on repetition, and one line for what it cannot use."""

from __future__ import annotations

from pathlib import Path

from docs.examples.staging import main as serve
from nsa_oracle.harness.recorder.wrapper import flush
from tests.support.command_line import FAILS, PASSES, assert_one_line_error, harness, replay
from tests.support.pages import PAGES, fenced
from tests.support.recordings import HEAD, called, written

PAGE = PAGES["docs/from-production.md"]
BROKEN, WHOLE = "docs.examples.my_backend:MyBrokenBackend", "docs.examples.my_backend:MyBackend"


def test_the_page_shows_what_happens(tmp_path: Path) -> None:
    file = tmp_path / "server.jsonl"
    assert flush(serve(str(file)).backend)
    done = harness("import", str(file), "-o", "imported", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (PASSES, "")
    printed, failure, _ = fenced("text", PAGE)
    assert done.stdout == printed
    (case,) = (tmp_path / "imported").iterdir()
    assert case.read_text() == fenced("json", PAGE)[0]
    found = replay(str(case), "--backend", BROKEN)
    assert found.returncode == FAILS
    shown = found.stdout.splitlines()
    assert [line for line in failure.splitlines() if line != "..." and line not in shown] == []
    assert replay(str(case), "--backend", WHOLE).returncode == PASSES

    again = harness("import", str(file), "--output", str(tmp_path / "again"))
    assert again.returncode == PASSES
    assert (tmp_path / "again" / case.name).read_bytes() == case.read_bytes()


def test_the_shown_refusal_is_what_is_printed(tmp_path: Path) -> None:
    line = called("MIXED", [0], [3]) | {"call": "init_forward_metadata"}
    file = written(tmp_path, *[called("DECODE", [0], [3])] * 812, line)
    done = harness("import", file.name, cwd=tmp_path)
    assert done.stderr == fenced("text", PAGE)[-1]
    assert_one_line_error(done, "call 812")
    assert not (tmp_path / "imported").exists()


def test_several_cases_and_what_is_said_of_them(tmp_path: Path) -> None:
    calls = [called("DECODE", [1], [3 + number], 2, pool_rows=[1, 0], seq_lens=[3 + number, 1]) for number in range(5)]
    for call in calls:
        call["seq_lens_cpu"] = call["seq_lens"]
    file = written(tmp_path, *calls, called("MIXED", [0], [3]))
    done = harness("import", str(file), "-o", str(tmp_path), "--per-case", "2", "--last", "3", "--skip")
    assert done.returncode == PASSES
    assert done.stdout.splitlines()[:2] == [
        f"{tmp_path}/server.000000-000001.json: 2 calls, 5 events",
        f"{tmp_path}/server.000002-000002.json: 1 call, 3 events",
    ]
    assert "left out: call 5 (eager, MIXED): there is no such mode" in done.stdout
    assert "the record has no capture of 1 graph (DECODE 2): added" in done.stdout


def test_options_that_are_no_use(tmp_path: Path) -> None:
    file = str(written(tmp_path, called("DECODE", [1], [3]), head=HEAD | {"config": {}}))
    assert_one_line_error(harness("import", file), "add --size page_size=...")
    assert_one_line_error(harness("import", file, "--size", "pages=4"), "did you mean page_size=...?")
    assert_one_line_error(harness("import", file, "--size", "page_size"), "--size page_size: did you mean")
    assert_one_line_error(harness("import", str(tmp_path / "absent")), "cannot be read")
    assert_one_line_error(harness("import", "."), ".: cannot be read: Is a directory")
    sizes = [word for size in ("page_size=4", "max_context_len=32", "index_topk=8") for word in ("--size", size)]
    sizes += ["--size", "num_steps=1", "--size", "num_draft_tokens=2"]
    (tmp_path / "file").write_text("")
    done = harness("import", file, *sizes, "-o", str(tmp_path / "file"))
    assert_one_line_error(done, "choose another --output")
