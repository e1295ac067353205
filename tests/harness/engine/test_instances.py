"""One instance per role, with the number of steps that it declares, its padding, and what each call hands over."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.engine.inputs import StaticInputs
from nsa_oracle.harness.engine.observations import Conditions, Observation
from nsa_oracle.harness.engine.stress import Delivery
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.memory.poison import SENTINELS
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Join, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Inputs
from nsa_oracle.harness.subjects.default import optimized_layer
from nsa_oracle.harness.subjects.loading import load_backend
from nsa_oracle.reference.multi_step import MultiStepBackend
from nsa_oracle.reference.types import ForwardMode
from tests.support.layer_cases import WITH_LAYER
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND, DRAFT_EXTEND_V2, EXTEND, VERIFY, case, factory_of

CPU = torch.device("cpu")
DECLARED = "tests.support.backends.declared"
ALL = case(
    *(Capture(mode=mode, buckets=(2,)) for mode in (DECODE, VERIFY, DRAFT_EXTEND)),
    Join(seq_len=3),
    Accept(accept_lengths=(1,)),
    *(Replay(mode=mode) for mode in (DECODE, VERIFY, DRAFT_EXTEND)),
    *(Eager(mode=mode) for mode in (DECODE, VERIFY, DRAFT_EXTEND, EXTEND)),
    num_steps=3,
)


def test_each_mode_is_served_by_the_instance_of_its_role() -> None:
    verdict = judge(ALL, load_backend(f"{DECLARED}:Roles"), CPU)
    assert (verdict.replays, verdict.eager_calls) == (6, 8)


def test_the_number_of_steps_is_as_declared() -> None:
    verdict = judge(ALL, load_backend(f"{DECLARED}:OneStepLess"), CPU)
    assert verdict.replays == 6
    less: Any = type("Less", (MultiStepBackend,), {"step_backends": "N-1"})
    with pytest.raises(OracleFailure, match="got 3 steps, expected 2 steps"):
        judge(ALL, load_less(less), CPU)


def load_less(build: Any) -> Any:
    from nsa_oracle.harness.subjects.declarations import read_declarations
    from nsa_oracle.harness.subjects.loading import LoadedBackend

    return LoadedBackend(build, "less", read_declarations(build))


def test_undeclared_steps_are_missed() -> None:
    build = type("Undeclared", (load_backend(f"{DECLARED}:OneStepLess").build,), {"step_backends": "N"})  # type: ignore[misc]
    with pytest.raises(OracleFailure, match="got 2 steps, expected 3 steps"):
        judge(ALL, factory_of(build), CPU)


def test_a_layer_runs_as_many_passes_as_there_are_steps(device: torch.device) -> None:
    scenario = WITH_LAYER.model_copy(update={"setup": WITH_LAYER.setup.model_copy(update={"num_steps": 3})})
    verdict = judge(scenario, load_backend(f"{DECLARED}:OneStepLess"), device)
    assert verdict.layers.stages


def observed(scenario: Scenario, spec: str) -> list[Observation]:
    engine = Engine(scenario, load_backend(spec), optimized_layer, CPU, Conditions(SENTINELS[0], 0xFF))
    return [seen for event in scenario.events for seen in engine.run(event) if isinstance(seen, Observation)]


def test_padding_is_as_declared() -> None:
    scenario = case(Capture(mode=DRAFT_EXTEND, buckets=(3,)), Join(seq_len=5), Replay(mode=DRAFT_EXTEND))
    (plain,) = observed(scenario, "tests.support.backends.clean:Clean")
    (full,) = observed(scenario, f"{DECLARED}:TailUndeclared")
    assert plain.batch.accept_lengths == (1, 1, 1)
    assert full.batch.accept_lengths == (1, 2, 2)


def loaded(mode: ForwardMode, accepts: tuple[int, ...] = (1, 2), new: tuple[int, ...] = ()) -> Any:
    static = StaticInputs(Inputs(), 3, SENTINELS[0], Delivery(CPU, late=False), num_draft_tokens=3)
    return static.load(Batch(mode, (0, 1), (5, 7), (5, 7), accepts, new))


HANDED_OVER = {
    VERIFY: ([3, 3], [5, 7], [5, 6, 7, 7, 8, 9]),
    DRAFT_EXTEND: ([1, 2], [4, 5], [4, 5, 6]),
    DRAFT_EXTEND_V2: ([3, 3], [2, 4], [2, 3, 4, 4, 5, 6]),
    EXTEND: ([2, 7], [3, 0], [3, 4, 0, 1, 2, 3, 4, 5, 6]),
}


@pytest.mark.parametrize(("mode", "expected"), HANDED_OVER.items())
def test_a_batch_has_what_an_engine_hands_over(mode: ForwardMode, expected: tuple[list[int], ...]) -> None:
    batch = loaded(mode, new=(2, 7) if mode is EXTEND else ())
    new, cached, positions = expected
    assert batch.extend_seq_lens.tolist() == list(batch.extend_seq_lens_cpu) == new
    assert batch.extend_prefix_lens.tolist() == list(batch.extend_prefix_lens_cpu) == cached
    assert batch.extend_num_tokens == sum(new)
    assert batch.positions.tolist() == positions
    if batch.spec_info is not None:
        assert batch.spec_info.num_accept_tokens is batch.spec_info.accept_length


def test_drafting_extends_nothing() -> None:
    batch = loaded(DECODE)
    assert (batch.extend_seq_lens, batch.extend_num_tokens) == (None, 2)
    assert batch.positions.tolist() == [5, 7]


def test_padding_shorter_than_its_rows_has_no_negative_number() -> None:
    static = StaticInputs(Inputs(), 3, SENTINELS[0], Delivery(CPU, late=False), num_draft_tokens=3)
    batch = static.load(Batch(DRAFT_EXTEND_V2, (0,), (1,), None, (3,)))
    assert batch.extend_prefix_lens is not None
    assert batch.positions is not None
    assert (batch.extend_prefix_lens.tolist(), batch.positions.tolist()) == ([0], [0, 0, 0])
