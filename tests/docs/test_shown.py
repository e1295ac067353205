"""The worked examples of the pages do what is said of them, and print what is shown."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from docs.examples.my_layer import MyAttention
from nsa_oracle.harness.checks.relations import Relation
from nsa_oracle.harness.commands.tiers import Tier, TierOutcome, tiers_table
from nsa_oracle.harness.content.edge_logits import LogitKind
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.protocol import STAGES, SparseAttention, Strictness
from nsa_oracle.harness.report import failure
from nsa_oracle.harness.report.failure import explain, replay_command
from nsa_oracle.harness.report.text import WIDTH, render
from nsa_oracle.harness.scenarios.files import from_json, to_json
from nsa_oracle.harness.scenarios.limits import BACKEND_FIELDS, LAYER_FIELDS, Limits
from nsa_oracle.harness.scenarios.scales import SMALL_LAYER, restricted
from nsa_oracle.harness.scenarios.scenario import GRAPH_MODES, Accept, Capture, Eager, Join, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Drive, Layer, Mirror, Regime, Setup
from nsa_oracle.harness.subjects.default import optimized_backend
from nsa_oracle.harness.subjects.loading import limits_of_backend, load_backend, load_layer
from nsa_oracle.reference.types import ForwardMode, StepSemantics
from tests.support.pages import PAGES, fenced, first_column, section

README, OPTIONS, SAVED = PAGES["README.md"], PAGES["docs/options.md"], PAGES["docs/saved-cases.md"]
BACKEND_PAGE, LAYER_PAGE = PAGES["docs/judge-a-backend.md"], PAGES["docs/judge-a-layer.md"]
EXAMPLE, BROKEN = "docs.examples.my_backend:MyBackend", "docs.examples.my_backend:MyBrokenBackend"
LAYER, BROKEN_LAYER = "docs.examples.my_layer:MyAttention", "docs.examples.my_layer:MyBrokenAttention"


def shown_block(page: str, word: str) -> str:
    """The one block of output with ``word`` in it."""
    (block,) = (block for block in fenced("text", page) if word in block)
    return block


def shown_failure(page: str) -> tuple[str, Path]:
    """The report of a failure, and the file that it names."""
    block = shown_block(page, "ORACLE FAILURE")
    (saved,) = re.findall(r"^saved:  (.*)$", block, re.MULTILINE)
    return block, Path(saved)


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def shown_case() -> Scenario:
    (block,) = fenced("json", SAVED)
    return from_json(block, "docs/saved-cases.md")


def test_names_methods_sizes_and_strictness_of_layers() -> None:
    methods = [name for name in vars(SparseAttention) if not name.startswith("_")]
    assert first_column(LAYER_PAGE.partition("\n## ")[0]) == [f"`{name}`" for name in methods]
    said = " ".join(section(LAYER_PAGE, "Rules for a layer").split())
    named = said.partition("Sizes may also name ")[2].partition(".")[0]
    assert set(re.findall(r"`(\w+)`", named)) == set(LAYER_FIELDS) - set(BACKEND_FIELDS)
    with pytest.raises(ValueError, match="none of the sizes"):
        restricted(SMALL_LAYER, Limits({"num_heads": (64,)}))  # "as with production's sizes on a CPU"
    declared = said.partition("`weaker`, ")[2].partition("Relations are never weaker")[0]
    for strictness in (Strictness.SAME_SET, Strictness.ONE_STEP, Strictness.BOUND):
        stages = declared.partition(f"`{strictness.name}` for ")[2].partition("(")[0]
        assert tuple(re.findall(r"`(\w+)`", stages)) == strictness.stages


def test_names_sizes_of_backends() -> None:
    said = " ".join(section(BACKEND_PAGE, "Declaring what your backend is made for").split())
    named = said.partition("`sizes` maps fields to lists of allowed values: ")[2].partition(". ")[0]
    assert set(re.findall(r"`(\w+)`", named)) == set(BACKEND_FIELDS)


def test_closing_report_shows_every_stage_and_no_other() -> None:
    table = shown_block(OPTIONS, "stage of the layer")
    stages = table.partition("stage of the layer")[2].partition("layer: ")[0]
    assert re.findall(r"^│ (\w+) +│", stages, re.MULTILINE) == list(STAGES)


def test_survey_shows_properties_that_exist() -> None:
    known = {"runs every call", *(f"same bits: {relation.value}" for relation in Relation)}
    known |= {f"{regime.value} content: as the reference" for regime in Regime}
    known |= {f"made-up logits: {kind.value}" for kind in LogitKind}
    shown = set(re.findall(r"^│ (\S.*?) +│ \d", shown_block(LAYER_PAGE, "property"), re.MULTILINE))
    assert shown <= known
    assert len(shown) > 1


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


@pytest.mark.parametrize("scenario", [shown_case(), ALL_MODES], ids=["shown", "all modes"])
def test_example_backend_passes(scenario: Scenario, device: torch.device) -> None:
    verdict = judge(scenario, load_backend(EXAMPLE), device)
    assert verdict.replays > 0


def test_backend_in_ten_lines_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    (block,) = fenced("python", README)
    assert len([line for line in block.splitlines() if line]) <= 10
    (tmp_path / "my_backend.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_backend", raising=False)
    limits = limits_of_backend("my_backend:MyBackend")
    assert limits.sizes == {"page_size": (64,)}
    modes = (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY)
    assert limits.modes == modes
    scenario = Scenario(
        setup=Setup(page_size=64, max_context_len=130, index_topk=17, num_steps=2, num_draft_tokens=2, pool_size=2),
        events=(
            *(Capture(mode=mode, buckets=(2,)) for mode in modes),
            Join(seq_len=65),
            *(Replay(mode=mode) for mode in modes),
            *(Eager(mode=mode) for mode in modes),
        ),
    )
    assert limits.misfit(scenario) is None
    assert judge(scenario, load_backend("my_backend:MyBackend"), device).replays == 4  # two, with either poison


@pytest.fixture
def shown_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages show the environment that ``make`` creates, whichever runs the tests."""
    monkeypatch.setattr(failure, "python_command", lambda: ".venv/bin/python")


@pytest.mark.usefixtures("shown_python")
def test_its_broken_twin_fails_as_shown(device: torch.device) -> None:
    scenario, (block, saved) = shown_case(), shown_failure(README)
    with pytest.raises(OracleFailure) as caught:
        judge(scenario, load_backend(BROKEN), device)
    assert scenario.note == caught.value.finding.sentence()
    assert lines(explain(caught.value, saved, replay_command((saved,), BROKEN, "cpu"))) == lines(block)


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


@pytest.mark.usefixtures("shown_python")
def test_broken_layer_fails_as_shown(device: torch.device) -> None:
    factory, _ = load_layer(BROKEN_LAYER)
    with pytest.raises(OracleFailure) as caught:
        judge(BROKEN_LAYER_CASE, optimized_backend, device, layer_factory=factory)
    block, saved = shown_failure(LAYER_PAGE)
    assert lines(explain(caught.value, saved, replay_command((saved,), None, "cpu", BROKEN_LAYER))) == lines(block)

    verdict = caught.value.finding.sentence()
    no_gpu = "torch sees no CUDA device here"
    passed = {Tier.REFERENCE: True, Tier.INTERPRETER: False, Tier.COMPILED: False, Tier.SIMULATED: False}
    outcome_of = {True: "", False: verdict, None: no_gpu}
    outcomes = [TierOutcome(tier, passed.get(tier), outcome_of[passed.get(tier)]) for tier in Tier]
    table = render(tiers_table(outcomes), WIDTH)
    shown = shown_block(SAVED, "what it adds")
    assert shown == f"{table}\nfirst to fail: interpreter, so look at the logic\n  {verdict}\n"


@pytest.mark.parametrize("regime", [regime for regime in Regime if regime.is_exact], ids=lambda regime: regime.value)
def test_broken_layer_fails_whatever_the_content(regime: Regime, device: torch.device) -> None:
    factory, _ = load_layer(BROKEN_LAYER)
    with pytest.raises(OracleFailure) as caught:
        judge(layer_scenario(regime), optimized_backend, device, layer_factory=factory)
    assert caught.value.finding.field in ("out", "lse")


def test_saved_case_is_in_the_form_that_the_harness_writes() -> None:
    (block,) = fenced("json", SAVED)
    assert to_json(shown_case()) == block
