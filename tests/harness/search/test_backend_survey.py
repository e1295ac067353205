"""The survey of a backend: a row for each field of each mode, and no failure ends it or hides another."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_oracle.harness.errors import BackendError, CaseTimeout
from nsa_oracle.harness.judge import OracleFailure, judge_subject
from nsa_oracle.harness.protocol import BackendFactory
from nsa_oracle.harness.report.text import render
from nsa_oracle.harness.scenarios.files import load
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Finish, Join, Replay, Scenario
from nsa_oracle.harness.search import backend_survey
from nsa_oracle.harness.search.backend_survey import (
    BUILDS,
    CAPTURES,
    FREEZES_NOTHING,
    NO_EXCEPTION,
    SHOWN,
    UNMODIFIED,
    WITHIN,
    BackendFound,
    BackendSurvey,
    Property,
    backend_table,
    rows_as_json,
)
from nsa_oracle.harness.search.rows import Row, save_rows
from nsa_oracle.harness.subjects.loading import load_backend
from nsa_oracle.harness.subjects.subject import Subject
from nsa_oracle.reference.multi_step import MultiStepBackend
from nsa_oracle.reference.types import BackendConfig, ForwardBatch
from tests.support.backends import clean, declared, in_graph, memory, writes
from tests.support.metadata_cases import DECODE, VERIFY, case, factory_of, one_replay

CPU = torch.device("cpu")
HISTORY = case(
    Capture(mode=DECODE, buckets=(2,)),
    Capture(mode=VERIFY, buckets=(2,)),
    Join(seq_len=3),
    Replay(mode=VERIFY),
    Join(seq_len=6),
    Replay(mode=DECODE),
    Eager(mode=DECODE),
    Accept(accept_lengths=(1,)),
    Replay(mode=VERIFY),
    Finish(request=0),
    Replay(mode=DECODE, times=2),
    num_steps=3,
)


def survey_of(factory: BackendFactory, scenario: Scenario = HISTORY) -> BackendSurvey:
    survey = BackendSurvey(Subject(factory), CPU)
    survey.survey(scenario)
    return survey


def surveyed(factory: BackendFactory, scenario: Scenario = HISTORY) -> BackendFound:
    return survey_of(factory, scenario).found


def test_a_clean_backend_has_a_row_for_everything_and_none_is_broken() -> None:
    found = surveyed(factory_of(clean.Clean))
    assert found.holds
    assert {key.name for key in found.rows} >= {
        BUILDS,
        NO_EXCEPTION,
        CAPTURES,
        FREEZES_NOTHING,
        SHOWN,
        UNMODIFIED,
        WITHIN,
        "page_table_1",
    }
    assert found.rows[Property("graph", "DECODE", "page_table_1")].checked == 3
    assert found.rows[Property("eager", "DECODE", "max_seq_len_k")].checked == 1
    assert found.rows[Property("graph", "TARGET_VERIFY", NO_EXCEPTION)].checked == 2
    assert found.rows[Property("graph", "TARGET_VERIFY", CAPTURES)].checked == 1
    assert Property("graph", "DECODE", "paged_mqa_schedule_metadata") not in found.rows, "this setup has no schedule"


def test_it_says_how_far_its_cases_reached() -> None:
    found = surveyed(factory_of(declared.StaleTable))
    assert found.reach.as_json() == {
        "cases": 1,
        "replays": {"DECODE": 3, "TARGET_VERIFY": 2},
        "eager calls": {"DECODE": 1},
        "largest batch": 2,
        "most rows": 4,
        "longest context": 7,
    }
    assert found.reach.largest == [
        "1 case",
        "largest batch 2 requests",
        "at most 4 rows in a call",
        "longest context 7 tokens",
    ]
    assert found.reach.calls == ["5 replays (DECODE 3, TARGET_VERIFY 2)", "1 eager call (DECODE 1)"]
    empty = surveyed(factory_of(clean.Clean), case(Eager(mode=DECODE))).reach
    assert (empty.requests, empty.context) == (0, 0)
    assert BackendFound().reach.largest == []


def test_all_wrong_fields_of_a_call_are_found_and_all_their_steps() -> None:
    found = surveyed(factory_of(declared.StaleTable))
    assert {(key.mode, key.name): row.broken for key, row in found.broken.items()} == {
        ("DECODE", "cu_seqlens_k"): 3,
        ("DECODE", "real_page_table"): 3,
        ("TARGET_VERIFY", "cu_seqlens_k"): 2,
        ("TARGET_VERIFY", "real_page_table"): 2,
    }
    row = found.rows[Property("graph", "DECODE", "cu_seqlens_k")]
    assert row.steps == {0, 1, 2}
    assert row.finding.startswith("wrong value: cu_seqlens_k at step 0, ")
    assert row.case is not None
    assert row.case.events == HISTORY.events[:6], "nothing behind the call that shows it"


def test_an_exception_ends_nothing() -> None:
    found = surveyed(factory_of(declared.FailsToVerify))
    rows = {(key.call, key.mode, key.name): (row.checked, row.broken) for key, row in found.rows.items()}
    assert rows["graph", "TARGET_VERIFY", NO_EXCEPTION] == (2, 2)
    assert rows["graph", "DECODE", "cu_seqlens_k"] == (3, 3), "on a new backend, which has captured the same graphs"
    assert rows["graph", "DECODE", "page_table_1"] == (3, 0)
    assert rows["eager", "DECODE", "page_table_1"] == (1, 0)
    assert "AssertionError: got cannot verify" in found.rows[Property("graph", "TARGET_VERIFY", NO_EXCEPTION)].finding


def test_a_graph_that_cannot_be_captured_is_not_replayed() -> None:
    found = surveyed(factory_of(in_graph.SyncsInCapture))
    assert found.rows[Property("graph", "DECODE", CAPTURES)].broken == 1
    assert found.rows[Property("eager", "DECODE", "page_table_1")].checked == 4, "a server then calls eagerly"
    assert Property("graph", "DECODE", "page_table_1") not in found.rows


class NeverBuilt(MultiStepBackend):
    def __init__(self, config: BackendConfig, req_to_token: torch.Tensor) -> None:
        raise RuntimeError("no")


@pytest.mark.parametrize(("backend", "name"), [(in_graph.SyncsInCapture, CAPTURES), (NeverBuilt, BUILDS)])
def test_what_is_broken_before_any_call_has_a_case_with_one_which_replay_needs(backend: Any, name: str) -> None:
    survey = survey_of(factory_of(backend))
    for _ in range(2):
        row = next(row for key, row in survey.found.broken.items() if key.name == name)
        assert row.case is not None
        survey.subject.check(row.case, Path("case.json"))
        with pytest.raises(OracleFailure):
            judge_subject(survey.subject, row.case, CPU)
        survey.shrink()
    assert len(row.case.events) < 3


def test_a_backend_that_cannot_be_built_has_one_row() -> None:
    assert list(surveyed(factory_of(NeverBuilt)).rows) == [Property("-", "-", BUILDS)]


def _exits() -> None:
    os._exit(3)


def _interrupts() -> None:
    raise KeyboardInterrupt


class _Own(BaseException):
    pass


def _raises_its_own() -> None:
    raise _Own("internal")


@pytest.mark.parametrize(
    ("end", "name"),
    [
        (_exits, "ProcessExit"),
        (_interrupts, "KeyboardInterrupt"),
        (_raises_its_own, "_Own: got internal"),
        (lambda: pytest.skip("not today"), "Skipped: got not today"),
    ],
)
def test_a_backend_that_would_end_the_survey_has_a_row(end: Callable[[], None], name: str) -> None:
    class Ends(MultiStepBackend):
        def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
            end()

    (row,) = surveyed(factory_of(Ends), one_replay(DECODE)).broken.items()
    assert row[0].name == NO_EXCEPTION
    assert name in row[1].finding


def test_moved_buffers_are_one_row_and_their_content_is_judged_all_the_same() -> None:
    class Moves(declared.StaleTable):  # type: ignore[misc, valid-type]
        def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
            super().init_forward_metadata_replay_cuda_graph(forward_batch, bs)
            for step in self.attn_backends:
                shown = step.forward_metadata
                step.forward_metadata = type(shown)(**{**vars(shown), "cu_seqlens_k": shown.cu_seqlens_k.clone()})

    found = surveyed(factory_of(Moves), one_replay(DECODE, seq_len=6))
    assert {key.name for key in found.broken} == {SHOWN, "cu_seqlens_k", "real_page_table"}


def test_stray_writes_and_modified_inputs_have_rows() -> None:
    found = surveyed(factory_of(memory.WritesSeqLens), one_replay(DECODE))
    assert {key.name for key in found.broken} == {UNMODIFIED}
    found = surveyed(factory_of(memory.WritesOneRowBeyond), HISTORY)
    assert {key.name for key in found.broken} == {WITHIN}
    found = surveyed(factory_of(writes.touching(writes.adds_nothing, "eager")))
    assert {key.name for key in found.broken} == {UNMODIFIED}


def test_the_smallest_case_is_saved_and_replays(tmp_path: Path) -> None:
    survey = survey_of(load_backend("tests.support.backends.declared:StaleTable"))
    survey.shrink()
    found = survey.found
    save_rows(found.broken.values(), tmp_path, lambda file: f"replay {file.name}")
    row = found.rows[Property("graph", "DECODE", "real_page_table")]
    assert row.saved is not None
    assert row.case is not None
    assert len(row.case.events) == 3
    assert row.replay == f"replay {row.saved.name}"
    again = surveyed(factory_of(declared.StaleTable), load(row.saved))
    assert Property("graph", "DECODE", "real_page_table") in again.broken
    assert load(row.saved).note == row.finding
    as_json = json.loads(json.dumps(rows_as_json(found.rows)))
    (entry,) = (e for e in as_json if (e["call"], e["mode"], e["name"]) == ("graph", "DECODE", "real_page_table"))
    assert (entry["checked"], entry["broken"], entry["steps"]) == (3, 3, [0, 1, 2])
    assert entry["case"] == str(row.saved)


FITS_NO_GRAPH = case(
    Capture(mode=DECODE, buckets=(1,)),
    Join(seq_len=3),
    Replay(mode=DECODE),
    Accept(accept_lengths=(2,)),
    Join(seq_len=4),
    Replay(mode=DECODE),
)


class DoesNotEnd(MultiStepBackend):
    """Eagerly; as if the time limit of the case had ended it."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        raise CaseTimeout("still running after 1 second")


def test_a_replay_that_fits_no_graph_is_an_eager_call_also_if_it_raises_or_does_not_end() -> None:
    class Raises(MultiStepBackend):
        def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
            raise RuntimeError("no")

    for backend in (Raises, DoesNotEnd):
        found = surveyed(factory_of(backend), FITS_NO_GRAPH)
        assert set(found.broken) == {Property("eager", "DECODE", NO_EXCEPTION)}
        assert found.rows[Property("graph", "DECODE", NO_EXCEPTION)].checked == 1
    empty = case(Eager(mode=DECODE))
    assert set(surveyed(factory_of(Raises), empty).broken) == {Property("eager", "IDLE", NO_EXCEPTION)}, (
        "as one that runs"
    )


@pytest.mark.parametrize(("case_timeout", "events"), [(1.0, 3), (600.0, len(FITS_NO_GRAPH.events))])
def test_a_case_that_does_not_end_is_made_smaller_if_there_is_time_to_wait(case_timeout: float, events: int) -> None:
    survey = BackendSurvey(dataclasses.replace(Subject(factory_of(DoesNotEnd)), case_timeout=case_timeout), CPU)
    survey.survey(FITS_NO_GRAPH)
    survey.shrink()
    (row,) = survey.found.broken.values()
    assert row.case is not None
    assert row.has_hung
    assert len(row.case.events) == events


def test_the_table_begins_with_what_is_broken() -> None:
    rows = {Property("eager", "DECODE", "a"): Row(2), Property("graph", "IDLE", "b"): Row(3, 1, {1}, "wrong")}
    lines = render(backend_table(rows), 160).splitlines()
    assert "b" in lines[3]
    assert "wrong" in lines[3]
    assert "a" in lines[4]


def test_drawn_cases_are_surveyed_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(float(n) for n in range(1000))
    monkeypatch.setattr(backend_survey.time, "monotonic", lambda: next(times))
    found = BackendSurvey(Subject(factory_of(clean.Clean)), CPU)
    seen: list[int] = []
    found.run(5, 0, 2.5, seen.append)
    assert seen == [1, 2, 3]
    assert found.found.cases == 3


def test_what_cannot_be_surveyed_is_refused() -> None:
    def refuses(config: BackendConfig, pool: torch.Tensor, _: tuple[str, ...]) -> Any:
        raise BackendError("not here")

    with pytest.raises(BackendError, match="not here"):
        surveyed(refuses)
