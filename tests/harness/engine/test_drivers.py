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
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, Metadata
from tests.support.backends import declared
from tests.support.backends.seams import Step, backend_of
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


SOME_STEPS = case(
    *(Capture(mode=DECODE, buckets=(2,)), Join(seq_len=3)),
    *(Replay(mode=DECODE), Accept(accept_lengths=(1,)), Replay(mode=DECODE, draft_steps=1)),
    *(Eager(mode=DECODE, draft_steps=1), Accept(accept_lengths=(1,)), Replay(mode=DECODE), Eager(mode=DECODE)),
    num_steps=3,
)


@backend_of
class CannotBePreparedBehindTheFirst(Step):
    """Clean in a call of one step: the others must not be called, and what they show must not be read."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        assert self.speculative_step_id == 0
        super().init_forward_metadata(forward_batch)

    def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
        assert self.speculative_step_id == 0
        super().refresh(buffers, batch)


def with_drive(scenario: Scenario, drive: Drive) -> Scenario:
    return scenario.model_copy(update={"setup": scenario.setup.model_copy(update={"drive": drive})})


@pytest.mark.parametrize("drive", Drive)
@pytest.mark.parametrize("build", [MultiStepBackend, Optimized, declared.Todays, declared.TodaysInGraph])
def test_some_of_the_steps_then_all(build: Any, drive: Drive, device: torch.device) -> None:
    verdict = judge(with_drive(SOME_STEPS, drive), factory_of(build), device)
    assert (verdict.replays, verdict.eager_calls) == (6, 4)


def test_steps_that_do_not_run_are_neither_prepared_nor_read(device: torch.device) -> None:
    events = tuple(
        event.model_copy(update={"draft_steps": 1}) if isinstance(event, Replay | Eager) else event
        for event in SOME_STEPS.events
    )
    scenario = with_drive(SOME_STEPS.model_copy(update={"events": events}), Drive.SINGLE_STEP)
    assert judge(scenario, factory_of(CannotBePreparedBehindTheFirst), device).replays == 6
    with pytest.raises(OracleFailure, match="AssertionError"):
        judge(with_drive(SOME_STEPS, Drive.SINGLE_STEP), factory_of(CannotBePreparedBehindTheFirst), device)


def test_the_last_step_of_some_is_compared(device: torch.device) -> None:
    class WrongFromTheSecondOn(Step):
        def refresh(self, buffers: Metadata, batch: ForwardBatch) -> None:
            super().refresh(buffers, batch)
            if self.speculative_step_id > 0:
                buffers.cache_seqlens_int32.add_(1)

    two = (*SOME_STEPS.events[:2], Replay(mode=DECODE, draft_steps=2))
    scenario = with_drive(SOME_STEPS.model_copy(update={"events": two}), Drive.SINGLE_STEP)
    with pytest.raises(OracleFailure, match="cache_seqlens_int32 at step 1"):
        judge(scenario, factory_of(backend_of(WrongFromTheSecondOn)), device)
    one = (*SOME_STEPS.events[:2], Replay(mode=DECODE, draft_steps=1))
    judge(scenario.model_copy(update={"events": one}), factory_of(backend_of(WrongFromTheSecondOn)), device)


def test_an_incomplete_set_of_names_is_refused_in_one_line() -> None:
    with pytest.raises(BackendError, match=r"^backend 'a:B' lacks TodaysHalf.init_forward_metadata_in_graph"):
        checked(declared.TodaysHalf(CONFIG, POOL), "a:B")
    with pytest.raises(
        BackendError, match=r"^backend 'a:B' lacks object.init_forward_metadata; nsa_oracle/harness/protocol.py"
    ):
        checked(object(), "a:B")
