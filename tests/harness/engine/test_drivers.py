"""Backends are called by the set of names that they have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_oracle.harness.engine.drivers import MultiStepDriver, OutOfGraphDriver, SingleStepDriver, driver_for
from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Finish, Join, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Drive
from nsa_oracle.harness.subjects.loading import checked
from nsa_oracle.optimized.multi_step import MultiStepBackend as Optimized
from nsa_oracle.reference.multi_step import MultiStepBackend, SingleStepBackend
from nsa_oracle.reference.types import BackendConfig
from tests.support.backends import declared
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND, EXTEND, VERIFY, case, factory_of, one_replay

CONFIG = BackendConfig(4, 16, 8, 2, 2)
POOL = torch.zeros(1, 16, dtype=torch.int32)


def every_mode(drive: Drive) -> Scenario:
    modes = (DECODE, VERIFY, DRAFT_EXTEND)
    return case(
        *(Capture(mode=mode, buckets=(2, 3)) for mode in modes),
        Join(seq_len=3),
        Join(seq_len=6),
        *(Replay(mode=mode) for mode in modes),
        Accept(accept_lengths=(0, 2)),
        *(Eager(mode=mode) for mode in (*modes, EXTEND)),
        Finish(request=0),
        *(Replay(mode=mode) for mode in modes),
        num_steps=2,
        drive=drive,
        paged_mqa_num_sms=2,
    )


@pytest.mark.parametrize("drive", Drive)
@pytest.mark.parametrize("build", [declared.Todays, declared.TodaysOptimized, declared.TodaysInGraph])
def test_todays_names_do_the_same(build: Any, drive: Drive, device: torch.device) -> None:
    assert judge(every_mode(drive), factory_of(build), device).replays == 12


def test_a_replay_that_is_not_prepared_is_found_by_todays_names(device: torch.device) -> None:
    with pytest.raises(OracleFailure, match="wrong value: cache_seqlens_int32"):
        judge(one_replay(DECODE), factory_of(declared.TodaysForgets), device)


@pytest.mark.parametrize("build", [MultiStepBackend, Optimized])
def test_older_names_are_called_if_there_are_both(build: Any) -> None:
    backend = build(CONFIG, POOL)
    assert isinstance(driver_for(Drive.MULTI_STEP, backend, CONFIG), MultiStepDriver)
    assert isinstance(driver_for(Drive.SINGLE_STEP, backend, CONFIG), SingleStepDriver)


def test_todays_names_are_called_if_there_are_no_others() -> None:
    backend = declared.Todays(CONFIG, POOL)
    multi, single = (driver_for(drive, backend, CONFIG) for drive in (Drive.MULTI_STEP, Drive.SINGLE_STEP))
    assert isinstance(multi, OutOfGraphDriver)
    assert multi.backends == [backend]
    assert isinstance(single, OutOfGraphDriver)
    assert single.backends == backend.attn_backends


def test_a_single_step_backend_is_driven_alone() -> None:
    backend = SingleStepBackend(CONFIG, POOL)
    driver = driver_for(Drive.MULTI_STEP, backend, CONFIG)
    assert isinstance(driver, SingleStepDriver)
    assert list(driver.backends) == [backend]


def test_an_incomplete_set_of_names_is_refused_in_one_line() -> None:
    with pytest.raises(BackendError, match=r"^backend 'a:B' lacks TodaysHalf.init_forward_metadata_in_graph"):
        checked(declared.TodaysHalf(CONFIG, POOL), "a:B")
    with pytest.raises(
        BackendError, match=r"^backend 'a:B' lacks object.init_forward_metadata; nsa_oracle/harness/protocol.py"
    ):
        checked(object(), "a:B")
