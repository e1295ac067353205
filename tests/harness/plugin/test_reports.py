"""Reports of runs for machines, as people make them: pytest in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from nsa_oracle.harness.findings import Picture
from nsa_oracle.harness.report.document import RunReport, RunVerdict, report_from_json, written_text
from nsa_oracle.harness.scenarios.files import from_json, load
from nsa_oracle.harness.signals import INTERRUPTED
from tests.support.command_line import harness
from tests.support.project import PROJECT
from tests.support.pytest_runs import Run, environment, pytest_command, run

CLEAN, BROKEN = "tests.support.backends.clean:Clean", "tests.support.backends.lengths:VerifyForgetsDrafts"
SHORT = ["--oracle-profile=smoke", f"--oracle-backend={CLEAN}"]
METADATA = ["test_oracle.py::test_scenarios", *SHORT]
ONE_ITEM = ["test_oracle.py::test_scenarios[0]", *SHORT]  # of two cases


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tests = (PROJECT / "tests" / "test_oracle.py").read_text(encoding="utf-8")
    (tmp_path / "test_oracle.py").write_text(tests, encoding="utf-8")
    return tmp_path


def read(file: Path) -> RunReport:
    return report_from_json(written_text(file), str(file))


def test_report_holds_what_the_terminal_shows(folder: Path) -> None:
    done = run(folder, *ONE_ITEM, "--oracle-json=out/deep/report.json")
    report = read(folder / "out/deep/report.json")
    totals = report.totals
    assert [totals.cases, totals.replays, totals.eager_calls, totals.fields, totals.cells] == done.totals
    assert "oracle: json report in out/deep/report.json" in done.output
    assert (report.verdict, report.exit_code, done.exit_code) == (RunVerdict.PASSED, 0, 0)
    (subject,) = report.subjects
    visited = sum(count > 0 for count in subject.classes.values())
    assert f"{visited} of {len(subject.classes)}" in done.output
    assert subject.quota.drawn == {"test_scenarios": 2}
    assert report.environment.profile == "smoke"
    assert list(report.durations) == ["test_oracle.py::test_scenarios"]
    assert list((folder / "out/deep").iterdir()) == [folder / "out/deep/report.json"], "nothing temporary is left"


def test_links_are_followed_devices_written_to_and_pipes_refused(folder: Path) -> None:
    (folder / "link.json").symlink_to("whole.json")
    (folder / "null").symlink_to("/dev/null")
    done = run(folder, *ONE_ITEM, "--oracle-json=link.json", "--oracle-html=null")
    assert done.exit_code == 0, done.output
    assert (folder / "link.json").is_symlink()
    assert (folder / "null").is_symlink()
    assert read(folder / "whole.json").verdict is RunVerdict.PASSED
    os.mkfifo(folder / "pipe")
    for option in ("--oracle-json", "--oracle-html"):
        refused = run(folder, *ONE_ITEM, f"{option}=pipe")
        assert refused.exit_code == pytest.ExitCode.USAGE_ERROR
        told = f"ERROR: {option} {folder}/pipe: cannot be written: it is a pipe; name a file in a folder that can"
        assert refused.errors.strip() == told


def test_report_of_processes_holds_the_findings_of_all(folder: Path) -> None:
    items = [f"test_oracle.py::test_scenarios[{number}]" for number in (1, 6)]  # only the last finds it
    words = [*items, "--oracle-profile=smoke", f"--oracle-backend={BROKEN}"]
    done = run(folder, *words, "-n2", "--oracle-json=report.json")
    report = read(folder / "report.json")
    assert (report.verdict, report.exit_code, done.exit_code) == (RunVerdict.FAILED, 1, 1)
    assert report.totals.failing_cases == len(done.failures)
    (found,) = report.subjects[0].found
    assert f"FAILED: {found.sentence}" in done.failures
    assert from_json(json.dumps(found.case)).events == load(folder / found.saved).events
    assert found.story in done.output
    assert found.replay in done.output
    assert found.finding is not None
    assert isinstance(found.finding.picture, Picture)
    assert any("x" in row.states for row in found.finding.picture.rows)
    assert report.failed_otherwise == ()


def test_three_shards_are_one_run(folder: Path) -> None:
    run(folder, *METADATA, "--oracle-json=whole.json")
    shards = [run(folder, *METADATA, f"--oracle-shard={n}/3", f"--oracle-json={n}.json") for n in (1, 2, 3)]
    assert [done.exit_code for done in shards] == [0, 0, 0]
    assert "shard 2/3" in shards[1].output
    merged = harness("merge", "1.json", "2.json", "3.json", "-o", "merged.json", cwd=folder)
    assert merged.returncode == 0, merged.stderr
    whole, together = read(folder / "whole.json"), read(folder / "merged.json")
    assert together.totals == whole.totals
    (one,), (other,) = whole.subjects, together.subjects
    assert other.model_copy(update={"classes": None}) == one.model_copy(update={"classes": None})
    assert other.classes == one.classes
    assert together.verdict is RunVerdict.PASSED
    assert "3 reports merged: 16 cases passed" in merged.stdout


def test_a_shard_alone_is_no_whole_run(folder: Path) -> None:
    run(folder, "test_oracle.py::test_scenarios[1]", *SHORT, "--oracle-shard=2/3", "--oracle-json=2.json")
    merged = harness("merge", "2.json", "-o", "merged.json", cwd=folder)
    assert merged.returncode == 1
    assert "NOT JUDGED: shard 1/3 is not among the reports" in merged.stdout
    assert read(folder / "merged.json").verdict is RunVerdict.NOT_JUDGED


def test_run_that_judges_nothing_has_a_report(folder: Path) -> None:
    (folder / "test_other.py").write_text("def test_other(): pass\n")
    run(folder, "test_other.py", "--oracle-json=report.json")
    report = read(folder / "report.json")
    assert (report.verdict, report.subjects) == (RunVerdict.NOT_JUDGED, ())


def test_test_that_fails_without_a_finding_is_named(folder: Path) -> None:
    (folder / "test_other.py").write_text("def test_other(): assert False\n")
    run(folder, "test_other.py", *ONE_ITEM, "--oracle-json=report.json")
    report = read(folder / "report.json")
    assert (report.verdict, report.failed_otherwise) == (RunVerdict.FAILED, ("test_other.py::test_other",))
    assert report.totals.cases == 2


def test_run_that_is_interrupted_has_a_report(folder: Path) -> None:
    (folder / "test_later.py").write_text(
        "import time\ndef test_later():\n    print('now', flush=True)\n    time.sleep(600)\n"
    )
    words = pytest_command("-s", *ONE_ITEM, "test_later.py", "--oracle-json=report.json")
    process = subprocess.Popen(
        words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.rstrip().endswith("now"):
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    done = Run(process.returncode, output, "")
    report = read(folder / "report.json")
    assert (report.verdict, report.exit_code, done.exit_code) == (RunVerdict.INTERRUPTED, INTERRUPTED, INTERRUPTED)
    assert report.totals.cases == 2


RAISES = """
from nsa_oracle.reference.multi_step import MultiStepBackend


class Raises(MultiStepBackend):
    def init_forward_metadata(self, batch):
        raise ValueError("boom")


    def init_forward_metadata_replay_cuda_graph(self, *given, **named):
        raise ValueError("boom")
"""


def test_workflow_is_told_and_shown_the_line_that_raised(folder: Path) -> None:
    (folder / "my_backend.py").write_text(RAISES)
    words = ["test_oracle.py::test_scenarios[0]", "--oracle-profile=smoke", "--oracle-backend=my_backend:Raises"]
    summary = folder / "summary.md"
    summary.write_text("before\n")
    done = run(folder, *words, variables={"GITHUB_STEP_SUMMARY": str(summary), "GITHUB_WORKSPACE": str(folder)})
    assert done.exit_code == 1
    (line,) = (line for line in done.output.splitlines() if line.startswith("::error "))
    assert line.startswith("::error file=my_backend.py,line=")
    said = summary.read_text()
    assert said.startswith("before\n### Oracle: failed\n")
    assert "my_backend.py" in said
    assert '"events": [' in said


def test_nothing_is_told_outside_of_a_workflow(folder: Path) -> None:
    done = run(folder, *ONE_ITEM)
    assert "::error" not in done.output
    assert "report" not in done.output.replace("--oracle", "")


def test_summary_that_cannot_be_written_is_told_in_one_line(folder: Path) -> None:
    done = run(folder, *ONE_ITEM, variables={"GITHUB_STEP_SUMMARY": str(folder / "absent" / "summary.md")})
    assert done.exit_code == 0
    assert f"NOT WRITTEN: GITHUB_STEP_SUMMARY {folder}/absent/summary.md: No such file" in done.output


def test_more_shards_than_items_leave_some_without_one(folder: Path) -> None:
    done = run(folder, *METADATA, "-rs", "--oracle-shard=9/9", "--oracle-json=9.json")
    assert done.exit_code == 0
    assert "no item of this test is in shard 9/9" in done.output
    assert read(folder / "9.json").totals.cases == 0
