"""Errors of the harness's own classes, raised by the code that is judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_oracle.harness.errors import BackendError, ScenarioError
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.judge import OracleFailure, judge
from tests.support.backends.clean import Clean
from tests.support.metadata_cases import DECODE, factory_of, one_replay

ERRORS = [
    BackendError("mine"),
    ScenarioError("mine"),
    OracleFailure(one_replay(DECODE), Finding(Kind.VALUE, "x", "", ""), 0),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_of_the_harness_that_judged_code_raises_is_a_finding(error: Exception, device: torch.device) -> None:
    class Raises(Clean):  # type: ignore[misc, valid-type]
        def init_forward_metadata_replay_cuda_graph(self, *args: Any, **kwargs: Any) -> None:
            raise error

    with pytest.raises(OracleFailure) as caught:
        judge(one_replay(DECODE), factory_of(Raises), device)
    assert caught.value.finding.kind is Kind.CRASH
    assert caught.value.finding.field == type(error).__name__
    assert "test_raised_errors.py" in caught.value.finding.sentence()
