"""``python -m harness``: exit codes, one-line errors, and what a failure prints."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_detection import accept_two_then_one, one_replay
from test_layer_detection import case, lattice

from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.scenarios.files import save, to_json
from nsa_oracle.harness.scenarios.scenario import Capture, Join, Replay, Scenario
from nsa_oracle.harness.scenarios.story import story
from nsa_oracle.harness.subjects.loading import load_backend
from nsa_oracle.reference.types import ForwardMode

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
PASSES, FAILS, UNUSABLE = 0, 1, 2
CASE = one_replay(ForwardMode.DECODE)
OTHER = accept_two_then_one
WITH_LAYER = case(
    *(Capture(mode=ForwardMode.DECODE, buckets=(1,)), Join(seq_len=6), Replay(mode=ForwardMode.DECODE)), layer=lattice()
)


LIMITED = """
import planted

class OnBigPages(planted.Clean):
    sizes = {"page_size": (64,)}

class Verifies(planted.Clean):
    modes = ("TARGET_VERIFY",)
"""


def run(*words: str, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), str(HERE), *sys.path]), "COLUMNS": "300"}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)


def harness(*words: str, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "harness", *words, cwd=cwd)


def replay(*words: str, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    return harness("replay", "--device", "cpu", *words, cwd=cwd)


def saved(folder: Path, scenario: Scenario = CASE, name: str = "case.json") -> str:
    save(scenario, folder / name)
    return str(folder / name)


def assert_one_line_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == UNUSABLE, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line


def test_cases_that_pass(tmp_path: Path) -> None:
    one, other = saved(tmp_path), saved(tmp_path, OTHER, "other.json")
    done = replay(one, other, "--backend", "planted:Clean")
    assert done.returncode == PASSES, done.stderr
    assert done.stdout.splitlines() == [
        f"{one}: bit-exact (2 replays, 0 eager calls on cpu)",
        f"{other}: bit-exact (4 replays, 0 eager calls on cpu)",
    ]


def test_optimized_is_judged_by_default(tmp_path: Path) -> None:
    done = replay(saved(tmp_path))
    assert done.returncode == PASSES, done.stdout + done.stderr


def test_failure_is_told_in_reading_order_and_its_command_repeats_it(tmp_path: Path) -> None:
    path = saved(tmp_path, OTHER, "a case.json")
    done = replay(path, "--backend", "planted:ReusesLastAccept")
    assert done.returncode == FAILS, done.stderr
    assert done.stderr == ""
    assert "Traceback" not in done.stdout

    factory = load_backend("planted:ReusesLastAccept")
    with pytest.raises(OracleFailure) as caught:
        judge(OTHER, factory, torch.device("cpu"))
    sentence = f"ORACLE FAILURE  {caught.value.finding.sentence()}"
    lines = done.stdout.splitlines()
    assert lines[0] == sentence
    order = [
        sentence,
        "seqlens_expanded, step 0",  # the table
        "row 1 (unused tail)",
        story(OTHER, failing_event=5),
        "<- fails here",
        f"saved:  {path}",
        "replay: python -m harness replay ",
    ]
    places = [done.stdout.index(part) for part in order]
    assert places == sorted(places)

    command = shlex.split(lines[-1].removeprefix("replay: "))
    assert command[0] == "python"
    again = run(sys.executable, *command[1:])
    assert again.returncode == FAILS
    assert again.stdout == done.stdout


def test_all_files_are_judged_though_one_fails(tmp_path: Path) -> None:
    failing, passing = saved(tmp_path, OTHER), saved(tmp_path, CASE, "passing.json")
    done = replay(failing, passing, "--backend", "planted:ReusesLastAccept")
    assert done.returncode == FAILS
    assert done.stdout.splitlines()[-1].startswith(f"{passing}: bit-exact")


def test_malformed_file_is_refused_before_anything_is_judged(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema_version": 9}')
    assert_one_line_error(replay(saved(tmp_path), str(broken)), str(broken), "schema_version")
    assert_one_line_error(harness("show", str(broken)), str(broken), "schema_version")
    assert_one_line_error(harness("show", str(tmp_path / "absent.json")), "absent.json", "No such file")


@pytest.mark.parametrize(
    ("backend", "cause"),
    [
        ("planted", "not of the form module:attribute"),
        ("planted:", "not of the form module:attribute"),
        ("absent_module:X", "cannot import absent_module"),
        ("planted:Absent", "no attribute Absent"),
        ("planted:LacksMethod", "lacks LacksMethod.init_forward_metadata"),
        ("planted:ForwardMode.DECODE", "no attribute"),
        ("math:pi", "not callable"),
        (".planted:Clean", ".planted"),
        ("broken_module:X", "importing broken_module raised ZeroDivisionError: division by zero"),
        ("leaving_module:X", "importing leaving_module raised SystemExit: 0"),
        ("forgetful_module:X", "importing forgetful_module raised AttributeError: "),
        ("strangers:NeedsMore", "cannot be called with (config, req_to_token): missing a required argument: 'stream'"),
        ("strangers:NumberOfSteps", "attn_backends must be a list of single-step backends, not int"),
        ("strangers:SizesOfALayer", "sizes: no backend has 'num_heads'"),
        ("limited:OnBigPages", "case.json: page_size 4 is not among the sizes and modes that are declared"),
        ("limited:Verifies", "case.json: mode DECODE is not among the sizes and modes that are declared"),
    ],
)
def test_unusable_backend(backend: str, cause: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    (tmp_path / "leaving_module.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "forgetful_module.py").write_text("import math\nmath.tau_squared\n")
    (tmp_path / "limited.py").write_text(LIMITED)
    named = () if backend.startswith("limited") else (backend,)
    assert_one_line_error(replay(path, "--backend", backend, cwd=tmp_path), *named, cause)


@pytest.mark.parametrize(
    ("layer", "cause"),
    [
        ("absent_module:X", "cannot import absent_module"),
        ("math:pi", "not callable; name a class or function of (config, attention)"),
        ("planted_layers:WithoutStages", "WithoutStages has none of the methods store_cache, indexer_logits, "),
        ("planted_layers:ForRedOnes", "sizes: neither a layer nor its setup has 'colour'"),
        ("strangers:NumberForAStage", "NumberForAStage.sparse_mla is no method"),
        ("strangers:WeakerText", "weaker: 'out' must be a harness.protocol.Strictness"),
    ],
)
def test_unusable_layer(layer: str, cause: str, tmp_path: Path) -> None:
    """Whatever the case."""
    assert_one_line_error(replay(saved(tmp_path), "--layer", layer), f"layer '{layer}'", cause)


def test_unusable_layer_is_not_surveyed() -> None:
    done = harness("survey", "--device", "cpu", "--layer", "planted_layers:WithoutStages")
    assert_one_line_error(done, "WithoutStages has none of the methods")


def test_case_of_other_sizes_is_refused_on_every_tier(tmp_path: Path) -> None:
    path = saved(tmp_path, WITH_LAYER)
    cause = f"{path}: num_heads 2 is not among the sizes and modes that are declared"
    assert_one_line_error(replay(path, "--layer", "planted_layers:ForSevenHeads"), cause)
    assert_one_line_error(harness("tiers", path, "--layer", "planted_layers:ForSevenHeads"), cause)
    done = replay(saved(tmp_path), "--backend", "planted:Clean", "--layer", "planted_layers:ForSevenHeads")
    assert done.returncode == PASSES, "sizes of a layer do not concern a case without one"


def test_replay_command_runs_eagerly_what_was_run_eagerly(tmp_path: Path) -> None:
    path = saved(tmp_path, OTHER)
    done = replay(path, "--backend", "strangers:ListField", "--no-graphs")
    assert done.returncode == FAILS, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == f"replay: python -m harness replay {path} --device cpu --backend strangers:ListField --no-graphs"
    again = run(sys.executable, *shlex.split(last.removeprefix("replay: "))[1:])
    assert (again.returncode, again.stdout) == (FAILS, done.stdout)


def test_report_that_cannot_be_written_is_refused_before_the_hunt(tmp_path: Path) -> None:
    for option in ("--json", "--html"):
        words = ("bugs", "--device", "cpu", option)
        assert_one_line_error(harness(*words, str(tmp_path / "absent" / "kills")), option, "cannot be written")
        assert_one_line_error(harness(*words, str(tmp_path)), option, "cannot be written")


def test_layer_that_cannot_be_captured_is_judged_without_graphs(tmp_path: Path) -> None:
    path = saved(tmp_path, WITH_LAYER)
    done = replay(path, "--backend", "planted:Clean", "--layer", "planted_layers:Clean", "--no-graphs")
    assert done.returncode == PASSES, done.stdout + done.stderr
    assert done.stdout == f"{path}: bit-exact (0 replays, 2 eager calls on cpu)\n"
    done = replay(path, "--backend", "planted:Clean", "--layer", "planted_layers:Clean")
    assert done.returncode == FAILS
    assert done.stdout.startswith("ORACLE FAILURE  capture rejected: torch.Tensor.tolist at ")


def test_failure_of_a_layer_is_told(tmp_path: Path) -> None:
    path = saved(tmp_path, WITH_LAYER)
    done = replay(path, "--backend", "planted:Clean", "--layer", "planted_layers:FreezesPlan")
    assert done.returncode == FAILS, done.stderr
    assert done.stdout.startswith(
        "ORACLE FAILURE  wrong value: logits at step 0, row 0 (request 0, draft token 0), token 1 (captured chain): "
    )
    assert "<- differs" in done.stdout
    assert (
        "an attention layer of 2 heads of 64 + 16 and 2 index heads of 32, bf16 cache, lattice content;" in done.stdout
    )
    command = f"replay: python -m harness replay {path} --device cpu --backend planted:Clean"
    assert done.stdout.splitlines()[-1] == f"{command} --layer planted_layers:FreezesPlan"


def test_layer_is_not_built_for_metadata_alone(tmp_path: Path) -> None:
    done = replay(saved(tmp_path), "--backend", "planted:Clean", "--layer", "planted_layers:Raises")
    assert done.returncode == PASSES, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu(tmp_path: Path) -> None:
    assert_one_line_error(harness("replay", saved(tmp_path), "--device", "cuda"), "--device cuda", "cpu")


def test_usage_errors(tmp_path: Path) -> None:
    for words in (("replay",), ("show",), ("explode",), ("replay", saved(tmp_path), "--device", "tpu")):
        done = harness(*words)
        assert done.returncode == UNUSABLE
        assert "Traceback" not in done.stderr


def test_show_tells_the_case_and_its_note(tmp_path: Path) -> None:
    done = harness("show", saved(tmp_path, CASE.model_copy(update={"note": "found on a rainy day"})))
    assert done.returncode == PASSES, done.stderr
    assert done.stdout == f"found on a rainy day\n{story(CASE)}\n"
    assert "2. Replay DECODE (bucket 1): lengths 3, pool rows 0." in done.stdout


def test_show_does_not_need_a_backend_or_evaluate_the_file(tmp_path: Path) -> None:
    note = "__import__('pathlib').Path('pwned').touch()"
    path = tmp_path / "case.json"
    path.write_text(to_json(CASE.model_copy(update={"note": note})))
    assert harness("show", str(path), cwd=tmp_path).returncode == PASSES
    assert [p.name for p in tmp_path.iterdir()] == ["case.json"]


def test_help_names_the_commands() -> None:
    done = harness("--help")
    assert done.returncode == PASSES
    for command in ("replay", "show", "tiers", "survey"):
        assert command in done.stdout
