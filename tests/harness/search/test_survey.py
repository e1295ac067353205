"""The survey of a layer's properties: each is counted, and none ends the search."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nsa_oracle.harness.content.edge_logits import LogitKind
from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.judge import OracleFailure, judge_subject
from nsa_oracle.harness.report import text
from nsa_oracle.harness.scenarios.scales import SMALL_LAYER
from nsa_oracle.harness.scenarios.scenario import Eager
from nsa_oracle.harness.search import survey
from nsa_oracle.harness.search.survey import Survey
from nsa_oracle.harness.subjects import subject
from nsa_oracle.optimized.layer import SparseAttention as Capturable
from nsa_oracle.reference.layer import SparseAttention
from nsa_oracle.reference.types import AttentionConfig, BackendConfig, KVCacheDtype
from tests.support.layer_cases import IN_TURN, lattice, replay_of_two
from tests.support.layers import clean, in_graph, refused
from tests.support.layers.nudges import InFirstPlace
from tests.support.metadata_cases import VERIFY
from tests.support.surveys import broken, draw_only, subject_of, surveyed

RELATIONS = {f"same bits: {relation.value}" for relation in IN_TURN}


def test_clean_layer_holds_everything(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    records = surveyed(clean.SharesOutputs, device, replay_of_two(Eager(mode=VERIFY)), monkeypatch)
    edges = {name for name in records if name.startswith("made-up logits: ")}
    assert set(records) == {"runs every call", "random content: as the reference", *RELATIONS, *edges}
    assert broken(records) == set()
    assert records["runs every call"].checked == 1
    assert records["random content: as the reference"].checked == 3, "single stages, an eager chain, a captured one"
    counts = {name: records[name].checked for name in RELATIONS}
    eagerly = {"same bits: other pages", "same bits: requests in reverse order", "same bits: a request alone"}
    assert counts == {name: 2 if name in eagerly else 1 for name in RELATIONS}
    assert all(name in text.render(survey.survey_table(records)) for name in records)


def test_it_says_how_far_its_cases_reached(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of stages by themselves, with the reference's metadata, is none."""
    draw_only(replay_of_two(Eager(mode=VERIFY), layer=lattice()), monkeypatch)
    reaches = Survey(subject_of(Capturable), device)
    reaches.run(cases=1, seed=0)
    reach = reaches.found.reach
    assert (reach.cases, reach.replays.total(), reach.eager_calls) == (1, 1, {"TARGET_VERIFY": 1})
    assert reach.requests == 2
    assert reach.rows >= reach.requests


def test_exact_content_is_compared_and_not_related(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    records = surveyed(Capturable, device, replay_of_two(layer=lattice()), monkeypatch)
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
    assert records[name].finding.startswith("depends on what must not matter: lse at step 0, row ")
    assert set(records) >= RELATIONS, "nothing ends the search"


def test_the_case_of_a_broken_relation_fails_in_that_way_when_it_is_replayed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever relations a replay of the drawn case checks after its calls."""
    for seed in range(3):
        draw_only(replay_of_two().model_copy(update={"seed": seed}), monkeypatch)
        looks = Survey(subject_of(InFirstPlace), device)
        looks.run(cases=1, seed=0)
        looks.shrink(most_trials=5)
        broken_rows = set(looks.found.broken)
        assert "same bits: requests in reverse order" in broken_rows
        assert not any(row.passes_alone for row in looks.found.broken.values())
        for name, row in looks.found.broken.items():
            assert row.case is not None
            with pytest.raises(OracleFailure) as caught:
                judge_subject(looks.subject, row.case, device)
            found = {row for row in broken_rows if survey.shows(caught.value.finding, row)}
            assert found == {name} or any("many times over" in row for row in found), "that one is seen first"


def test_a_case_that_passes_when_it_is_replayed_has_no_command(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    class RaisesOnce(Capturable):
        calls = 0

        def sparse_mla(
            self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            RaisesOnce.calls += 1
            if RaisesOnce.calls == 1:
                raise RuntimeError("once")
            return super().sparse_mla(q, kv_cache, indices)

    draw_only(replay_of_two(layer=lattice()), monkeypatch)
    once = Survey(subject_of(RaisesOnce), device)
    once.run(cases=1, seed=0)
    assert set(once.found.broken) == {survey.RUNS}
    once.shrink()
    assert once.found.rows[survey.RUNS].passes_alone


def test_a_case_that_costs_the_device_stays_as_it_is_and_has_a_command(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is judged behind it in this process would fail, too."""
    monkeypatch.setattr(survey, "has_lost_the_device", lambda finding, device: True)
    draw_only(replay_of_two(), monkeypatch)
    lost = Survey(subject_of(in_graph.LooksAtLengths), device)
    lost.run(cases=1, seed=0)
    before = lost.found.rows[survey.RUNS].case
    lost.shrink()
    assert lost.found.rows[survey.RUNS].case == before
    assert not lost.found.rows[survey.RUNS].passes_alone


class RoundsQueries(Capturable):
    """Queries are rounded to e4m3, which changes nothing where all numbers are few bits wide."""

    def sparse_mla(
        self, q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().sparse_mla(q.to(torch.float8_e4m3fn).bfloat16(), kv_cache, indices)


def test_wrong_values_are_reported_by_the_content_that_shows_them(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = surveyed(RoundsQueries, device, replay_of_two(), monkeypatch)
    assert broken(records) == {"random content: as the reference"}, "it is deterministic, at least"
    assert records["random content: as the reference"].finding.startswith("beyond the error bound: out at step 0, ")
    assert broken(surveyed(RoundsQueries, device, replay_of_two(layer=lattice()), monkeypatch)) == set()


class NanIsTheLargest(Capturable):
    """Top-k that counts NaN as the largest number, as radix sorts of the bits do."""

    def topk_indices(self, logits: torch.Tensor, seqlens_expanded: torch.Tensor) -> torch.Tensor:
        return super().topk_indices(logits.nan_to_num(nan=torch.inf, neginf=-torch.inf), seqlens_expanded)


def test_a_kind_of_made_up_logits_that_is_broken_hides_no_other(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = surveyed(NanIsTheLargest, device, replay_of_two(layer=lattice()), monkeypatch)
    assert broken(records) == {"made-up logits: NaN"}
    assert "(made-up logits: NaN, length " in records["made-up logits: NaN"].finding
    assert {name for name in records if name.startswith("made-up")} == {
        f"made-up logits: {kind.value}" for kind in LogitKind
    }


def test_layer_that_cannot_be_captured_is_reported_and_ends_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = surveyed(in_graph.LooksAtLengths, device, replay_of_two(), monkeypatch)
    assert broken(records) == {"runs every call"}
    assert records["runs every call"].finding.startswith("capture rejected: torch.Tensor.__int__ at in_graph.py:")


def test_layer_that_is_derived_from_the_reference_is_told_what_to_derive_from(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Derived(SparseAttention):
        """The reference reads lengths on the host, which a capture refuses."""

    derived = Survey(subject_of(Derived), device)
    draw_only(replay_of_two(), monkeypatch)
    derived.run(cases=1, seed=0)
    (row,) = derived.found.broken.values()
    mend = "derive yours from nsa_oracle.optimized.layer.SparseAttention instead"
    assert mend in row.finding
    assert row.case is not None
    with pytest.raises(OracleFailure, match=mend):
        judge_subject(derived.subject, row.case, device)
    assert mend not in surveyed(in_graph.LooksAtLengths, device, replay_of_two(), monkeypatch)[survey.RUNS].finding


def test_survey_draws_the_sizes_of_the_layer(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, KVCacheDtype, int]] = []

    class Looks(Capturable):
        def __init__(self, config: BackendConfig, attention: AttentionConfig) -> None:
            super().__init__(config, attention)
            seen.append((attention.num_heads, attention.kv_cache_dtype, config.page_size))

    soon = dataclasses.replace(SMALL_LAYER, max_context_lens=(20,), index_topks=(4,), num_steps=(1,), max_events=1)
    monkeypatch.setitem(subject.SCALES, (device.type, True), soon)
    found = Survey(subject_of(Looks, num_heads=(3,), kv_cache_dtype=("fp8",), page_size=(16,)), device)
    found.run(cases=4, seed=0)
    assert found.found.rows["runs every call"].checked == 4
    assert set(seen) == {(3, KVCacheDtype.FP8, 16)}


def test_what_cannot_be_surveyed_is_refused(device: torch.device) -> None:
    with pytest.raises(BackendError, match=r"^layer 'WithoutStages': WithoutStages has none of the methods "):
        Survey(subject_of(refused.WithoutStages), device).run(cases=1, seed=0)
    with pytest.raises(ValueError, match=r"^none of the sizes drawn on this device fits: num_heads may be 7, but is "):
        Survey(subject_of(Capturable, num_heads=(7,)), device)


def test_budget_ends_a_survey_in_the_middle_of_a_case(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was found by then is kept."""
    draw_only(replay_of_two(Eager(mode=VERIFY)), monkeypatch)
    times = iter(range(100))
    monkeypatch.setattr(survey.time, "monotonic", lambda: float(next(times)))
    found = Survey(subject_of(clean.SharesOutputs), device)
    found.run(cases=3, seed=0, deadline=5.0)
    assert found.found.cases == 0
    assert found.found.rows["random content: as the reference"].checked > 0
    assert found.found.holds


def test_progress_is_reported_after_each_case(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_only(replay_of_two(layer=lattice()), monkeypatch)
    reported: list[int] = []
    found = Survey(subject_of(Capturable), device)
    found.run(cases=1, seed=0, report_progress=reported.append)
    assert reported == [1]
