"""A search: what it saves before it shrinks, what it counts, and what ends it."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_oracle.harness.errors import BackendError, ScenarioError
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.judge import OracleFailure, Verdict, judge, judge_subject
from nsa_oracle.harness.report.failure import explain
from nsa_oracle.harness.scenarios.files import RUNNING, from_json, load, to_json
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.scenarios.simplify import MOST_TRIALS_OF_A_HANG
from nsa_oracle.harness.search import explore as explore_module
from nsa_oracle.harness.search.drawing import PROFILES, SHARDS
from nsa_oracle.harness.search.explore import Exploration, explore
from nsa_oracle.harness.search.progress import CaseCounter, Count, counts_in
from nsa_oracle.harness.search.stream import CaseStream
from nsa_oracle.harness.subjects.subject import Subject, optimized_subject
from tests.support.backends import clean, crashes, lengths
from tests.support.metadata_cases import factory_of

CPU = torch.device("cpu")


class Watched(lengths.VerifyForgetsDrafts):  # type: ignore[misc, valid-type]
    """A broken backend that looks at the saved files whenever it is built."""

    folder: Path
    seen: list[dict[str, str]]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        there = {p.name: p.read_text(encoding="utf-8") for p in self.folder.iterdir()}
        self.seen.append({name: text for name, text in there.items() if not name.endswith(RUNNING)})


def test_raw_case_is_saved_before_shrinking_begins(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watched, "folder", tmp_path, raising=False)
    monkeypatch.setattr(Watched, "seen", [], raising=False)
    outcome = explore(Subject(factory_of(Watched)), device, 30, seed=3, save_dir=tmp_path)

    first = next(number for number, files in enumerate(Watched.seen) if files)
    assert first < len(Watched.seen) - 1, "nothing was shrunk"
    raw, minimal = sorted(Watched.seen[first], key=lambda name: ".min." in name)
    assert raw.endswith(".raw.json")
    assert minimal.endswith(".min.json")
    assert Watched.seen[first][raw] == Watched.seen[first][minimal]

    kept = {p.name: p for p in tmp_path.iterdir()}
    assert sorted(kept) == sorted([raw, minimal])
    assert kept[raw].read_text(encoding="utf-8") == Watched.seen[first][raw], "the raw case stays as it was found"
    assert outcome.failure is not None
    assert outcome.saved == kept[minimal]
    smallest: Scenario = load(kept[minimal])
    assert smallest == outcome.failure.scenario.model_copy(update={"note": outcome.failure.finding.sentence()})
    assert len(to_json(smallest)) < len(kept[raw].read_text(encoding="utf-8"))
    for path in kept.values():
        with pytest.raises(OracleFailure) as caught:
            judge(load(path), factory_of(lengths.VerifyForgetsDrafts), device)
        assert caught.value.finding.sentence() == load(path).note


def test_finding_is_not_lost_where_it_cannot_be_saved(device: torch.device, tmp_path: Path) -> None:
    (tmp_path / "full").write_text("")
    subject = Subject(factory_of(lengths.VerifyForgetsDrafts))
    outcome = explore(subject, device, 30, seed=3, save_dir=tmp_path / "full")
    assert outcome.failure is not None
    assert outcome.saved is None
    assert outcome.unsaved == f"{tmp_path}/full: File exists"
    reported = explain(outcome.failure, outcome.saved, "COMMAND", outcome.unsaved)
    assert f"saved:  nowhere ({tmp_path}/full: File exists); write this to CASE.json to replay it:" in reported
    (text,) = re.findall(r"^\{\n.*?^\}\n", reported, re.MULTILINE | re.DOTALL)
    assert from_json(text) == outcome.failure.scenario


def test_flaky_failure_keeps_the_raw_case(device: torch.device, tmp_path: Path) -> None:
    """A case that failed once and passes when repeated is still a failure."""
    built = []

    def factory(config: Any, req_to_token: torch.Tensor, _: tuple[str, ...]) -> Any:
        built.append(None)
        backend = crashes.RaisesAtReplay if len(built) == 1 else clean.Clean
        return backend(config, req_to_token)

    outcome = None
    for seed in range(20):
        built.clear()
        outcome = explore(Subject(factory), device, 1, seed=seed, save_dir=tmp_path / str(seed))
        if outcome.failure is not None:
            break
    assert outcome is not None
    assert outcome.flaky
    assert outcome.saved is not None
    assert outcome.saved.name.endswith(".raw.json")
    assert load(outcome.saved).note.startswith("backend raised: IndexError")


def test_reference_passes_exploration(device: torch.device, tmp_path: Path) -> None:
    outcome = explore(Subject(factory_of(clean.Clean)), device, 15, seed=1, save_dir=tmp_path)
    assert outcome.failure is None
    assert outcome.verdict.cases == 15
    assert list(tmp_path.iterdir()) == []


class TestCasesThatCannotBeJudged:
    """No finding, and nothing to shrink."""

    @pytest.mark.parametrize("error", [BackendError("no such method"), ScenarioError("too large")])
    def test_search_ends_at_once(self, error: Exception, device: torch.device, tmp_path: Path) -> None:
        calls = []

        def factory(*_: Any) -> Any:
            calls.append(None)
            raise error

        with pytest.raises(type(error)) as caught:
            explore(Subject(factory), device, 30, 1, tmp_path)
        assert caught.value is error
        assert len(calls) == 1
        assert list(tmp_path.iterdir()) == []

    def test_finding_is_kept_if_a_smaller_case_cannot_be_judged(
        self, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failed = []

        class FailsOnce(lengths.VerifyForgetsDrafts):
            def __init__(self, *arguments: Any) -> None:
                if failed:
                    raise ScenarioError("too large")
                super().__init__(*arguments)

        def judge_and_note(*arguments: Any) -> Verdict:
            try:
                return judge_subject(*arguments)
            except OracleFailure:
                failed.append(None)
                raise

        monkeypatch.setattr(explore_module, "judge_subject", judge_and_note)
        outcome = explore(Subject(factory_of(FailsOnce)), device, 60, 3, tmp_path)
        assert failed == [None]
        assert outcome.failure is not None
        assert outcome.saved is not None
        assert load(outcome.saved) == outcome.failure.scenario.model_copy(
            update={"note": outcome.failure.finding.sentence()}
        )


class TestWhichCasesAreJudged:
    """Those of the stream, by number: a shard's share, or the first ones, as a hunt judges them."""

    @pytest.fixture
    def judged(self, monkeypatch: pytest.MonkeyPatch) -> list[Scenario]:
        judged: list[Scenario] = []

        def note(subject: Subject, scenario: Scenario, *_: object) -> Verdict:
            judged.append(scenario)
            return Verdict()

        monkeypatch.setattr(explore_module, "judge_subject", note)
        return judged

    @pytest.mark.parametrize("with_layer", [False, True], ids=["metadata", "layer"])
    def test_shards_and_hunts_judge_the_same_stream(
        self, with_layer: bool, judged: list[Scenario], tmp_path: Path
    ) -> None:
        subject, cpu, profile = optimized_subject(), torch.device("cpu"), PROFILES["smoke"]
        count = profile.layer_cases if with_layer else profile.cases
        stream = CaseStream(subject.scale(cpu, with_layer), subject.switches, 5).cases(range(count))
        expected = [drawn.scenario for drawn in stream]
        explore(subject, cpu, count, 5, tmp_path, with_layer=with_layer)
        assert judged == expected
        judged.clear()
        explore(subject, cpu, profile.share(3, with_layer), 5, tmp_path, with_layer=with_layer)
        assert judged == expected[3::SHARDS]

    def test_no_case_is_judged_after_the_deadline(self, judged: list[Scenario], tmp_path: Path) -> None:
        outcome = explore(optimized_subject(), torch.device("cpu"), 8, 0, tmp_path, deadline=time.monotonic() - 1)
        assert (judged, outcome.failure) == ([], None)


def test_a_hang_is_shrunk_once_in_a_run_and_with_few_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial takes the whole time limit."""
    judged: list[Scenario] = []

    def hangs(subject: Subject, scenario: Scenario, *_: Any) -> Verdict:
        judged.append(scenario)
        raise OracleFailure(scenario, Finding(Kind.TIMEOUT, "case", "still running", "an end"), 0)

    monkeypatch.setattr(explore_module, "judge_subject", hangs)
    (tmp_path / "counts").mkdir()

    def search(name: str) -> Exploration:
        judged.clear()
        counter = CaseCounter(tmp_path / "counts", name)
        return explore(Subject(factory_of(clean.Clean)), CPU, 30, 3, tmp_path / "saved", counter=counter)

    first = search("first")
    assert 1 < len(judged) <= 1 + MOST_TRIALS_OF_A_HANG
    assert first.failure is not None
    assert first.first is not None
    assert len(to_json(first.failure.scenario)) < len(to_json(first.first.scenario))
    second = search("second")
    assert len(judged) == 1
    assert second.failure is not None
    assert second.saved is not None
    assert second.saved.exists()
    assert not second.flaky


def test_a_case_found_among_candidates_is_shrunk_from_there(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates that were not judged at first are not judged in shrinking either."""
    judged: list[Scenario] = []

    def judge_and_note(subject: Subject, scenario: Scenario, *arguments: Any) -> Verdict:
        judged.append(scenario)
        return judge_subject(subject, scenario, *arguments)

    monkeypatch.setattr(explore_module, "judge_subject", judge_and_note)
    subject = Subject(factory_of(lengths.VerifyForgetsDrafts))
    outcome = explore(subject, device, 60, 0, tmp_path)
    assert outcome.failure is not None
    found = load(next(tmp_path.glob("*.raw.json"))).model_copy(update={"note": ""})
    first = judged.index(found)
    assert judged[first + 1] == found
    assert not outcome.flaky


def test_a_failure_like_that_of_another_part_leaves_its_file_alone(device: torch.device, tmp_path: Path) -> None:
    """Two tests of one run that judge the same backend draw the same cases, which have files of the same names."""
    subject, counts = Subject(factory_of(Watched)), tmp_path / "counts"
    counts.mkdir()
    saved = []
    for part in ("one", "two"):
        counter = CaseCounter(counts, part)
        outcome = explore(subject, device, 30, seed=3, save_dir=tmp_path / "kept", counter=counter)
        assert outcome.failure is not None
        assert outcome.saved is not None
        assert load(outcome.saved) == outcome.failure.scenario.model_copy(update={"note": load(outcome.saved).note})
        saved.append((outcome.saved, outcome.saved.read_text(encoding="utf-8")))
    (first, text), (second, _) = saved
    assert (first.name[:12], first.name[12:]) == (second.name[:12], ".min.json")
    assert second.name.endswith(".raw.json")
    assert first.read_text(encoding="utf-8") == text


def test_the_counts_tell_how_small_a_case_is_while_it_is_shrunk(tmp_path: Path) -> None:
    seen: list[Count] = []

    class Seen(CaseCounter):
        def note(self, *arguments: Any, **options: Any) -> None:
            super().note(*arguments, **options)
            seen.extend(counts_in(tmp_path))

    subject = Subject(factory_of(lengths.VerifyForgetsDrafts))
    outcome = explore(subject, CPU, 30, 3, tmp_path / "saved", most_shrinking=40, counter=Seen(tmp_path, "part"))
    assert outcome.failure is not None
    assert outcome.first is not None
    sizes = [count.shrinking for count in seen if count.shrinking]
    assert sizes[0] == len(outcome.first.scenario.events) > sizes[-1] == len(outcome.failure.scenario.events)
    assert sizes == sorted(sizes, reverse=True)
    assert all(0 < count.ends < math.inf for count in seen if count.shrinking)
    assert not seen[-1].shrinking
