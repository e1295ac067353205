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

from docs.examples.my_layer import MyAttention
from nsa_oracle.harness.checks.relations import Relation
from nsa_oracle.harness.commands.app import app
from nsa_oracle.harness.commands.tiers import Tier, TierOutcome, tiers_table
from nsa_oracle.harness.fields import HOST_SCALARS
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.protocol import STAGES, SparseAttention, Strictness
from nsa_oracle.harness.report.failure import explain
from nsa_oracle.harness.report.text import render
from nsa_oracle.harness.scenarios.files import from_json, to_json
from nsa_oracle.harness.scenarios.limits import BACKEND_FIELDS, LAYER_FIELDS, Limits
from nsa_oracle.harness.scenarios.regime import Regime
from nsa_oracle.harness.scenarios.scales import SMALL_LAYER, restricted
from nsa_oracle.harness.scenarios.scenario import (
    GRAPH_MODES,
    Accept,
    Capture,
    Drive,
    Eager,
    Join,
    Layer,
    Mirror,
    Replay,
    Scenario,
    Setup,
)
from nsa_oracle.harness.search.drawing import PROFILES, SHARDS
from nsa_oracle.harness.subjects.default import optimized_backend
from nsa_oracle.harness.subjects.loading import load_backend, load_layer
from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.types import (
    AttentionConfig,
    AttentionInputs,
    AttentionOutputs,
    BackendConfig,
    ForwardBatch,
    ForwardMode,
    Metadata,
    StepSemantics,
)

PROJECT = Path(__file__).parent.parent.parent
TEXTS = {
    path.relative_to(PROJECT).as_posix(): path.read_text(encoding="utf-8")
    for path in (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")))
}
EXAMPLE, BROKEN = "docs.examples.my_backend:MyBackend", "docs.examples.my_backend:MyBrokenBackend"
LAYER, BROKEN_LAYER = "docs.examples.my_layer:MyAttention", "docs.examples.my_layer:MyBrokenAttention"
each_text = pytest.mark.parametrize("name", TEXTS)


def fenced(language: str, text: str) -> list[str]:
    """The contents of the code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def code(text: str) -> str:
    """Everything that is set as code: inline, and the blocks of shell commands."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*re.findall(r"`([^`]+)`", prose), *fenced("sh", text), *fenced("yaml", text)])


def first_column(table: str) -> list[str]:
    """What the rows of Markdown tables begin with, headings left out."""
    cells = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    headings = re.findall(r"^\| ([^|]+) \|.*\n\| -", table, re.MULTILINE)
    return [cell for cell in cells if cell not in headings and not cell.startswith("---")]


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next of any level."""
    (found,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    return str(found)


def shown_failures() -> list[str]:
    return [block for block in fenced("text", TEXTS["README.md"]) if block.startswith("ORACLE FAILURE")]


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
    contract, _, layer = TEXTS["docs/contract.md"].partition("\n## The layer\n")
    for part in (contract, layer):
        assert sorted(re.findall(r"^\| ([A-Z_0-9]+) \|", part, re.MULTILINE)) == sorted(m.value for m in ForwardMode)
    tables = set(re.findall(r"^\| `(\w+)` \|", contract, re.MULTILINE))
    scalars = set(HOST_SCALARS)
    assert tables == {field.name for field in dataclasses.fields(Metadata)} - scalars
    assert all(f"`{name}`" in contract for name in scalars)


def test_contract_names_inputs_outputs_regimes_and_relations_of_the_layer() -> None:
    contract = TEXTS["docs/contract.md"]
    tensors = [field.name for record in (AttentionInputs, AttentionOutputs) for field in dataclasses.fields(record)]
    assert first_column(section(contract, "The layer")) == [f"`{name}`" for name in tensors]
    regimes = first_column(section(contract, "When numbers are right"))
    assert regimes == [regime.value for regime in Regime]
    relations = first_column(section(contract, "What must not change a bit"))
    assert relations == [relation.value for relation in Relation]


def test_contract_lays_caches_out_as_the_reference_does() -> None:
    config = AttentionConfig()
    said = section(TEXTS["docs/contract.md"], "Caches")
    assert f"[slots, 1, {config.qk_head_dim}] bf16" in said
    assert f"[slots, 1, {config.kv_token_bytes}] uint8" in said
    assert f"[pages, {config.index_page_bytes(64)}] uint8" in said
    scales, rope = config.kv_lora_rank, config.kv_token_bytes - 2 * config.qk_rope_head_dim
    keys = 64 * config.index_head_dim
    assert first_column(said) == [
        *(f"0 to {scales - 1}", f"{scales} to {rope - 1}", f"{rope} to {config.kv_token_bytes - 1}"),
        *(f"0 to {keys - 1}", f"{keys} to {config.index_page_bytes(64) - 1}"),
    ]


def test_numbers_of_cases_are_those_of_the_profiles() -> None:
    readme = " ".join(TEXTS["README.md"].split())
    dev, pr, nightly = (
        f"{profile.cases:,} + {profile.layer_cases:,}"
        for profile in (PROFILES[name] for name in ("dev", "pr", "nightly"))
    )
    assert f"{dev}, {pr} or {nightly} cases" in readme
    assert set(re.findall(r"[\d,]+ \+ [\d,]+(?= cases)", readme)) == {dev, pr, nightly}
    assert f"{2 * SHARDS} test items, {SHARDS} of metadata alone and {SHARDS} with a layer" in readme


def test_readme_names_methods_sizes_and_strictness_of_layers() -> None:
    said = section(TEXTS["README.md"], "Judging your own attention layer")
    methods = [name for name in vars(SparseAttention) if not name.startswith("_")]
    assert first_column(said) == [f"`{name}`" for name in methods]
    named = " ".join(said.split()).partition("Sizes may also name ")[2].partition(".")[0]
    assert set(re.findall(r"`(\w+)`", named)) == set(LAYER_FIELDS) - set(BACKEND_FIELDS)
    backends = " ".join(section(TEXTS["README.md"], "Judging your own backend").split())
    named = backends.partition("`sizes` maps fields to lists of allowed values: ")[2].partition(". ")[0]
    assert set(re.findall(r"`(\w+)`", named)) == set(BACKEND_FIELDS)
    with pytest.raises(ValueError, match="none of the sizes"):
        restricted(SMALL_LAYER, Limits({"num_heads": (64,)}))  # "with production's sizes on a CPU"
    declared = " ".join(said.split()).partition("`weaker`, ")[2].partition("Relations are never weaker")[0]
    for strictness in (Strictness.SAME_SET, Strictness.ONE_STEP, Strictness.BOUND):
        stages = declared.partition(f"`{strictness.name}` for ")[2].partition("(")[0]
        assert tuple(re.findall(r"`(\w+)`", stages)) == strictness.stages


def test_readme_shows_every_stage_and_no_other() -> None:
    (table,) = (block for block in fenced("text", TEXTS["README.md"]) if "stage of the layer" in block)
    stages = table.partition("stage of the layer")[2].partition("layer: ")[0]
    assert re.findall(r"^│ (\w+) +│", stages, re.MULTILINE) == list(STAGES)


def test_readme_shows_properties_that_a_survey_tells() -> None:
    told = {"runs every call", *(f"same bits: {relation.value}" for relation in Relation)}
    told |= {f"{regime.value} content: as the reference" for regime in Regime}
    (table,) = (block for block in fenced("text", TEXTS["README.md"]) if "property" in block)
    shown = set(re.findall(r"^│ (\S.*?) +│ \d", table, re.MULTILINE))
    assert shown <= told
    assert len(shown) > 1


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
    (saved,) = re.findall(r"^saved:  (.*)$", shown_failures()[0], re.MULTILINE)
    told = explain(caught.value, Path(saved), f"python -m harness replay {saved} --device cpu --backend {BROKEN}")
    assert [line.rstrip() for line in told.splitlines()] == shown_failures()[0].splitlines()


def test_broken_twin_fails_among_all_modes(device: torch.device) -> None:
    with pytest.raises(OracleFailure) as caught:
        judge(ALL_MODES, load_backend(BROKEN), device)
    assert caught.value.finding.field == "real_page_table"


BROKEN_LAYER_CASE = Scenario(
    setup=Setup(
        page_size=1,
        max_context_len=33,
        index_topk=4,
        num_steps=1,
        num_draft_tokens=1,
        pool_size=1,
        layer=Layer(num_heads=1, index_n_heads=1),
    ),
    events=(Join(seq_len=5), Replay(mode=ForwardMode.DRAFT_EXTEND_V2)),
)


def layer_scenario(regime: Regime) -> Scenario:
    return Scenario(
        setup=Setup(
            page_size=16,
            max_context_len=33,
            index_topk=8,
            num_steps=2,
            num_draft_tokens=2,
            step_semantics=StepSemantics.ADVANCING,
            pool_size=2,
            layer=Layer(num_heads=3, regime=regime),
        ),
        events=(
            Capture(mode=ForwardMode.DECODE, buckets=(2,)),
            Capture(mode=ForwardMode.DRAFT_EXTEND_V2, buckets=(3,)),
            Join(seq_len=1),  # a draft-extend row of it has no key
            Join(seq_len=29),
            Replay(mode=ForwardMode.DECODE),
            Replay(mode=ForwardMode.DRAFT_EXTEND_V2),
            Eager(mode=ForwardMode.EXTEND, extend_lens=(1, 2)),
        ),
    )


@pytest.mark.parametrize("regime", Regime, ids=lambda regime: regime.value)
def test_example_layer_passes(regime: Regime, device: torch.device) -> None:
    factory, limits = load_layer(LAYER)
    assert limits.sizes == MyAttention.sizes
    verdict = judge(layer_scenario(regime), optimized_backend, device, layer_factory=factory)
    assert verdict.layers.replays == 4  # two, with either poison


def test_broken_layer_fails_as_the_readme_shows(device: torch.device) -> None:
    factory, _ = load_layer(BROKEN_LAYER)
    with pytest.raises(OracleFailure) as caught:
        judge(BROKEN_LAYER_CASE, optimized_backend, device, layer_factory=factory)
    (saved,) = re.findall(r"^saved:  (.*)$", shown_failures()[1], re.MULTILINE)
    command = f"python -m harness replay {saved} --device cpu --layer {BROKEN_LAYER}"
    told = explain(caught.value, Path(saved), command)
    assert [line.rstrip() for line in told.splitlines()] == shown_failures()[1].splitlines()

    verdict = caught.value.finding.sentence()
    no_gpu = "torch sees no CUDA device here"
    passed = {Tier.REFERENCE: True, Tier.INTERPRETER: False, Tier.SIMULATED: False}
    told_of = {True: "", False: verdict, None: no_gpu}
    outcomes = [TierOutcome(tier, passed.get(tier), told_of[passed.get(tier)]) for tier in Tier]
    (shown,) = (block for block in fenced("text", TEXTS["README.md"]) if "what it adds" in block)
    table = render(tiers_table(outcomes))
    assert shown.startswith(f"{table}\nfirst to fail: interpreter, so look at the logic\n")


@pytest.mark.parametrize("regime", [regime for regime in Regime if regime.is_exact], ids=lambda regime: regime.value)
def test_broken_layer_fails_whatever_the_content(regime: Regime, device: torch.device) -> None:
    factory, _ = load_layer(BROKEN_LAYER)
    with pytest.raises(OracleFailure) as caught:
        judge(layer_scenario(regime), optimized_backend, device, layer_factory=factory)
    assert caught.value.finding.field in ("out", "lse")


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
        entry("sparse MLA cache=fp8 heads=128 tokens=64", "ours-fp8-128-64", 90e-6, name="ours"),
        entry("sparse MLA cache=fp8 heads=128 tokens=64", "FlashMLA-fp8-128-64", 45e-6, name="FlashMLA"),
        entry("sparse MLA cache=fp8 heads=128 tokens=64", "copy floor-fp8-128-64", 20e-6, name="copy floor"),
        entry("sparse MLA cache=fp8 heads=128 tokens=64", "matmul floor-fp8-128-64", 30e-6, name="matmul floor"),
        entry("sparse MLA cache=fp8 heads=128 tokens=8", "ours-fp8-128-8", 10e-6, name="ours"),
        entry("sparse MLA cache=fp8 heads=128 tokens=8", "copy floor-fp8-128-8", 5e-6, name="copy floor"),
        entry("top-k rows=8 width=8192", "ours-8-8192", 20e-6, name="ours"),
        entry("top-k rows=8 width=8192", "fast_topk-8-8192", 25e-6, name="fast_topk"),
        entry("store cache=bf16 rows=64", "ours-bf16-64", 3e-6, name="ours"),
        *(
            entry("step mode=DECODE bs=64 length=8192", f"{name}-DECODE-64-8192", median, name=name)
            for name, median in [
                ("metadata", 2e-6),
                ("store", 3e-6),
                ("indexer", 40e-6),
                ("top-k", 15e-6),
                ("attention", 60e-6),
                ("whole step", 108e-6),
                ("copy floor", 20e-6),
                ("matmul floor", 40e-6),
            ]
        ),
    ]
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({"benchmarks": run}))
    command = [sys.executable, "-m", "tests.benchmarks.table"]
    done = subprocess.run([*command, str(path)], cwd=PROJECT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "| 8 | 120.0 | - | 30.0 | 4.00 | - |" in lines
    assert "| 8 | 8192 | 4 | 3.0 | 2.0 | - | 1.0 | 3.00 | - |" in lines
    (floors,) = (number for number, line in enumerate(lines) if line.endswith("| FlashMLA / ours | ours / floor |"))
    assert lines[floors + 2 : floors + 4] == [
        "| fp8 | 128 | 8 | 10.0 | - | 5.0 | - | - | - |",  # sizes in order; half a floor is none
        "| fp8 | 128 | 64 | 90.0 | 45.0 | 20.0 | 30.0 | 0.50 | 3.00 |",
    ]
    assert "| 8 | 8192 | 20.0 | - | 25.0 | - | - | - | 1.25 | - | - |" in lines
    assert "| bf16 | 64 | 3.0 | - | - |" in lines
    stages = "2.0 | 3.0 | 40.0 | 15.0 | 60.0"
    assert f"| DECODE | 64 | 8192 | {stages} | 120.0 | 108.0 | 20.0 | 40.0 | 0.90 | 2.70 |" in lines

    path.write_text(json.dumps({"benchmarks": [entry("something else bs=8", "ours-8", 1e-6, name="ours")]}))
    done = subprocess.run([*command, str(path)], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    path.write_text("{}")
    done = subprocess.run([*command, str(path)], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
