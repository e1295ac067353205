"""The pytest plugin, run as people run it: pytest in a process of its own, in an empty folder."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch

from nsa_oracle.harness.errors import counted
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.protocol import STAGES
from nsa_oracle.harness.report.records import ItemRecord, RunRecord
from nsa_oracle.harness.scenarios.files import load, save
from nsa_oracle.harness.scenarios.scenario import Eager, Join, Replay
from nsa_oracle.harness.search.drawing import SHARDS
from nsa_oracle.reference.types import ForwardMode
from tests.support.backends import clean, lengths
from tests.support.layer_cases import WITH_LAYER
from tests.support.metadata_cases import ACCEPT_TWO_THEN_ONE, case, factory_of, one_replay
from tests.support.project import PROJECT
from tests.support.pytest_runs import run

OPTIONS = ("profile", "device", "backend", "layer", "replay", "save", "cases", "budget", "case-timeout", "seed")
OPTIONS += ("shard", "json", "html")
CLEAN, BROKEN = "tests.support.backends.clean:Clean", "tests.support.backends.lengths:VerifyForgetsDrafts"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with nothing in it but the oracle's own tests and one that has nothing to do with it."""
    tests = (PROJECT / "tests" / "test_oracle.py").read_text(encoding="utf-8")
    (tmp_path / "test_oracle.py").write_text(tests, encoding="utf-8")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "cases").symlink_to(PROJECT / "tests" / "cases")
    (tmp_path / "test_other.py").write_text("def test_other(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\noracle_in_process = true\n")
    return tmp_path


def shards(*numbers: int) -> list[str]:
    return [f"test_oracle.py::test_scenarios[{number}]" for number in numbers]


def failure_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_option_is_documented(folder: Path) -> None:
    text = run(folder, "--help").output
    start = text.index("correctness oracle")
    ours = text[start : text.index("\n\n", start)]
    for option in OPTIONS:
        described = re.search(rf"--oracle-{option}[= ]\S+\s+(\w.+)", ours)
        assert described, f"--oracle-{option} is not described"
    assert "default: pr" in ours


# Should such a value be accepted after all, it must not start an hour's work.
CHEAP = [f"--oracle-backend={BROKEN}", "--oracle-profile=dev", *shards(1)]
LAYER_CASE = ["--oracle-replay=layer.json"]
LAYERS, STRANGERS = "tests.support.layers", "tests.support.strangers"
FOR_THREE_HEADS = """
from nsa_oracle.optimized.layer import SparseAttention

class ForThreeHeads(SparseAttention):
    sizes = {"num_heads": (3,)}
"""


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--oracle-profile=huge"], "invalid choice: 'huge'"),
        (["--oracle-device=tpu"], "invalid choice: 'tpu'"),
        (["--oracle-budget=soon"], "'soon' is not a number of seconds"),
        (["--oracle-budget=nan", *CHEAP], "nan"),
        (["--oracle-case-timeout=-1", *CHEAP], "'-1' is not a number of seconds"),
        (["--oracle-case-timeout=0.001", *CHEAP], "'0.001' is not in the range from 0.1 to 1,000,000 seconds"),
        (["--oracle-case-timeout=1e300", *CHEAP], "'1e300' is not in the range"),
        (["-o", "oracle_case_timeout=abc", *CHEAP], "oracle_case_timeout: 'abc' is not a number"),
        (["-o", "oracle_case_timeout=-1", *CHEAP], "'-1' is not a number of seconds, 0 or more"),
        (["-o", "oracle_case_timeout=nan", *CHEAP], "'nan' is not a number of seconds, 0 or more"),
        (["-o", "oracle_case_timeout=inf", *CHEAP], "'inf' is not a number of seconds, 0 or more"),
        (["-o", "oracle_case_timeout=1e-9", *CHEAP], "'1e-9' is not in the range"),
        (["-o", "oracle_profile=huge", *CHEAP[:1]], "oracle_profile: invalid choice: 'huge'"),
        (["--oracle-seed=1.5", *CHEAP], "'1.5' is not a whole number"),
        (["--oracle-seed=281474976710656", *CHEAP], "is not a whole number from 0 to 281474976710655"),
        (["--oracle-backend=my_backend"], "backend 'my_backend' is not of the form module:attribute"),
        (["--oracle-backend=absent_module:X"], "cannot import absent_module"),
        (["--oracle-backend=broken_module:X"], "broken_module"),
        (
            ["--oracle-backend=tests.support.backends.crashes:LacksMethod", "--oracle-profile=dev", *shards(0)],
            "lacks LacksMethod.init_forward_metadata",
        ),
        (["--oracle-layer=absent_module:X"], "layer 'absent_module:X': cannot import absent_module"),
        ([f"--oracle-layer={LAYERS}.refused:ForSevenHeads"], "num_heads may be 7, but is drawn from 1, 2, 3, 16"),
        ([f"--oracle-layer={LAYERS}.refused:ForRedOnes"], "sizes: neither a layer nor its setup has 'colour'"),
        (["--oracle-layer=layers:ForThreeHeads", *LAYER_CASE], "layer.json: num_heads 2 is not among the sizes"),
        ([f"--oracle-layer={LAYERS}.refused:WithoutStages", *LAYER_CASE], "has none of the methods store_cache, "),
        ([f"--oracle-layer={LAYERS}.refused:WithoutStages"], "has none of the methods store_cache, "),
        (["--oracle-replay=absent.json"], "absent.json: cannot be read: No such file or directory"),
        (["--oracle-replay=malformed.json"], "malformed.json: schema_version is missing"),
        (["--oracle-save=pytest.ini", *CHEAP], "pytest.ini"),
        (["--oracle-save=pytest.ini/deep/down", *CHEAP], "pytest.ini is a file; name a directory"),
        (["--oracle-cases=nowhere", *CHEAP], "--oracle-cases nowhere: there is no folder nowhere"),
        (["--oracle-cases=empty", *CHEAP], "--oracle-cases empty: empty has no *.json"),
        (
            ["--oracle-cases=layer.json", *CHEAP],
            "--oracle-cases layer.json: layer.json is a file; name the folder that ",
        ),
        (["--oracle-save=/proc/x", *CHEAP], "--oracle-save /proc/x: cannot be written: "),
        (["--oracle-shard=4/3", *CHEAP], "'4/3' is not a part of at most 1000, such as 3/8"),
        (["--oracle-shard=0/3", *CHEAP], "'0/3' is not a part"),
        (["--oracle-shard=half", *CHEAP], "'half' is not a part"),
        (["--oracle-json=.", *CHEAP], "is a folder; name a file"),
        (["--oracle-json=", *CHEAP], "the name is empty"),
        (["--oracle-html=pytest.ini/page.html", *CHEAP], "pytest.ini is a file; name a directory"),
        ([f"--oracle-save={'x' * 5000}", *CHEAP], "File name too long"),
        (["--oracle-replay=.", *CHEAP], ".: cannot be read: Is a directory; name the saved cases in it, as ./*.json"),
        ([f"--oracle-backend={STRANGERS}:SizesOfAnotherKind"], "sizes must map fields to allowed values"),
        ([f"--oracle-backend={STRANGERS}:UnknownMode"], "modes: there is no PREFILL"),
        ([f"--oracle-layer={STRANGERS}:WeakerList"], "weaker must map stages to a Strictness"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_unusable_value_is_refused_in_one_line(words: list[str], cause: str, folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "malformed.json").write_text("{}")
    (folder / "broken_module.py").write_text("1 / 0\n")
    (folder / "layers.py").write_text(FOR_THREE_HEADS)
    save(WITH_LAYER, folder / "layer.json")
    done = run(folder, *words)
    assert done.exit_code == pytest.ExitCode.USAGE_ERROR, done.output[-2000:]
    said = [line for line in done.errors.splitlines() if cause in line]
    assert len(said) == 1, done.errors
    assert "Traceback" not in done.errors + done.output
    assert done.output == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused(folder: Path) -> None:
    done = run(folder, "--oracle-device=cuda")
    assert done.exit_code == pytest.ExitCode.USAGE_ERROR
    assert done.errors.strip() == "ERROR: --oracle-device cuda: torch sees no CUDA device here; use cpu or auto"


def test_clean_backend(folder: Path) -> None:
    done = run(folder, f"--oracle-backend={CLEAN}", "--oracle-profile=dev", *shards(1))
    assert done.exit_code == pytest.ExitCode.OK, done.output
    cases, replays, eager_calls, fields, cells = done.totals
    assert cases == 48 // SHARDS
    assert replays + eager_calls > 0
    assert cells > fields > 0
    assert done.summary == f"oracle: {cases} cases passed, {replays} replays, all bit-exact"
    assert "boundary classes visited (cases): " not in done.output, "-v lists them"
    assert f"oracle: judging {CLEAN} on cpu, profile dev, seed 0" in done.output
    assert not (folder / "failures").exists()


def test_same_session_twice_is_the_same(folder: Path) -> None:
    words = [f"--oracle-backend={CLEAN}", "--oracle-profile=dev", *shards(2)]
    assert run(folder, *words).totals == run(folder, *words).totals


def test_broken_backend_is_explained_saved_and_replayed(folder: Path, device: torch.device) -> None:
    done = run(folder, f"--oracle-backend={BROKEN}", "--oracle-profile=dev", "--oracle-save=kept", *shards(2, 7))
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED
    assert "Traceback" not in done.output
    assert not (folder / "failures").exists()

    count = len(done.failures)
    assert count in (1, 2)
    assert done.summary.endswith(f"{counted(count, 'case')} FAILED")
    minimal = sorted((folder / "kept").glob("*.min.json"))
    raw = sorted((folder / "kept").glob("*.raw.json"))
    assert {p.name[:12] for p in minimal} <= {p.name[:12] for p in raw}, "only the first of each finding is shrunk"
    assert 1 <= len(minimal) <= len(raw) <= count
    assert len(failure_files(folder / "kept")) == len(minimal) + len(raw), "nothing else is left there"
    for path in minimal:
        with pytest.raises(OracleFailure):
            judge(load(path), factory_of(lengths.VerifyForgetsDrafts), device)

    # The case says the same when replayed by itself, and nothing but that case is judged then.
    path = minimal[0].relative_to(folder)
    again = run(folder, f"--oracle-backend={BROKEN}", f"--oracle-replay={path}")
    assert again.exit_code == pytest.ExitCode.TESTS_FAILED
    assert re.search(r"1 failed, \d+ deselected", again.output)
    sentence = load(minimal[0]).note
    assert again.failures == [f"FAILED: {sentence}"]
    assert again.output.count(f"ORACLE FAILURE  {sentence}") == 1
    assert not (folder / "failures").exists(), "a replayed case is not saved again"

    mended = run(folder, f"--oracle-backend={CLEAN}", f"--oracle-replay={path}")
    assert mended.exit_code == pytest.ExitCode.OK
    assert mended.summary.startswith("oracle: 1 case passed, ")


def test_replay_takes_several_files_and_runs_nothing_else(folder: Path) -> None:
    save(one_replay(ForwardMode.DECODE), folder / "one.json")
    save(ACCEPT_TWO_THEN_ONE, folder / "other.json")
    done = run(
        folder, "-v", f"--oracle-backend={CLEAN}", "--oracle-replay=one.json", f"--oracle-replay={folder}/other.json"
    )
    assert done.exit_code == pytest.ExitCode.OK, done.output
    assert re.findall(r"^(\S+) PASSED", done.output, re.MULTILINE) == [
        "test_oracle.py::test_saved_case[one]",
        "test_oracle.py::test_saved_case[other]",
    ]
    assert done.totals[:3] == [2, 6, 0]


def test_layer_is_judged_and_its_stages_are_listed(folder: Path) -> None:
    save(WITH_LAYER, folder / "layer.json")
    words = [f"--oracle-backend={CLEAN}", "--oracle-replay=layer.json"]
    done = run(folder, *words, f"--oracle-layer={LAYERS}.clean:SharesOutputs")
    assert done.exit_code == pytest.ExitCode.OK, done.output
    assert f"oracle: judging {CLEAN} and {LAYERS}.clean:SharesOutputs on cpu, profile pr, seed 0" in done.output
    stages = re.findall(
        r"^│ ([a-z_]+) +│ +([\d,]+) +│ +([\d,]+) +│ +\S+ +│ +0 +│ +([\d,]+) +│", done.output, re.MULTILINE
    )
    expected = [stage for stage in STAGES if stage != "topk_ragged"]  # that is of prefills, or of a layer's own
    assert [name for name, *_ in stages] == expected, "the methods that the layer brings are judged alone, too"
    assert all(int(exact.replace(",", "")) + int(bounded) > 0 for _, exact, bounded, _ in stages)
    assert all(weaker == "0" for *_, weaker in stages)
    assert "layer: 2 replays; no bit changed when: other content of unspecified memory 2" in done.output

    broken = run(folder, *words, f"--oracle-layer={LAYERS}.in_graph:FreezesPlan")
    assert broken.exit_code == pytest.ExitCode.TESTS_FAILED
    assert len(broken.failures) == 1
    assert "logits at step 0, row 0 (request 0, draft token 0), token 1 (captured chain)" in broken.failures[0]
    assert f"--layer {LAYERS}.in_graph:FreezesPlan" in broken.output


def test_what_a_layer_was_compared_in_survives_the_way_from_a_worker(device: torch.device) -> None:
    verdict = judge(WITH_LAYER, factory_of(clean.Clean), device)
    verdict.layers.stage("out").worst = 0.25
    verdict.audit.missed("whole graphs: no driver", 3)
    text = ItemRecord(verdict, drawn_by="test_layers").to_json()
    run = RunRecord()
    for _ in range(2):
        run.add(ItemRecord.from_json(text))
    assert (run.items, run.failures, run.drawn) == (2, [], {"test_layers": 2})
    total = run.verdict
    assert total.boundary_classes == {name: 2 * count for name, count in verdict.boundary_classes.items()}
    assert total.audit.compared == 2 * verdict.audit.compared == 2
    assert total.audit.not_audited["whole graphs: no driver"] == 6
    assert total.layers.replays == 2 * verdict.layers.replays == 4
    assert total.layers.relations == {name: 2 * count for name, count in verdict.layers.relations.items()}
    for name, tally in verdict.layers.stages.items():
        added = total.layers.stages[name]
        assert (added.exact, added.bounded, added.weaker) == (2 * tally.exact, 2 * tally.bounded, 2 * tally.weaker)
        assert added.worst == tally.worst


def test_workers_neither_lose_nor_double_anything(folder: Path) -> None:
    """Side by side with one process: the same failures, the same files, the same sums."""
    words = [f"--oracle-backend={BROKEN}", "--oracle-profile=dev", *shards(1, 4, 6)]
    alone = run(folder, *words, "--oracle-save=alone", "-p", "no:xdist")
    together = run(folder, *words, "--oracle-save=together", "-n", "2")
    assert together.exit_code == alone.exit_code == pytest.ExitCode.TESTS_FAILED
    assert sorted(together.failures) == sorted(alone.failures)
    assert len(alone.failures) >= 2, "one failure proves nothing about sums"
    assert failure_files(folder / "together") == failure_files(folder / "alone")
    assert together.totals == alone.totals
    assert together.summary == alone.summary


@pytest.mark.parametrize("processes", [("-p", "no:xdist"), ("-n", "2")])
def test_run_that_judges_nothing_fails(folder: Path, processes: tuple[str, ...]) -> None:
    words = (f"--oracle-backend={BROKEN}", "--oracle-profile=dev", "--oracle-budget=0", "-k", "scenarios")
    done = run(folder, *words, *processes)
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED
    assert done.summary == "oracle: 0 cases passed, 0 replays, NOTHING JUDGED"
    assert "NOT JUDGED: test_scenarios drew no case; give it more time" in done.output
    assert not (folder / "failures").exists()


def test_run_that_compares_no_field_fails(folder: Path) -> None:
    backend = "tests.support.backends.unjudged:NothingJudged"
    done = run(folder, f"--oracle-backend={backend}", "--oracle-profile=smoke", *shards(1))
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED
    assert done.summary.endswith("NO FIELD COMPARED")
    assert "NOT JUDGED: no cell of any field was compared" in done.output


def test_seed_draws_other_cases(folder: Path) -> None:
    words = [f"--oracle-backend={CLEAN}", "--oracle-profile=dev", *shards(1)]
    first, second, again = (run(folder, *words, *seed) for seed in ([], ["--oracle-seed=7"], ["--oracle-seed=7"]))
    assert "profile dev, seed 7" in second.output
    assert first.totals != second.totals == again.totals


WARNS = """
import warnings
from tests.support.backends.clean import Clean

warnings.warn("imported", DeprecationWarning, stacklevel=1)

class Warns(Clean):
    def init_forward_metadata(self, batch):
        warnings.warn("old spelling", DeprecationWarning, stacklevel=1)
        super().init_forward_metadata(batch)
"""


def test_warnings_of_a_backend_are_shown_and_no_verdict(folder: Path) -> None:
    """Whatever filters the suite has; ``replay`` and pytest agree."""
    (folder / "old.py").write_text(WARNS)
    (folder / "pytest.ini").write_text("[pytest]\noracle_in_process = true\nfilterwarnings = error\n")
    done = run(folder, "--oracle-backend=old:Warns", "--oracle-profile=dev", *shards(1))
    assert done.exit_code == pytest.ExitCode.OK, done.output
    assert "DeprecationWarning: old spelling" in done.output


HANGS = """
from tests.support.backends.clean import Clean

class Hangs(Clean):
    def init_forward_metadata(self, batch):
        while True:
            pass
"""


def test_backend_that_hangs_is_a_finding(folder: Path) -> None:
    (folder / "stuck.py").write_text(HANGS)
    save(case(Join(seq_len=3), Eager(mode=ForwardMode.DECODE)), folder / "eager.json")
    words = ["--oracle-backend=stuck:Hangs", "--oracle-replay=eager.json", "--oracle-case-timeout=2"]
    done = run(folder, *words)
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED
    (failure,) = done.failures
    assert re.match(r"FAILED: does not end: case at .*stuck\.py:\d+ in init_forward_metadata", failure)
    assert re.search(r"raised through:\n  \S+stuck\.py:\d+ in init_forward_metadata: (while True:|pass)", done.output)
    assert "--backend stuck:Hangs --timeout 2" in done.output


LIMITED = """
import os, signal
from tests.support.backends.clean import Clean
from tests.support.backends.crashes import LacksMethod

class Limited(Clean):
    sizes = {"page_size": (16, 64), "drive": ("multi_step",)}
    modes = ("DECODE", "TARGET_VERIFY")

    def init_forward_metadata(self, batch):
        assert batch.forward_mode.value in self.modes
        super().init_forward_metadata(batch)

class Dies(Clean):
    def init_forward_metadata_replay_cuda_graph(self, *_):
        os.kill(os.getpid(), signal.SIGKILL)

class Unsteady:
    built = 0

    def __new__(cls, *sizes):
        Unsteady.built += 1
        return Clean(*sizes) if Unsteady.built < 3 else LacksMethod(*sizes)
"""


def test_what_a_backend_is_not_made_for_is_not_judged_and_reported(folder: Path) -> None:
    (folder / "limited.py").write_text(LIMITED)
    some = "scenarios[1] or (saved and draft)"
    done = run(folder, "-v", "--oracle-backend=limited:Limited", "--oracle-profile=dev", "-k", some)
    assert done.exit_code == pytest.ExitCode.OK, done.output
    (line,) = (line for line in done.output.splitlines() if line.startswith("not judged: "))
    modes = "modes EXTEND, IDLE, DRAFT_EXTEND, DRAFT_EXTEND_V2"
    left_out = re.fullmatch(rf"not judged: page_size 1, 32; drive single_step; {modes}; (\d+) saved cases: (.*)", line)
    assert left_out is not None, line
    names = left_out[2].split(", ")
    assert "draft-extend-tail-is-written" in names
    assert int(left_out[1]) == len(names) < len(list((PROJECT / "tests" / "cases").glob("*.json")))
    classes = " ".join(done.output.partition("boundary classes visited")[2].split())
    for name in ("page size 1 0", "page size 32 0", "drive single_step 0", "eager EXTEND 0", "replay DRAFT_EXTEND 0"):
        assert name in classes
    assert "replay DECODE 0" not in classes

    none = run(folder, f"--oracle-backend={CLEAN}", "--oracle-profile=dev", *shards(1))
    assert "not judged" not in none.output


def test_case_that_takes_the_process_down_is_kept_and_reported(folder: Path) -> None:
    (folder / "limited.py").write_text(LIMITED)
    words = ["--oracle-backend=limited:Dies", "--oracle-profile=dev", *shards(0)]
    alone = run(folder, *words, "-p", "no:xdist")
    assert alone.exit_code == -signal.SIGKILL
    (left,) = (folder / "failures").glob("*.running.json")
    assert any(isinstance(event, Replay) for event in load(left).events)
    left.unlink()

    worked = run(folder, *words, "-n", "1")
    assert worked.exit_code == pytest.ExitCode.TESTS_FAILED
    (left, *_) = (folder / "failures").glob("*.running.json")
    assert "the process died while it judged a case" in worked.output
    assert f"nsa_oracle replay failures/{left.name} --device cpu --backend limited:Dies" in worked.output


@pytest.mark.parametrize("processes", [("-p", "no:xdist"), ("-n", "1")])
def test_backend_that_would_end_pytest_with_success_fails(folder: Path, processes: tuple[str, ...]) -> None:
    words = ["--oracle-backend=tests.support.backends.crashes:Exits", "--oracle-profile=dev", *shards(0)]
    done = run(folder, *words, *processes)
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
    (failure,) = done.failures
    assert "got os._exit(0), which ends the process" in failure


def test_failure_that_depends_on_earlier_cases_is_replayed_behind_them(folder: Path) -> None:
    save(one_replay(ForwardMode.DECODE, page_size=2, max_context_len=8), folder / "one.json")
    save(one_replay(ForwardMode.DECODE), folder / "other.json")
    words = ["--oracle-backend=tests.support.backends.crashes:RemembersThePageSize", "-p", "no:xdist"]
    done = run(folder, *words, "--oracle-replay=one.json", "--oracle-replay=other.json")
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED, done.output
    assert (
        "DEPENDS ON EARLIER CASES: it passes in a fresh process, and fails there behind 1 earlier case." in done.output
    )
    (chained,) = (folder / "failures").iterdir()
    assert load(chained) == load(folder / "one.json")
    assert f"nsa_oracle replay failures/{chained.name} other.json --device cpu" in done.output


def test_backend_that_cannot_be_judged_after_all_is_one_line(folder: Path) -> None:
    (folder / "limited.py").write_text(LIMITED)
    done = run(folder, "--oracle-backend=limited:Unsteady", "--oracle-profile=dev", *shards(0))
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED
    assert "lacks LacksMethod.init_forward_metadata" in done.output
    assert "Traceback" not in done.output
    assert "harness/judge.py" not in done.output


def test_malformed_case_of_the_corpus_is_reported_in_one_line(folder: Path) -> None:
    (folder / "kept").mkdir()
    (folder / "kept" / "broken.json").write_text("{}")
    done = run(folder, "--oracle-cases=kept", "-k", "saved_case")
    assert done.exit_code == pytest.ExitCode.TESTS_FAILED
    assert re.search(r"^\S*kept/broken\.json: schema_version is missing", done.output, re.MULTILINE), done.output
    assert "Traceback" not in done.output


def test_session_without_oracle_tests_has_no_table(folder: Path) -> None:
    done = run(folder, "test_other.py")
    assert done.exit_code == pytest.ExitCode.OK
    assert done.summary == ""
