"""One case on every tier, and which tier is the first to fail."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from nsa_oracle.harness.commands import tiers
from nsa_oracle.harness.commands.tiers import Tier, TierOutcome, run_tiers
from nsa_oracle.harness.compiled.building import BuildError
from nsa_oracle.harness.compiled.launcher import LEFT_TO_THE_INTERPRETER
from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.report import text
from tests.support.command_line import FAILS, assert_one_line_error, harness, saved
from tests.support.layer_cases import WITH_LAYER
from tests.support.metadata_cases import DECODE, one_replay
from tests.support.project import PROJECT

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@no_gpu
def test_clean_case_passes_every_tier_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    found = list(run_tiers(Path(saved(tmp_path, WITH_LAYER)), None, None))
    missing = "torch sees no CUDA device here"
    assert found == [
        *(TierOutcome(tier, True) for tier in (Tier.REFERENCE, Tier.INTERPRETER, Tier.COMPILED, Tier.SIMULATED)),
        *(TierOutcome(tier, None, missing) for tier in (Tier.EAGER, Tier.GRAPH)),
    ]
    table = text.render(tiers.tiers_table(found))
    assert [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line] == [
        ["CPU reference", "case itself", "passes"],
        ["interpreter", "logic", "passes"],
        ["compiled kernels", "code for GPUs", "passes"],
        ["simulated graph", "capture", "passes"],
        ["eager GPU", "compile", f"not run: {missing}"],
        ["captured graph", "capture", f"not run: {missing}"],
    ]


@no_gpu
def test_layer_that_is_wrong_in_graphs_alone_fails_first_there(tmp_path: Path) -> None:
    done = harness("tiers", saved(tmp_path, WITH_LAYER), "--layer", "tests.support.layers.in_graph:FreezesPlan")
    assert done.returncode == FAILS, done.stderr
    assert [word in done.stdout for word in ("FAILS", "Traceback")] == [True, False]
    first, finding = done.stdout.splitlines()[-2:]
    assert first == "first to fail: simulated graph, so look at the capture"
    assert finding.startswith("  wrong value: logits at step 0, row 0 ")


def test_tier_that_hangs_fails(tmp_path: Path) -> None:
    done = harness(
        *("tiers", saved(tmp_path, one_replay(DECODE)), "--timeout", "8"),
        *("--backend", "tests.support.backends.crashes:CannotBeInterrupted"),
    )
    assert done.returncode == FAILS, done.stderr
    assert "first to fail: simulated graph, so look at the capture\n  does not end: case at " in done.stdout


def test_case_of_unknown_switches_is_refused_at_once(tmp_path: Path) -> None:
    path = saved(tmp_path, one_replay(DECODE).model_copy(update={"optimizations": ("warp_speed",)}))
    assert_one_line_error(harness("tiers", path), path, "warp_speed")


def test_time_limit_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    _, commands = outcomes(monkeypatch, lambda _: (0, "", ""), timeout=2.5)
    assert all(command[-2:] == ["--timeout", "2.5"] for command in commands)


def test_unusable_file_is_refused_in_one_line(tmp_path: Path) -> None:
    assert_one_line_error(harness("tiers", str(tmp_path / "absent.json")), "absent.json", "No such file")


Finished = subprocess.CompletedProcess[str]


def outcomes(
    monkeypatch: pytest.MonkeyPatch,
    replay: Callable[[Sequence[str]], tuple[int, str, str]],
    timeout: float | None = None,
    **specs: str | None,
) -> tuple[list[TierOutcome], list[list[str]]]:
    """Of tiers whose processes end as ``replay`` says; and their commands behind ``replay FILE``."""
    commands: list[list[str]] = []

    def run(command: Sequence[str], **_: object) -> Finished:
        assert list(command[1:5]) == ["-m", "nsa_oracle", "replay", "case.json"]
        commands.append(list(command[5:]))
        code, output, errors = replay(commands[-1])
        return subprocess.CompletedProcess(command, code, output, errors)

    monkeypatch.setattr(tiers.subprocess, "run", run)
    monkeypatch.setattr(tiers, "build", lambda source: None)
    options = {"backend": None, "layer": None, **specs}
    return list(run_tiers(Path("case.json"), options["backend"], options["layer"], timeout)), commands


@pytest.mark.parametrize("cuda", [False, True])
def test_each_tier_is_reported_where_and_what_to_run(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    found, commands = outcomes(monkeypatch, lambda _: (0, "", ""), backend="a:B", layer="c:D")
    theirs = ["--backend", "a:B", "--layer", "c:D"]
    on_cpu = [
        [
            *("--device", "cpu", "--no-graphs"),
            *(
                "--backend",
                "nsa_oracle.reference.multi_step:MultiStepBackend",
                "--layer",
                "nsa_oracle.reference.layer:SparseAttention",
            ),
        ],
        ["--device", "cpu", "--no-graphs", *theirs],
        ["--device", "cpu", "--no-graphs", *theirs],
        ["--device", "cpu", *theirs],
    ]
    on_cuda = [["--device", "cuda", "--no-graphs", *theirs], ["--device", "cuda", *theirs]]
    assert commands == on_cpu + on_cuda * cuda
    assert [outcome.tier for outcome in found] == list(Tier)
    assert [outcome.passed for outcome in found] == [True] * 4 + [True if cuda else None] * 2


def test_kernels_are_compiled_on_a_tier_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def run(command: Sequence[str], *, env: dict[str, str], **_: object) -> Finished:
        chosen.append(env["NSA_ORACLE_KERNELS"])
        return subprocess.CompletedProcess(
            command, 0, f"{LEFT_TO_THE_INTERPRETER}a_kernel (why)\n" if len(chosen) == 3 else "", ""
        )

    monkeypatch.setenv("NSA_ORACLE_KERNELS", "compiled")  # which the other tiers ignore
    monkeypatch.setattr(tiers.subprocess, "run", run)
    monkeypatch.setattr(tiers, "build", lambda source: None)
    found = list(run_tiers(Path("case.json"), None, None))
    assert chosen[:4] == ["interpreted", "interpreted", "compiled", "compiled"]
    assert found[2] == TierOutcome(Tier.COMPILED, True, f"{LEFT_TO_THE_INTERPRETER}a_kernel (why)")


def test_without_a_compiler_that_tier_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str) -> None:
        raise BuildError("there is no C compiler")

    _ = outcomes(monkeypatch, lambda _: (0, "", ""))
    monkeypatch.setattr(tiers, "build", refuse)
    found = list(run_tiers(Path("case.json"), None, None))
    assert found[2] == TierOutcome(Tier.COMPILED, None, "there is no C compiler")


def test_what_is_not_given_is_left_to_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    _, commands = outcomes(monkeypatch, lambda _: (0, "", ""))
    assert commands[1] == ["--device", "cpu", "--no-graphs"]


def test_tiers_behind_one_that_fails_are_run_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def replay(options: Sequence[str]) -> tuple[int, str, str]:
        fails = "--no-graphs" in options and "--layer" not in options
        return (1, "ORACLE FAILURE  wrong value: out\n\nORACLE FAILURE  more\n", "") if fails else (0, "fine", "")

    found, _ = outcomes(monkeypatch, replay)
    assert [(outcome.passed, outcome.message) for outcome in found[:4]] == [
        (True, ""),
        (False, "wrong value: out"),
        (False, "wrong value: out"),
        (True, ""),
    ]


def test_process_that_dies_is_reported_by_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = outcomes(monkeypatch, lambda _: (-11, "", "loading\nSegmentation fault"))
    assert found[0] == TierOutcome(Tier.REFERENCE, False, "the process ended (signal SIGSEGV): Segmentation fault")
    found, _ = outcomes(monkeypatch, lambda _: (1, "", ""))
    assert found[0].message == "the process ended (exit code 1): "


def test_methods_that_a_case_does_not_call_are_no_failure_of_a_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    gap = "NOT JUDGED: topk_indices: no call in this run"
    found, _ = outcomes(monkeypatch, lambda _: (1, f"case.json: bit-exact\n{gap}\n", ""))
    assert found[0] == TierOutcome(Tier.REFERENCE, True, gap)


def test_what_cannot_be_judged_ends_the_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"^layer 'a:B' is no good$"):
        outcomes(monkeypatch, lambda _: (2, "", "error: layer 'a:B' is no good\n"))
