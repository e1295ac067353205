"""Commands on saved cases: exit codes, one-line errors, and what a failure prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from nsa_oracle.harness.commands import replaying
from nsa_oracle.harness.commands.app import Device
from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.report.failure import python_command
from nsa_oracle.harness.scenarios.files import to_json
from nsa_oracle.harness.scenarios.scenario import Capture, Event, Join, Replay
from nsa_oracle.harness.scenarios.story import story
from nsa_oracle.harness.signals import INTERRUPTED, TERMINATED
from nsa_oracle.harness.subjects.loading import load_backend
from nsa_oracle.reference.types import ForwardMode
from tests.support.command_line import FAILS, PASSES, assert_one_line_error, harness, replay, run, saved
from tests.support.layer_cases import WITH_LAYER
from tests.support.metadata_cases import ACCEPT_TWO_THEN_ONE, DECODE, case, one_replay

TWO = case(Capture(mode=DECODE, buckets=(2,)), Join(seq_len=3), Join(seq_len=3), Replay(mode=DECODE))
CASE, OTHER = one_replay(ForwardMode.DECODE), ACCEPT_TWO_THEN_ONE
CLEAN, REUSES = "tests.support.backends.clean:Clean", "tests.support.backends.lengths:ReusesLastAccept"
UNJUDGED = "tests.support.backends.unjudged"
LAYERS, STRANGERS = "tests.support.layers", "tests.support.strangers"
REPLAY = f"replay: {python_command()} -m nsa_oracle replay"


LIMITED = """
from tests.support.backends.clean import Clean

class OnBigPages(Clean):
    sizes = {"page_size": (64,)}

class Verifies(Clean):
    modes = ("TARGET_VERIFY",)
"""


def test_cases_that_pass(tmp_path: Path) -> None:
    one, other = saved(tmp_path, CASE), saved(tmp_path, OTHER, "other.json")
    done = replay(one, other, "--backend", CLEAN)
    assert done.returncode == PASSES, done.stderr
    assert done.stdout.splitlines() == [
        f"{one}: bit-exact (2 replays, 0 eager calls on cpu)",
        f"{other}: bit-exact (4 replays, 0 eager calls on cpu)",
    ]


def test_case_none_of_whose_fields_is_compared_fails(tmp_path: Path) -> None:
    path = saved(tmp_path, CASE)
    done = replay(path, "--backend", f"{UNJUDGED}:NothingJudged")
    assert done.returncode == FAILS, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == f"{path}: NO FIELD COMPARED (2 replays, 0 eager calls on cpu)"
    assert "NOT JUDGED: no cell of any field was compared" in done.stdout.splitlines()[-1]


def test_case_some_of_whose_fields_are_not_compared_says_so(tmp_path: Path) -> None:
    path = saved(tmp_path, CASE)
    done = replay(path, "--backend", f"{UNJUDGED}:TablesNotJudged")
    assert done.returncode == PASSES, done.stdout + done.stderr
    exactly = "bit-exact but for 2 fields not judged as declared (2 replays, 0 eager calls on cpu)"
    assert done.stdout.splitlines()[0] == f"{path}: {exactly}"


def test_optimized_is_judged_by_default(tmp_path: Path) -> None:
    done = replay(saved(tmp_path, CASE))
    assert done.returncode == PASSES, done.stdout + done.stderr


def test_failure_is_reported_in_reading_order_and_its_command_repeats_it(tmp_path: Path) -> None:
    path = saved(tmp_path, OTHER, "a case.json")
    done = replay(path, "--backend", REUSES)
    assert done.returncode == FAILS, done.stderr
    assert done.stderr == ""
    assert "Traceback" not in done.stdout

    factory = load_backend(REUSES)
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
        f"{REPLAY} ",
    ]
    places = [done.stdout.index(part) for part in order]
    assert places == sorted(places)

    again = run(*shlex.split(lines[-1].removeprefix("replay: ")))
    assert again.returncode == FAILS
    assert again.stdout == done.stdout


def test_all_files_are_judged_though_one_fails(tmp_path: Path) -> None:
    failing, passing = saved(tmp_path, OTHER), saved(tmp_path, CASE, "passing.json")
    done = replay(failing, passing, "--backend", REUSES)
    assert done.returncode == FAILS
    assert done.stdout.splitlines()[-1].startswith(f"{passing}: bit-exact")


def test_malformed_file_is_refused_before_anything_is_judged(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema_version": 9}')
    assert_one_line_error(replay(saved(tmp_path, CASE), str(broken)), str(broken), "schema_version")
    assert_one_line_error(harness("show", str(broken)), str(broken), "schema_version")
    assert_one_line_error(harness("show", str(tmp_path / "absent.json")), "absent.json", "No such file")


@pytest.mark.parametrize(
    ("backend", "cause"),
    [
        ("my_backend", "not of the form module:attribute"),
        ("my_backend:", "not of the form module:attribute"),
        ("absent_module:X", "cannot import absent_module"),
        ("tests.support.backends.clean:Absent", "no attribute Absent"),
        ("tests.support.backends.crashes:LacksMethod", "lacks LacksMethod.init_forward_metadata"),
        ("tests.support.backends.clean:ForwardMode.DECODE", "no attribute"),
        ("math:pi", "not callable"),
        (".my_backend:Clean", ".my_backend"),
        ("broken_module:X", "importing broken_module raised ZeroDivisionError: division by zero"),
        ("leaving_module:X", "importing leaving_module raised SystemExit: 0"),
        ("forgetful_module:X", "importing forgetful_module raised AttributeError: "),
        (
            f"{STRANGERS}:NeedsMore",
            "cannot be called with (config, req_to_token): missing a required argument: 'stream'",
        ),
        (f"{STRANGERS}:NumberOfSteps", "attn_backends must be a list of single-step backends, not int"),
        (f"{STRANGERS}:SizesOfALayer", "sizes: no backend has 'num_heads'"),
        ("limited:OnBigPages", "case.json: page_size 4 is not among the sizes and modes that are declared"),
        ("limited:Verifies", "case.json: mode DECODE is not among the sizes and modes that are declared"),
    ],
)
def test_unusable_backend(backend: str, cause: str, tmp_path: Path) -> None:
    path = saved(tmp_path, CASE)
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
        (f"{LAYERS}.refused:WithoutStages", "WithoutStages has none of the methods store_cache, indexer_logits, "),
        (f"{LAYERS}.refused:ForRedOnes", "sizes: neither a layer nor its setup has 'colour'"),
        (f"{STRANGERS}:NumberForAStage", "NumberForAStage.sparse_mla is not a method"),
        (f"{STRANGERS}:WeakerText", "weaker: 'out' must be an nsa_oracle.harness.protocol.Strictness"),
    ],
)
def test_unusable_layer(layer: str, cause: str, tmp_path: Path) -> None:
    """Whatever the case."""
    assert_one_line_error(replay(saved(tmp_path, CASE), "--layer", layer), f"layer '{layer}'", cause)


def test_case_of_other_sizes_is_refused_on_every_tier(tmp_path: Path) -> None:
    path = saved(tmp_path, WITH_LAYER)
    cause = f"{path}: num_heads 2 is not among the sizes and modes that are declared"
    assert_one_line_error(replay(path, "--layer", f"{LAYERS}.refused:ForSevenHeads"), cause)
    assert_one_line_error(harness("tiers", path, "--layer", f"{LAYERS}.refused:ForSevenHeads"), cause)
    done = replay(saved(tmp_path, CASE), "--backend", CLEAN, "--layer", f"{LAYERS}.refused:ForSevenHeads")
    assert done.returncode == PASSES, "sizes of a layer do not concern a case without one"


def test_replay_command_runs_eagerly_what_was_run_eagerly(tmp_path: Path) -> None:
    path = saved(tmp_path, OTHER)
    done = replay(path, "--backend", f"{STRANGERS}:ListField", "--no-graphs")
    assert done.returncode == FAILS, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == f"{REPLAY} {path} --device cpu --backend {STRANGERS}:ListField --no-graphs"
    again = run(*shlex.split(last.removeprefix("replay: ")))
    assert (again.returncode, again.stdout) == (FAILS, done.stdout)


def test_layer_that_cannot_be_captured_is_judged_without_graphs(tmp_path: Path) -> None:
    path = saved(tmp_path, WITH_LAYER)
    done = replay(path, "--backend", CLEAN, "--layer", f"{LAYERS}.clean:Clean", "--no-graphs")
    assert done.returncode == PASSES, done.stdout + done.stderr
    first, second, *_ = done.stdout.splitlines()
    assert first == f"{path}: bit-exact but for 8 numbers within their error bound (0 replays, 2 eager calls on cpu)"
    assert second.startswith("methods of the layer, calls judged: store_cache 4 (isolated stage 4), indexer_logits ")
    done = replay(path, "--backend", CLEAN, "--layer", f"{LAYERS}.clean:Clean")
    assert done.returncode == FAILS
    assert done.stdout.startswith("ORACLE FAILURE  capture rejected: torch.Tensor.tolist at ")


def test_failure_of_a_layer_is_reported(tmp_path: Path) -> None:
    path = saved(tmp_path, WITH_LAYER)
    done = replay(path, "--backend", CLEAN, "--layer", f"{LAYERS}.in_graph:FreezesPlan")
    assert done.returncode == FAILS, done.stderr
    assert done.stdout.startswith(
        "ORACLE FAILURE  wrong value: logits at step 0, row 0 (request 0, draft token 0), token 1 (captured chain): "
    )
    assert "<- differs" in done.stdout
    assert (
        "an attention layer of 2 heads of 64 + 16 and 2 index heads of 32, bf16 cache, lattice content;" in done.stdout
    )
    command = f"{REPLAY} {path} --device cpu --backend {CLEAN}"
    assert done.stdout.splitlines()[-1] == f"{command} --layer {LAYERS}.in_graph:FreezesPlan"


def test_layer_is_not_built_for_metadata_alone(tmp_path: Path) -> None:
    done = replay(saved(tmp_path, CASE), "--backend", CLEAN, "--layer", f"{LAYERS}.whole:Raises")
    assert done.returncode == PASSES, done.stdout + done.stderr


def test_layer_that_no_case_would_judge_is_refused(tmp_path: Path) -> None:
    path, layer = saved(tmp_path, CASE), f"{LAYERS}.whole:Raises"
    for command in ("replay", "tiers"):
        done = harness(command, path, "--layer", layer)
        assert_one_line_error(done, f"layer '{layer}': no case here has a layer, so it would not be judged")


@pytest.mark.parametrize("events", [(), CASE.events[:1]])
def test_case_without_a_call_is_refused(events: tuple[Event, ...], tmp_path: Path) -> None:
    path = saved(tmp_path, CASE.model_copy(update={"events": events}))
    assert_one_line_error(replay(path), f"{path}: it has no replay and no eager call, so nothing would be judged")


HANGS = """
import time

class Hangs:
    def __init__(self, config, attention):
        time.sleep(600)

    def sparse_mla(self): ...
"""


def test_constructor_without_an_end_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    path = saved(tmp_path, WITH_LAYER)
    done = replay(path, "--backend", CLEAN, "--layer", "hangs:Hangs", "--timeout", "2", cwd=tmp_path)
    assert done.returncode == FAILS, done.stderr
    assert "still running after 2 seconds" in done.stdout


def test_import_without_an_end_is_one_line_though_a_case_has_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "endless.py").write_text("import time\nwhile True:\n    time.sleep(1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(replaying, "CASE_SECONDS", 0.5)
    path = Path(saved(tmp_path, CASE))
    said = (
        r"^backend 'endless:X': the import of endless did not end: still running after 0\.5 seconds, at \S+endless.py:"
    )
    with pytest.raises(BackendError, match=said):
        replaying.check_at_once(replaying.Replaying((path,), Device.CPU, "endless:X"))


CRASHES = "tests.support.backends.crashes"
IN_REFRESH = r"/\S*/crashes\.py:\d+ in refresh"
DURING = r"during the call of /\S*/reference/multi_step\.py:\d+ in init_forward_metadata_replay_cuda_graph"
WHILE = r"while it judged .*case\.json"


@pytest.mark.parametrize(
    ("backend", "verdict"),
    [
        (
            "Exits",
            r"backend raised: ProcessExit at .*crashes.py:\d+ in refresh: got os\._exit\(0\), ",
        ),
        ("Faults", rf"the process ended \(signal SIGSEGV\) at {IN_REFRESH} {WHILE}$"),
        ("Aborts", rf"the process ended \(signal SIGABRT\) at {IN_REFRESH} {WHILE}$"),
        ("ReallyExits", rf"the process ended \(exit code 0\) {DURING} {WHILE}$"),
        ("EndsTheProcess", rf"the process ended \(signal SIGKILL\) {DURING} {WHILE}$"),
        (
            "ReallyStopsItself",
            rf"the process was stopped, did not answer within 3 s, and was ended {DURING} {WHILE}$",
        ),
        ("InterruptsItself", r"backend raised: KeyboardInterrupt at .*crashes.py:\d+ in refresh: "),
    ],
)
def test_case_that_ends_its_process_is_a_failure_and_costs_that_case_only(
    backend: str, verdict: str, tmp_path: Path
) -> None:
    path = saved(tmp_path, CASE)
    done = replay(path, path, "--backend", f"{CRASHES}:{backend}")
    assert done.returncode == FAILS, done.stderr
    verdicts = [line for line in done.stdout.splitlines() if line.startswith("ORACLE FAILURE")]
    assert len(verdicts) == 2, done.stdout
    assert re.match(rf"ORACLE FAILURE  {verdict}", verdicts[0])
    assert story(CASE) in done.stdout.replace("  <- fails here", "")
    assert done.stdout.splitlines()[-1] == f"{REPLAY} {path} --device cpu --backend {CRASHES}:{backend}"
    frames = re.findall(r'File "(.*?)"', done.stderr)
    assert [file for file in frames if not file.endswith(("crashes.py", "multi_step.py", "seams.py"))] == []


@pytest.mark.parametrize("in_process", [(), ("--in-process",)])
def test_what_a_backend_leaves_running_ends_with_the_replay(in_process: tuple[str, ...], tmp_path: Path) -> None:
    """It holds the pipes that this test reads to their end."""
    done = replay(saved(tmp_path, CASE), "--backend", "tests.support.backends.process:LeavesAFork", *in_process)
    assert done.returncode == PASSES, done.stdout + done.stderr


def test_case_that_cannot_be_interrupted_is_a_failure(tmp_path: Path) -> None:
    path = saved(tmp_path, CASE)
    done = replay(path, "--backend", f"{CRASHES}:CannotBeInterrupted", "--timeout", "8")
    assert done.returncode == FAILS
    first = done.stdout.splitlines()[0]
    assert re.match(r"ORACLE FAILURE  does not end: case at .*crashes.py:\d+ in refresh: ", first), done.stdout
    assert "still running after 8 seconds and ignores interruption" in first
    assert Path(path).exists()
    assert done.stderr == ""


def test_ctrl_c_stops_a_replay(tmp_path: Path) -> None:
    """Though the backend swallows it."""
    path = saved(tmp_path, CASE)
    done = replay(path, "--backend", f"{CRASHES}:IsInterrupted")
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "interrupted before anything was judged\n")


SWALLOWS = """
import os, time
from contextlib import suppress
from tests.support.backends.clean import Clean

class Swallows(Clean):
    sizes = {"page_size": (4,)}

    def init_forward_metadata_replay_cuda_graph(self, batch, bs):
        super().init_forward_metadata_replay_cuda_graph(batch, bs)
        while bs > 1:
            with suppress(BaseException):
                os.system(f"kill -{SIGNAL} {os.getppid()}")
                time.sleep(60)
"""


@pytest.mark.parametrize(("sent", "code"), [("INT", INTERRUPTED), ("TERM", TERMINATED)])
def test_one_signal_stops_a_replay_of_code_that_swallows_it(sent: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "swallows.py").write_text(SWALLOWS.replace("{SIGNAL}", sent))
    paths = [saved(tmp_path, CASE, "one.json"), saved(tmp_path, TWO, "two.json")]
    done = replay(*paths, "--backend", "swallows:Swallows", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (code, "interrupted: 1 of 2 cases judged\n")
    assert done.stdout == f"{paths[0]}: bit-exact (2 replays, 0 eager calls on cpu)\n"


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        ("os._exit(0)", "ending"),
        ("os.kill(os.getpid(), 9)", "ending"),
        ("raise KeyboardInterrupt", "backend 'ending:X': loading it raised KeyboardInterrupt, at "),
    ],
)
def test_module_that_ends_the_process_is_unusable(ending: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "ending.py").write_text(f"import os\n{ending}\n")
    path = saved(tmp_path, CASE)
    for command in ("replay", "tiers"):
        assert_one_line_error(harness(command, path, "--backend", "ending:X", cwd=tmp_path), told)


def test_replay_in_the_process_itself(tmp_path: Path) -> None:
    path = saved(tmp_path, CASE)
    done = replay(path, "--backend", CLEAN, "--in-process")
    assert (done.returncode, done.stdout) == (PASSES, f"{path}: bit-exact (2 replays, 0 eager calls on cpu)\n")
    assert replay(path, "--backend", f"{CRASHES}:EndsTheProcess", "--in-process").returncode == -9


def test_show_says_that_a_case_is_not_for_optimized(tmp_path: Path) -> None:
    done = harness("show", saved(tmp_path, CASE.model_copy(update={"optimizations": ("warp_speed",)})))
    assert done.returncode == PASSES, done.stderr
    assert re.search(r"^not a case for optimized/, only for a backend of your own: .*warp_speed", done.stdout, re.M)


def test_show_describes_the_case_and_its_note(tmp_path: Path) -> None:
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
