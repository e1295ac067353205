"""The survey command: what it prints, saves and survives, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from nsa_oracle.harness.commands.app import Device
from nsa_oracle.harness.commands.surveying import surveyed_backend
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Join, Replay
from nsa_oracle.harness.search.survey import RUNS
from nsa_oracle.harness.signals import INTERRUPTED
from tests.support.command_line import FAILS, PASSES, UNUSABLE, assert_one_line_error, harness, replay, saved
from tests.support.layer_cases import WITH_LAYER
from tests.support.metadata_cases import CROWDED, DECODE, VERIFY, case, one_replay

CLEAN, LAYERS = "tests.support.backends.clean:Clean", "tests.support.layers"
SHRINKING = re.compile(r"shrinking (?P<row>.+): (?P<events>\d+) events? so far, up to \d+ s left$")


def test_unusable_layer_is_not_surveyed() -> None:
    done = harness("survey", "--device", "cpu", "--layer", f"{LAYERS}.refused:WithoutStages")
    assert_one_line_error(done, "WithoutStages has none of the methods")


DIES = """
import os
from nsa_oracle.optimized.layer import SparseAttention

class Dies(SparseAttention):
    def sparse_mla(self, *inputs):
        os.kill(os.getpid(), 9)
"""


def test_survey_goes_on_behind_a_case_that_ends_its_process(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    done = harness("survey", "--layer", "dies:Dies", "--cases", "2", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == FAILS, done.stderr
    assert re.search(r"│ runs every call +│ 2 +│ 2 +│ the process ended \(signal SIGKILL\) ", done.stdout), done.stdout
    (command,) = (line for line in done.stdout.splitlines() if line.startswith("  replay: "))
    again = replay(shlex.split(command)[5], "--layer", "dies:Dies", cwd=tmp_path)
    assert again.returncode == FAILS, again.stdout + again.stderr
    assert "SIGKILL" in again.stdout
    told = "".join(re.sub(r"[│\n]", " ", done.stdout).split())
    assert f"duringthecallof{tmp_path}/dies.py:6insparse_mla" in told, done.stdout


BACKEND_DIES = """
import os, signal
from nsa_oracle.reference.multi_step import MultiStepBackend

class Dies(MultiStepBackend):
    modes = ("DECODE",)

    def init_forward_metadata_capture_cuda_graph(self, forward_batch):
        super().init_forward_metadata_capture_cuda_graph(forward_batch)
        if forward_batch.batch_size > 1:
            os.kill(os.getpid(), signal.SIGKILL)

class DiesAtOnce(MultiStepBackend):
    os.kill(os.getpid(), signal.SIGKILL) if os.environ.get("DIE") else None
"""


def test_survey_of_a_backend_goes_on_behind_a_case_that_ends_its_process(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(BACKEND_DIES)
    words = ("--backend", "dies:Dies", "--no-saved", "--cases", "4", "--device", "cpu", "--json", "rows.json")
    done = harness("survey", *words, cwd=tmp_path)
    assert done.returncode == FAILS, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    died = rows["keeps its process alive"]
    assert died["checked"] == 4, "the cases behind it are surveyed"
    assert 0 < died["broken"] < 4
    method = "init_forward_metadata_capture_cuda_graph"
    assert f"the process ended (signal SIGKILL) during the call of {tmp_path}/dies.py:8 in {method}" in died["finding"]
    assert rows["page_table_1"]["checked"] > 0
    assert [name for name, row in rows.items() if row["broken"]] == ["keeps its process alive"]
    again = replay(died["case"], "--backend", "dies:Dies", cwd=tmp_path)
    assert again.returncode == FAILS, again.stdout + again.stderr
    assert "SIGKILL" in again.stdout


DIES_LATER = """
import os, signal
from tests.support.backends.declared import StaleTable

class DiesLater(StaleTable):
    modes = ("DECODE",)
    built = 0

    def __init__(self, config, req_to_token):
        super().__init__(config, req_to_token)
        DiesLater.built += 1
        if DiesLater.built == 12:  # while a case is being made smaller
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_backend_that_ends_the_process_while_a_case_is_made_smaller_keeps_its_rows(tmp_path: Path) -> None:
    (tmp_path / "later.py").write_text(DIES_LATER)
    words = ("--backend", "later:DiesLater", "--no-saved", "--cases", "2", "--device", "cpu", "--json", "rows.json")
    done = harness("survey", *words, cwd=tmp_path)
    assert done.returncode == FAILS, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"] if row["broken"]}
    assert set(rows) == {"cu_seqlens_k", "real_page_table"}
    assert all((tmp_path / row["case"]).exists() for row in rows.values())


def test_a_backend_that_ends_the_process_that_loads_it_is_not_surveyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dies.py").write_text(BACKEND_DIES)
    monkeypatch.setenv("DIE", "1")
    done = harness("survey", "--backend", "dies:DiesAtOnce", "--cases", "4", "--device", "cpu", cwd=tmp_path)
    assert_one_line_error(done, "backend 'dies:DiesAtOnce': the process ended (signal SIGKILL) while it was loaded")


def test_survey_refuses_in_one_line() -> None:
    assert_one_line_error(harness("survey", "--layer", "tests.support.layers.refused:ForSevenHeads"), "num_heads", "7")


ENDED = """
import os, signal, subprocess, time
from nsa_oracle.optimized.layer import SparseAttention as Capturable

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background

class Ends(Capturable):
    built, last = 0, 12  # one was to try it out

    def __init__(self, *sizes):
        super().__init__(*sizes)
        Ends.built += 1
        if Ends.built == self.last:
            subprocess.run(["kill", "-{signal}", str(os.getpid())], check=True)
            time.sleep(60)

class Breaks(Ends):
    def sparse_mla(self, *inputs):
        out, lse = super().sparse_mla(*inputs)
        return out * 2, lse
"""


@pytest.mark.parametrize(
    ("layer", "signal", "code"),
    [("Ends", "TERM", INTERRUPTED), ("Ends", "INT", INTERRUPTED), ("Breaks", "TERM", FAILS)],
)
def test_survey_that_is_ended_prints_its_results(layer: str, signal: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "ended.py").write_text(ENDED.format(signal=signal))
    done = harness("survey", "--device", "cpu", "--layer", f"ended:{layer}", "--cases", "50", cwd=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.search(r"^interrupted: \d+ of 50 cases$", done.stdout, re.MULTILINE)
    assert "runs every call" in done.stdout


HANGS = """
import time
from nsa_oracle.optimized.layer import SparseAttention
from tests.support.backends.declared import StaleTable

class Backend(StaleTable):
    modes = ("DECODE",)

    def init_forward_metadata(self, batch):
        super().init_forward_metadata(batch)
        while batch.batch_size > 1:
            pass

class Layer(SparseAttention):
    def sparse_mla(self, *inputs):
        time.sleep(1e6)
"""


def test_a_case_that_does_not_end_costs_a_survey_that_case_only(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    two = saved(tmp_path, case(Join(seq_len=3), Join(seq_len=4), Eager(mode=DECODE)), "two.json")
    one = saved(tmp_path, one_replay(DECODE), "one.json")
    words = ("survey", "--device", "cpu", "--timeout", "2", "--json", "rows.json")
    files = ("--case", two, "--case", one, "--cases", "0")
    done = harness(*words, "--backend", "hangs:Backend", *files, cwd=tmp_path)
    assert done.returncode == FAILS, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    (hung,) = (row for row in rows if row["finding"].startswith("does not end"))
    assert (hung["call"], hung["mode"], hung["name"]) == ("eager", "DECODE", "runs")
    assert re.search(r"hangs\.py:\d+ in init_forward_metadata: got still running after 2 seconds", hung["finding"])
    assert hung["replay"].endswith("--backend hangs:Backend --timeout 2")
    assert any(row["name"] == "real_page_table" and row["broken"] for row in rows), "the other case is surveyed"
    done = harness(*words, "--layer", "hangs:Layer", "--cases", "1", cwd=tmp_path)
    assert done.returncode == FAILS, done.stdout + done.stderr
    (hung,) = (row for row in json.loads((tmp_path / "rows.json").read_text())["rows"] if row["broken"])
    assert (hung["property"], hung["replay"].split()[-4:]) == (RUNS, ["--layer", "hangs:Layer", "--timeout", "2"])
    assert "still running after 2 seconds" in hung["finding"]


@pytest.mark.parametrize("subject", [("--layer", "docs.examples.my_layer:MyAttention"), ("--backend", CLEAN)])
def test_survey_without_time_judges_nothing_and_fails(subject: tuple[str, str]) -> None:
    words = ("survey", "--device", "cpu", *subject, "--cases", "50")
    done = harness(*words, "--budget", "0")
    assert done.returncode == FAILS, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "NOT JUDGED: no case was surveyed; give it more time"
    assert lines[-1] == "out of time: 0 of 50 cases"
    assert "no row is broken" not in done.stdout
    assert harness(*words, "--budget", "-1").returncode == UNUSABLE


def test_survey_of_a_backend_none_of_whose_fields_is_judged_fails() -> None:
    backend = "tests.support.backends.unjudged:NothingJudged"
    done = harness("survey", "--device", "cpu", "--backend", backend, "--cases", "1")
    assert done.returncode == FAILS, done.stdout + done.stderr
    assert "NOT JUDGED: no cell of any field was compared" in done.stdout


def test_survey_needs_one_subject() -> None:
    for words in ((), ("--backend", CLEAN, "--layer", f"{LAYERS}.clean:SharesOutputs")):
        assert_one_line_error(harness("survey", "--device", "cpu", *words), "name one of --layer and --backend")


def test_survey_of_a_backend_saves_a_case_that_its_command_replays(tmp_path: Path) -> None:
    words = ("survey", "--device", "cpu", "--no-saved", "--cases", "6", "--save", str(tmp_path / "cases"))
    done = harness(*words, "--backend", "tests.support.backends.declared:StaleTable", cwd=tmp_path)
    assert done.returncode == FAILS, done.stdout + done.stderr
    assert re.search(r"^\d+ rows, [\d,]+ checks$", done.stdout, re.MULTILINE)
    command = next(line for line in done.stdout.splitlines() if line.startswith("  replay: "))
    file = Path(shlex.split(command)[5])
    assert file.parent == tmp_path / "cases"
    again = replay(str(file), "--backend", "tests.support.backends.declared:StaleTable")
    assert again.returncode == FAILS, again.stdout + again.stderr
    clean = harness(*words, "--backend", CLEAN, "--json", "rows.json", cwd=tmp_path)
    assert clean.returncode == PASSES, clean.stdout + clean.stderr
    assert "no row is broken" in clean.stdout
    reached = json.loads((tmp_path / "rows.json").read_text())["reached"]
    for told in (done.stdout, clean.stdout):
        assert f"\nreached: 6 cases, largest batch {reached['largest batch']} requests, at most " in told
        assert f"\njudged: {sum(reached['replays'].values())} replays (" in told


def test_a_case_that_fails_only_behind_others_has_no_command(tmp_path: Path) -> None:
    backend = "tests.support.backends.declared:WrongOnceInAWhile"
    words = ("survey", "--device", "cpu", "--cases", "6", "--save", str(tmp_path / "cases"), "--json", "rows.json")
    done = harness(*words, "--backend", backend, cwd=tmp_path)
    assert done.returncode == FAILS, done.stdout + done.stderr
    assert "  replay: " not in done.stdout
    broken = [row for row in json.loads((tmp_path / "rows.json").read_text())["rows"] if row["broken"]]
    assert broken
    for row in broken:
        assert (row["replay"], row["case"] is None) == ("", False)
        assert f"\n  case: {row['case']} (passes by itself)\n" in done.stdout
        assert replay(row["case"], "--backend", backend).returncode == PASSES


def test_survey_of_a_layer_saves_a_case_that_its_command_replays(tmp_path: Path) -> None:
    layer = f"{LAYERS}.in_graph:LooksAtLengths"
    words = ("survey", "--device", "cpu", "--cases", "3", "--save", str(tmp_path / "cases"), "--json", "rows.json")
    done = harness(*words, "--layer", layer, cwd=tmp_path)
    assert done.returncode == FAILS, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    number = lines.index(RUNS)
    command = shlex.split(lines[number + 1].removeprefix("  replay: "))
    assert command[-4:] == ["--device", "cpu", "--layer", layer]
    assert Path(command[4]).parent == tmp_path / "cases"
    again = replay(command[4], "--layer", layer)
    assert again.returncode == FAILS, again.stdout + again.stderr
    assert "capture rejected" in again.stdout
    (row,) = (row for row in json.loads((tmp_path / "rows.json").read_text())["rows"] if row["broken"])
    assert (row["case"], shlex.split(row["replay"])) == (command[4], command)


def test_saved_cases_are_surveyed_too(tmp_path: Path) -> None:
    file = saved(tmp_path, one_replay(DECODE))
    words = ("--backend", "tests.support.backends.declared:StaleTable", "--cases", "1", "--device", "cpu")
    checked = []
    for more in (("--no-saved",), ("--case", str(file))):
        done = harness("survey", *words, *more, "--json", "rows.json", cwd=tmp_path)
        assert done.returncode == FAILS, done.stdout + done.stderr
        rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
        checked.append(sum(row["checked"] for row in rows if row["name"] == "cache_seqlens_int32"))
    assert checked[1] > checked[0]


def test_saved_cases_alone_are_surveyed_without_a_drawn_one(tmp_path: Path) -> None:
    one, none = saved(tmp_path, one_replay(DECODE)), ("--cases", "0", "--device", "cpu")
    words = ("survey", *none, "--backend", CLEAN)
    done = harness(*words, "--case", one, "--json", "rows.json", cwd=tmp_path)
    assert done.returncode == PASSES, done.stdout + done.stderr
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["cases"] == 0
    (row,) = (row for row in written["rows"] if row["name"] == "cache_seqlens_int32")
    assert (row["mode"], row["checked"]) == ("DECODE", 1)
    for nothing in ((*words, "--no-saved"), ("survey", *none, "--layer", "docs.examples.my_layer:MyAttention")):
        assert_one_line_error(harness(*nothing), "survey: --cases 0 surveys nothing but saved cases of a backend")


RARELY_RIGHT = """
from nsa_oracle.optimized.multi_step import MultiStepBackend

class TablesOf200Requests(MultiStepBackend):
    modes = ("DECODE", "EXTEND")

    def init_forward_metadata(self, batch):
        super().init_forward_metadata(batch)
        if batch.batch_size > 200:
            for step in self.attn_backends:
                step.forward_metadata.page_table_1[200:] = 0
"""


def test_a_survey_of_a_backend_begins_with_the_cases_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "rarely.py").write_text(RARELY_RIGHT)
    words = ("survey", "--cases", "0", "--device", "cpu", "--backend", "rarely:TablesOf200Requests")
    done = harness(*words, "--json", "rows.json", cwd=tmp_path)
    assert done.returncode == FAILS, done.stdout + done.stderr
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["cases"] == 0
    broken = {(row["call"], row["mode"], row["name"]) for row in written["rows"] if row["broken"]}
    assert broken == {
        ("eager", mode, name) for mode in ("DECODE", "EXTEND") for name in ("page_table_1", "real_page_table")
    }


def test_saved_cases_behind_one_that_ends_its_process_are_surveyed(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(BACKEND_DIES)
    two = case(Capture(mode=DECODE, buckets=(2,)), Join(seq_len=3), Join(seq_len=4), Replay(mode=DECODE))
    files = [saved(tmp_path, two, "two.json"), saved(tmp_path, one_replay(DECODE), "one.json")]
    words = ("--cases", "0", "--device", "cpu", "--case", files[0], "--case", files[1], "--json", "rows.json")
    done = harness("survey", "--backend", "dies:Dies", *words, cwd=tmp_path)
    assert done.returncode == FAILS, done.stdout + done.stderr
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["cases"] == 0
    rows = {row["name"]: row for row in written["rows"]}
    assert rows["keeps its process alive"]["broken"] == 1
    assert rows["cache_seqlens_int32"]["checked"] == 1


def test_saved_cases_that_cannot_be_surveyed_are_refused_in_one_line(tmp_path: Path) -> None:
    file = saved(tmp_path, one_replay(VERIFY))
    only_decode = ("--backend", "tests.support.backends.declared:StaleTable", "--device", "cpu")
    done = harness("survey", *only_decode, "--case", str(tmp_path / "none.json"))
    assert_one_line_error(done, "none.json: cannot be read: No such file or directory")
    layered = saved(tmp_path, WITH_LAYER)
    done = harness("survey", *only_decode, "--case", str(layered))
    assert_one_line_error(done, "it has a layer, and a survey of a backend is without one; replay it")
    done = harness("survey", "--layer", "tests.support.layers.clean:SharesOutputs", "--case", str(file))
    assert_one_line_error(done, "survey: --case is for a backend; replay a case of a layer")


def test_survey_that_cannot_write_says_so(tmp_path: Path) -> None:
    """A file takes the place of its folder while it surveys."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "removes.py").write_text(
        "import pathlib\nfrom tests.support.backends.clean import Clean\n"
        "def Removes(c, r):\n    folder = pathlib.Path('rows')\n    if folder.is_dir():\n"
        "        folder.rmdir()\n        folder.touch()\n    return Clean(c, r)\n"
    )
    words = ("survey", "--device", "cpu", "--cases", "1", "--backend", "removes:Removes", "--json", "rows/rows.json")
    done = harness(*words, cwd=tmp_path)
    assert done.returncode == UNUSABLE
    assert "no row is broken" in done.stdout, "the results are printed all the same"
    (line,) = done.stderr.splitlines()
    assert line.endswith("rows.json: cannot be written: File exists; choose another --json")


@pytest.mark.parametrize(
    ("file", "mend"),
    [
        ("no/rows.json", "name a file in a folder that exists"),
        (".", "it is a folder; name a file"),
        ("pipe", "it is a pipe; name a file"),
    ],
)
def test_rows_that_could_not_be_written_are_refused_before_anything_is_surveyed(
    file: str, mend: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for what in (("--backend", CLEAN), ("--layer", "tests.support.layers.clean:SharesOutputs")):
        done = harness("survey", "--device", "cpu", *what, "--json", file, cwd=tmp_path)
        assert_one_line_error(done, f"--json {file}: cannot be written", mend)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_surveyed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    layer = ("survey", "--device", "cpu", "--layer", f"{LAYERS}.clean:SharesOutputs")
    for words in (("survey", "--device", "cpu", "--backend", CLEAN), layer, ("upstream",)):
        assert_one_line_error(
            harness(*words, "--save", "/proc/x"), "--save /proc/x: cannot be written: ", "name another"
        )
        file = str(tmp_path / "file")
        assert_one_line_error(harness(*words, "--save", file), f"--save {file}: {file} is a file; name a directory")


FOR_NOTHING = "tests.support.backends.declared:DeclaresAbsentForNothing"
ABSENT_LINE = re.compile(
    r"^ABSENT NOT NEEDED: paged_mqa_schedule_metadata in DECODE: there in all \d+ comparisons;", re.M
)


def test_a_needless_declaration_makes_a_survey_fail(tmp_path: Path) -> None:
    done = harness("survey", "--backend", FOR_NOTHING, "--cases", "8", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == FAILS, done.stdout + done.stderr
    assert "no row is broken" in done.stdout
    assert ABSENT_LINE.search(done.stdout), done.stdout


def test_a_needless_declaration_makes_a_replay_fail_that_reaches_it(tmp_path: Path) -> None:
    reaches, passes_by = one_replay(DECODE, paged_mqa_num_sms=2), one_replay(VERIFY, paged_mqa_num_sms=2)
    done = replay(saved(tmp_path, reaches), "--backend", FOR_NOTHING)
    assert done.returncode == FAILS, done.stdout + done.stderr
    assert ABSENT_LINE.search(done.stdout), done.stdout
    done = replay(saved(tmp_path, passes_by), "--backend", FOR_NOTHING)
    assert done.returncode == PASSES, done.stdout + done.stderr


def test_the_row_whose_case_is_made_smaller_is_told_with_its_size() -> None:
    told: list[str] = []

    def show(cases: int, doing: str) -> None:
        told.append(doing)

    backend, known = "tests.support.backends.lengths:SkipsPaddingRows", [(Path("known.json"), CROWDED)]
    done = surveyed_backend(backend, Device.CPU, 0, 0, None, show, known)
    assert told[:2] == ["", ""], "as it begins, and with the case"
    shrinking = [found for doing in told[2:] if (found := SHRINKING.match(doing))]
    assert len(shrinking) == len(told[2:])
    for key, row in done.found.broken.items():
        sizes = [int(found["events"]) for found in shrinking if found["row"] == " ".join(key)]
        assert row.case is not None
        assert sizes[0] > sizes[-1] == len(row.case.events)
