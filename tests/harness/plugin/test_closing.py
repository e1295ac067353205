"""What an interrupted run says of a failure that no test has reported yet."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.judge import OracleFailure
from nsa_oracle.harness.plugin import closing
from nsa_oracle.harness.plugin.session import Session
from nsa_oracle.harness.report.records import FailureRecord, grouped
from nsa_oracle.harness.scenarios.files import save
from nsa_oracle.harness.search.progress import CaseCounter, counts_in
from tests.support.metadata_cases import DECODE, one_replay


@pytest.mark.parametrize(("kind", "ending"), [(Kind.TIMEOUT, " --timeout 2"), (Kind.VALUE, "")])
def test_an_interrupted_failure_is_alike_to_one_that_was_reported(kind: Kind, ending: str, tmp_path: Path) -> None:
    case = one_replay(DECODE)
    failure = OracleFailure(case, Finding(kind, "case", "still running", "an end"), 2)
    file = tmp_path / "0.min.json"
    save(case.model_copy(update={"note": str(failure)}), file)
    (tmp_path / "counts").mkdir()
    CaseCounter(tmp_path / "counts", "one", "slow:X").note(saved=file, failure=failure)
    session = SimpleNamespace(case_timeout=2.0, device=torch.device("cpu"))
    session.replay_command = functools.partial(Session.replay_command, session)
    (count,) = counts_in(tmp_path / "counts")
    record = closing._interrupted(session, ("slow:X", None), count)
    assert record.command.endswith(f"replay {file} --device cpu --backend slow:X{ending}")
    assert record.report.endswith(record.command)
    assert record.report.count("<- fails here") == 1
    assert len(grouped([FailureRecord.of(failure, "", ""), record])) == 1
