"""Where to look and what holds: one case on every tier, and the survey of a layer's properties."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import planted_layers
import pytest
import torch
from hypothesis import strategies as st
from test_cli import FAILS, PASSES, PROJECT, UNUSABLE, WITH_LAYER, assert_one_line_error, harness, saved
from test_layer_detection import VERIFY, lattice
from test_relations import IN_TURN, InFirstPlace, replay_of_two

from nsa_oracle.harness.commands import tiers
from nsa_oracle.harness.commands.terminal import INTERRUPTED, progress_of
from nsa_oracle.harness.commands.tiers import Tier, TierOutcome, run_tiers
from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.report import text
from nsa_oracle.harness.scenarios.limits import LAYER_FIELDS, declared
from nsa_oracle.harness.scenarios.scales import SMALL_LAYER
from nsa_oracle.harness.scenarios.scenario import Eager, Scenario
from nsa_oracle.harness.search import survey
from nsa_oracle.harness.search.survey import Record, Survey
from nsa_oracle.harness.subjects import subject
from nsa_oracle.harness.subjects.default import optimized_backend
from nsa_oracle.harness.subjects.loading import completed
from nsa_oracle.harness.subjects.subject import Subject
from nsa_oracle.reference.types import AttentionConfig, BackendConfig, KVCacheDtype

# Tiers

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@no_gpu
def test_clean_case_passes_every_tier_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    found = list(run_tiers(Path(saved(tmp_path, WITH_LAYER)), None, None))
    missing = "torch sees no CUDA device here"
    assert found == [
        *(TierOutcome(tier, True) for tier in (Tier.REFERENCE, Tier.INTERPRETER, Tier.SIMULATED)),
        *(TierOutcome(tier, None, missing) for tier in (Tier.EAGER, Tier.GRAPH)),
    ]
    table = text.render(tiers.tiers_table(found))
    assert [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line] == [
        ["CPU reference", "case itself", "passes"],
        ["interpreter", "logic", "passes"],
        ["simulated graph", "capture", "passes"],
        ["eager GPU", "compile", f"not run: {missing}"],
        ["captured graph", "capture", f"not run: {missing}"],
    ]


@no_gpu
def test_layer_that_is_wrong_in_graphs_alone_fails_first_there(tmp_path: Path) -> None:
    done = harness("tiers", saved(tmp_path, WITH_LAYER), "--layer", "planted_layers:FreezesPlan")
    assert done.returncode == FAILS, done.stderr
    assert [word in done.stdout for word in ("FAILS", "Traceback")] == [True, False]
    first, finding = done.stdout.splitlines()[-2:]
    assert first == "first to fail: simulated graph, so look at the capture"
    assert finding.startswith("  wrong value: logits at step 0, row 0 ")


def test_unusable_file_is_refused_in_one_line(tmp_path: Path) -> None:
    assert_one_line_error(harness("tiers", str(tmp_path / "absent.json")), "absent.json", "No such file")


Finished = subprocess.CompletedProcess[str]


def outcomes(
    monkeypatch: pytest.MonkeyPatch, replay: Callable[[Sequence[str]], tuple[int, str, str]], **specs: str | None
) -> tuple[list[TierOutcome], list[list[str]]]:
    """Of tiers whose processes end as ``replay`` says; and their commands behind ``replay FILE``."""
    commands: list[list[str]] = []

    def run(command: Sequence[str], **_: object) -> Finished:
        assert list(command[1:5]) == ["-m", "nsa_oracle", "replay", "case.json"]
        commands.append(list(command[5:]))
        code, output, errors = replay(commands[-1])
        return subprocess.CompletedProcess(command, code, output, errors)

    monkeypatch.setattr(tiers.subprocess, "run", run)
    options = {"backend": None, "layer": None, **specs}
    return list(run_tiers(Path("case.json"), options["backend"], options["layer"])), commands


@pytest.mark.parametrize("cuda", [False, True])
def test_each_tier_is_told_where_and_what_to_run(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ["--device", "cpu", *theirs],
    ]
    on_cuda = [["--device", "cuda", "--no-graphs", *theirs], ["--device", "cuda", *theirs]]
    assert commands == on_cpu + on_cuda * cuda
    assert [outcome.tier for outcome in found] == list(Tier)
    assert [outcome.passed for outcome in found] == [True] * 3 + [True if cuda else None] * 2


def test_what_is_not_given_is_left_to_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    _, commands = outcomes(monkeypatch, lambda _: (0, "", ""))
    assert commands[1] == ["--device", "cpu", "--no-graphs"]


def test_tiers_behind_one_that_fails_are_run_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def replay(options: Sequence[str]) -> tuple[int, str, str]:
        fails = "--no-graphs" in options and "--layer" not in options
        return (1, "ORACLE FAILURE  wrong value: out\n\nORACLE FAILURE  more\n", "") if fails else (0, "fine", "")

    found, _ = outcomes(monkeypatch, replay)
    assert [(outcome.passed, outcome.told) for outcome in found[:3]] == [
        (True, ""),
        (False, "wrong value: out"),
        (True, ""),
    ]


def test_process_that_dies_is_told_by_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = outcomes(monkeypatch, lambda _: (-11, "", "loading\nSegmentation fault"))
    assert found[0] == TierOutcome(Tier.REFERENCE, False, "the process ended with -11: Segmentation fault")
    found, _ = outcomes(monkeypatch, lambda _: (1, "", ""))
    assert found[0].told == "the process ended with 1: "


def test_what_cannot_be_judged_ends_the_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"^layer 'a:B' is no good$"):
        outcomes(monkeypatch, lambda _: (2, "", "error: layer 'a:B' is no good\n"))


# Survey


def surveyed(
    layer: Any, device: torch.device, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Record]:
    """By one case."""
    monkeypatch.setattr(survey, "scenarios", lambda scale: st.just(scenario))
    found = Survey(subject_of(layer), device)
    found.run(cases=1, seed=0)
    assert found.cases == 1
    return dict(found.records)


def subject_of(layer: Any, **sizes: Sequence[Any]) -> Subject:
    limits = declared(SimpleNamespace(sizes=sizes), LAYER_FIELDS, "nobody")
    return Subject(optimized_backend, factory_of(layer), layer_limits=limits)


def factory_of(layer: Any) -> Any:
    return lambda config, attention: completed(layer(config, attention), config, attention, layer.__name__)


def broken(records: dict[str, Record]) -> set[str]:
    assert all(
        record.checked >= record.broken and bool(record.example) == bool(record.broken) for record in records.values()
    )
    return {name for name, record in records.items() if record.broken}


RELATIONS = {f"same bits: {relation.value}" for relation in IN_TURN}


def test_clean_layer_holds_everything(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    records = surveyed(planted_layers.SharesOutputs, device, replay_of_two(Eager(mode=VERIFY)), monkeypatch)
    assert set(records) == {"runs every call", "random content: as the reference", *RELATIONS}
    assert broken(records) == set()
    assert records["runs every call"].checked == 1
    assert records["random content: as the reference"].checked == 3, "single stages, an eager chain, a captured one"
    counts = {name: records[name].checked for name in RELATIONS}
    eagerly = {"same bits: other pages", "same bits: requests in reverse order", "same bits: a request alone"}
    assert counts == {name: 2 if name in eagerly else 1 for name in RELATIONS}
    assert all(name in text.render(survey.survey_table(records)) for name in records)


def test_exact_content_is_compared_and_not_related(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    records = surveyed(planted_layers.Capturable, device, replay_of_two(layer=lattice()), monkeypatch)
    assert {name: (record.checked, record.broken) for name, record in records.items()} == {
        "runs every call": (1, 0),
        "lattice content: as the reference": (1, 0),
    }


def test_property_that_is_broken_is_named_and_the_others_hold(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = surveyed(InFirstPlace, device, replay_of_two(), monkeypatch)
    name = "same bits: requests in reverse order"
    assert broken(records) == {name}
    assert records[name].example.startswith("depends on what must not matter: lse at step 0, row ")
    assert set(records) >= RELATIONS, "nothing ends the search"


class RoundsQueries(planted_layers.Capturable):
    """Queries are rounded to e4m3, which changes nothing where all numbers are few bits wide."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().sparse_mla(q.to(torch.float8_e4m3fn).bfloat16(), kv_cache, indices)


def test_wrong_values_are_told_by_the_content_that_shows_them(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = surveyed(RoundsQueries, device, replay_of_two(), monkeypatch)
    assert broken(records) == {"random content: as the reference"}, "it is deterministic, at least"
    assert records["random content: as the reference"].example.startswith("beyond the error bound: out at step 0, ")
    assert broken(surveyed(RoundsQueries, device, replay_of_two(layer=lattice()), monkeypatch)) == set()


def test_layer_that_cannot_be_captured_is_told_and_ends_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = surveyed(planted_layers.LooksAtLengths, device, replay_of_two(), monkeypatch)
    assert broken(records) == {"runs every call"}
    assert records["runs every call"].example.startswith("CaptureError: torch.Tensor.__int__ at planted_layers.py:")


def test_survey_draws_the_sizes_of_the_layer(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, KVCacheDtype, int]] = []

    class Looks(planted_layers.Capturable):
        def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
            super().__init__(config, attention)
            seen.append((attention.num_heads, attention.kv_cache_dtype, config.page_size))

    soon = dataclasses.replace(SMALL_LAYER, max_context_lens=(20,), index_topks=(4,), num_steps=(1,), max_events=1)
    monkeypatch.setitem(subject.SCALES, (device.type, True), soon)
    found = Survey(subject_of(Looks, num_heads=(3,), kv_cache_dtype=("fp8",), page_size=(16,)), device)
    found.run(cases=4, seed=0)
    assert found.records["runs every call"].checked == 4
    assert set(seen) == {(3, KVCacheDtype.FP8, 16)}


def test_what_cannot_be_surveyed_is_refused(device: torch.device) -> None:
    with pytest.raises(BackendError, match=r"^layer 'WithoutStages': WithoutStages has none of the methods "):
        Survey(subject_of(planted_layers.WithoutStages), device).run(cases=1, seed=0)
    with pytest.raises(ValueError, match=r"^none of the sizes that are drawn here fits: num_heads may be 7, and is "):
        Survey(subject_of(planted_layers.Capturable, num_heads=(7,)), device)


def test_survey_refuses_in_one_line() -> None:
    assert_one_line_error(harness("survey", "--layer", "planted_layers:ForSevenHeads"), "num_heads", "7")


ENDED = """
import os, signal
from planted_layers import Capturable

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background

class Ends(Capturable):
    built, last = 0, 4  # one was to try it out

    def __init__(self, *sizes):
        super().__init__(*sizes)
        Ends.built += 1
        if Ends.built == self.last:
            os.kill(os.getpid(), signal.{signal})

class Breaks(Ends):
    last = 12

    def sparse_mla(self, *inputs):
        out, lse = super().sparse_mla(*inputs)
        return out * 2, lse
"""


@pytest.mark.parametrize(
    ("layer", "signal", "code"),
    [("Ends", "SIGTERM", INTERRUPTED), ("Ends", "SIGINT", INTERRUPTED), ("Breaks", "SIGTERM", FAILS)],
)
def test_survey_that_is_ended_tells_what_it_has(layer: str, signal: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "ended.py").write_text(ENDED.format(signal=signal))
    done = harness("survey", "--device", "cpu", "--layer", f"ended:{layer}", "--cases", "50", cwd=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.search(r"^interrupted: \d+ of 50 cases$", done.stdout, re.MULTILINE)
    assert "runs every call" in done.stdout


def test_survey_ends_with_its_budget() -> None:
    words = ("survey", "--device", "cpu", "--layer", "docs.examples.my_layer:MyAttention", "--cases", "50")
    done = harness(*words, "--budget", "0")
    assert done.returncode == PASSES, done.stderr
    assert done.stdout.splitlines()[-2:] == ["not judged: kv_cache_dtype fp8", "out of time: 0 of 50 cases"]
    assert harness(*words, "--budget", "-1").returncode == UNUSABLE


def test_budget_ends_a_survey_in_the_middle_of_a_case(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was found by then is kept."""
    monkeypatch.setattr(survey, "scenarios", lambda scale: st.just(replay_of_two(Eager(mode=VERIFY))))
    times = iter(range(100))
    monkeypatch.setattr(survey.time, "monotonic", lambda: float(next(times)))
    found = Survey(subject_of(planted_layers.SharesOutputs), device)
    found.run(cases=3, seed=0, deadline=5.0)
    assert found.cases == 0
    assert found.records["random content: as the reference"].checked > 0
    assert found.holds


def test_progress_is_told_after_each_case(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "scenarios", lambda scale: st.just(replay_of_two(layer=lattice())))
    told: list[int] = []
    found = Survey(subject_of(planted_layers.Capturable), device)
    found.run(cases=1, seed=0, tell=told.append)
    assert told == [1]


def test_progress_is_shown_on_a_terminal_alone(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_of("surveying", 3) as tell:
        tell(2)
    assert capfd.readouterr() == ("", "")
