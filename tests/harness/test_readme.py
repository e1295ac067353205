"""What README.md and docs/ promise: links, options, commands, the worked example and what it prints."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.__main__ import app
from harness.fields import HOST_SCALARS
from harness.judge import OracleFailure, judge
from harness.protocol import load_backend
from harness.report import explain
from harness.scenario import (
    GRAPH_MODES,
    Accept,
    Capture,
    Drive,
    Eager,
    Join,
    Mirror,
    Replay,
    Scenario,
    Setup,
    from_json,
    to_json,
)
from reference.metadata import compute_metadata
from reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata, StepSemantics

PROJECT = Path(__file__).parent.parent.parent
TEXTS = {
    path.relative_to(PROJECT).as_posix(): path.read_text(encoding="utf-8")
    for path in (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")))
}
EXAMPLE, BROKEN = "docs.examples.my_backend:MyBackend", "docs.examples.my_backend:MyBrokenBackend"
each_text = pytest.mark.parametrize("name", TEXTS)


def fenced(language: str, text: str) -> list[str]:
    """The contents of the code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def code(text: str) -> str:
    """Everything that is set as code: inline, and the blocks of shell commands."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*re.findall(r"`([^`]+)`", prose), *fenced("sh", text), *fenced("yaml", text)])


def readme_case() -> Scenario:
    (block,) = fenced("json", TEXTS["README.md"])
    return from_json(block, "README.md")


@each_text
def test_relative_links_exist(name: str) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", TEXTS[name])
    missing = [t for t in targets if "://" not in t and not (PROJECT / name).parent.joinpath(t).exists()]
    assert missing == []


@each_text
def test_named_files_exist(name: str) -> None:
    """Paths set as code; what a run creates (failures/, reports/) and what the reader adds is not there yet."""
    named = re.findall(
        r"(?<![\w/.])((?:harness|reference|optimized|tests|docs|\.github|\.ci)/[\w./-]*\w)", code(TEXTS[name])
    )
    missing = [path for path in named if not path.startswith("tests/cases") and not (PROJECT / path).exists()]
    assert missing == []


def test_options_are_those_of_pytest() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "--help"]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=True)
    offered = set(re.findall(r"^ +(--oracle-\w+)", done.stdout, re.MULTILINE))
    assert offered
    table = set(re.findall(r"^\| `(--oracle-\w+)", TEXTS["README.md"], re.MULTILINE))
    assert table == offered
    named = {option for text in TEXTS.values() for option in re.findall(r"--oracle-\w+", text)}
    assert named <= offered


def test_subcommands_are_those_of_the_harness() -> None:
    offered = {command.callback.__name__ for command in app.registered_commands if command.callback}
    named = {word for text in TEXTS.values() for word in re.findall(r"python -m harness (\w+)", text)}
    assert named == offered


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        word for text in TEXTS.values() for word in re.findall(r"^(?:- run: )?make (\w+)", code(text), re.MULTILINE)
    }
    assert {"check", "test"} <= named <= targets


def test_contract_names_every_mode_and_field() -> None:
    contract = TEXTS["docs/contract.md"]
    assert sorted(re.findall(r"^\| ([A-Z_0-9]+) \|", contract, re.MULTILINE)) == sorted(m.value for m in ForwardMode)
    tables = set(re.findall(r"^\| `(\w+)` \|", contract, re.MULTILINE))
    scalars = set(HOST_SCALARS)
    assert tables == {field.name for field in dataclasses.fields(Metadata)} - scalars
    assert all(f"`{name}`" in contract for name in scalars)


def test_prefill_example_of_the_contract() -> None:
    config = BackendConfig(1, 16, 4, 1, 1)
    batch = ForwardBatch(
        ForwardMode.EXTEND,
        2,
        torch.arange(2),
        torch.tensor([10, 4]),
        extend_seq_lens=torch.tensor([3, 2]),
        extend_prefix_lens=torch.tensor([7, 2]),
    )
    metadata = compute_metadata(config, torch.zeros(2, 16, dtype=torch.int32), batch, 0, in_graph=False)
    lengths = ", ".join(map(str, metadata.seqlens_expanded.tolist()))
    assert metadata.indexer_k_start_end is not None
    starts, ends = (tensor.tolist() for tensor in metadata.indexer_k_start_end)
    ranges = ", ".join(f"{start}..{end}" for start, end in zip(starts, ends, strict=True))
    said = " ".join(TEXTS["docs/contract.md"].split())
    assert f"`seqlens_expanded` {lengths} and, as ranges of the concatenated KV, {ranges}." in said


ALL_MODES = Scenario(
    setup=Setup(
        page_size=16,
        max_context_len=67,
        index_topk=17,
        num_steps=2,
        num_draft_tokens=3,
        step_semantics=StepSemantics.ADVANCING,
        paged_mqa_num_sms=3,
        flashmla_num_sm_parts=2,
        pool_size=3,
        drive=Drive.SINGLE_STEP,
    ),
    events=(
        *(Capture(mode=mode, buckets=(1, 3)) for mode in GRAPH_MODES),
        Replay(mode=ForwardMode.DECODE),
        Join(seq_len=17),
        Join(seq_len=31),
        Accept(accept_lengths=(0, 2)),
        *(Replay(mode=mode, mirror=Mirror.STALE) for mode in GRAPH_MODES),
        *(Eager(mode=mode, extend_lens=(3,)) for mode in ForwardMode),
    ),
)


@pytest.mark.parametrize("scenario", [readme_case(), ALL_MODES], ids=["of the README", "all modes"])
def test_example_backend_passes(scenario: Scenario, device: torch.device) -> None:
    verdict = judge(scenario, load_backend(EXAMPLE), device)
    assert verdict.replays > 0


def test_its_broken_twin_fails_as_the_readme_shows(device: torch.device) -> None:
    scenario = readme_case()
    with pytest.raises(OracleFailure) as caught:
        judge(scenario, load_backend(BROKEN), device)
    assert scenario.note == caught.value.finding.sentence()
    (saved,) = re.findall(r"^saved:  (.*)$", TEXTS["README.md"], re.MULTILINE)
    told = explain(caught.value, Path(saved), f"python -m harness replay {saved} --device cpu --backend {BROKEN}")
    shown = next(block for block in fenced("text", TEXTS["README.md"]) if block.startswith("ORACLE FAILURE"))
    assert [line.rstrip() for line in told.splitlines()] == shown.splitlines()


def test_broken_twin_fails_among_all_modes(device: torch.device) -> None:
    with pytest.raises(OracleFailure) as caught:
        judge(ALL_MODES, load_backend(BROKEN), device)
    assert caught.value.finding.field == "real_page_table"


def test_saved_case_is_in_the_form_that_the_harness_writes() -> None:
    (block,) = fenced("json", TEXTS["README.md"])
    assert to_json(readme_case()) == block


def test_benchmark_tables(tmp_path: Path) -> None:
    def entry(group: str, param: str, median: float, **params: object) -> dict[str, object]:
        return {"group": group, "param": param, "params": params, "stats": {"median": median}}

    run = [
        entry("seqlens_expanded TARGET_VERIFY bs=8", "loop-TARGET_VERIFY-8", 120e-6),
        entry("seqlens_expanded TARGET_VERIFY bs=8", "kernel-TARGET_VERIFY-8", 30e-6),
        entry("eager bs=8 length=8192 N=4", "one launch-8-8192-4", 20e-6, name="one launch"),
        entry("in graph bs=8 length=8192 N=4", "floor-8-8192-4", 1e-6, name="floor"),
        entry("in graph bs=8 length=8192 N=4", "one launch, aliased-8-8192-4", 2e-6, name="one launch, aliased"),
        entry("in graph bs=8 length=8192 N=4", "one launch-8-8192-4", 3e-6, name="one launch"),
    ]
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({"benchmarks": run}))
    command = [sys.executable, "-m", "tests.benchmarks.table"]
    done = subprocess.run([*command, str(path)], cwd=PROJECT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "| 8 | 120.0 | - | 30.0 | 4.00 | - |" in lines
    assert "| 8 | 8192 | 4 | 3.0 | 2.0 | - | 1.0 | 3.00 | - |" in lines

    path.write_text("{}")
    done = subprocess.run([*command, str(path)], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
