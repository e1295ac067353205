"""The input tensors of an engine: strides and dtypes that tell them apart, a pool beyond 32 bits, who watches them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.engine.inputs import StaticInputs
from nsa_oracle.harness.engine.observations import Conditions
from nsa_oracle.harness.engine.stress import Delivery
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.memory.poison import SENTINELS
from nsa_oracle.harness.protocol import MultiStepBackend
from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.scenario import Eager, Join, Scenario
from nsa_oracle.harness.scenarios.setup import Inputs, IntDtype, Setup
from nsa_oracle.harness.subjects.default import optimized_layer
from nsa_oracle.reference.multi_step import MultiStepBackend as Reference
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode
from tests.support.process_memory import resident

CPU = torch.device("cpu")
EXTEND = Batch(ForwardMode.EXTEND, (0, 1), (5, 7), (5, 7), (1, 1), extend_lens=(2, 7))
NAMES = ("seq_lens", "req_pool_indices", "extend_seq_lens", "extend_prefix_lens")
PLENTY = 1 << 28  # bytes


def loaded(inputs: Inputs) -> tuple[StaticInputs, dict[str, torch.Tensor]]:
    static = StaticInputs(inputs, 3, SENTINELS[0], Delivery(CPU, late=False))
    batch = static.load(EXTEND)
    return static, {name: getattr(batch, name) for name in NAMES}


def scenario(**setup: object) -> Scenario:
    sizes = {"page_size": 1, "max_context_len": 20, "index_topk": 4, "num_steps": 1, "num_draft_tokens": 1}
    return Scenario(
        setup=Setup(**{**sizes, "pool_size": 3, **setup}),
        events=(Join(seq_len=5), Join(seq_len=7), Join(seq_len=9), Eager(mode=ForwardMode.EXTEND, extend_lens=(2,))),
    )


def engine(case: Scenario) -> Engine:
    conditions = Conditions(SENTINELS[0], 0xFF)
    return Engine(case, lambda config, pool, _: Reference(config, pool), optimized_layer, CPU, conditions)


def pool_of(served: Engine) -> torch.Tensor:
    """``req_to_token`` as the backend was given it."""
    pool: torch.Tensor = served.instances.all[0].steps()[0].req_to_token  # type: ignore[attr-defined]
    return pool


@pytest.mark.parametrize("dtype", IntDtype)
@pytest.mark.parametrize("strided", [False, True])
def test_a_prefill_has_its_lengths_in_tensors_like_the_others(strided: bool, dtype: IntDtype) -> None:
    _, tensors = loaded(Inputs(accept_length=dtype, strided=strided))
    assert tensors["extend_seq_lens"].tolist() == [2, 7]
    assert tensors["extend_prefix_lens"].tolist() == [3, 0]
    assert tensors["extend_seq_lens"].dtype is tensors["extend_prefix_lens"].dtype
    assert str(tensors["extend_seq_lens"].dtype) == f"torch.{dtype.value}"
    assert {tensor.stride(0) == 1 for tensor in tensors.values()} == {not strided}


def test_strided_inputs_have_strides_of_their_own() -> None:
    static, tensors = loaded(Inputs(strided=True))
    strides = [tensor.stride(0) for tensor in (*tensors.values(), static.accept_length.write([1, 1]))]
    assert len(set(strides)) == len(strides)


@pytest.mark.parametrize("name", NAMES)
def test_every_input_is_watched(name: str) -> None:
    static, tensors = loaded(Inputs(strided=True))
    assert static.modified() is None
    tensors[name][1] += 1
    assert static.modified() == name


class ShortensInPlace(Reference):
    """Cuts the new lengths of a prefill to one, where the engine keeps them."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        assert forward_batch.extend_seq_lens is not None
        forward_batch.extend_seq_lens.clamp_(max=1)


def shortens_in_place(config: BackendConfig, pool: torch.Tensor, _: tuple[str, ...]) -> MultiStepBackend:
    return ShortensInPlace(config, pool)


def test_writing_to_the_new_lengths_is_reported() -> None:
    with pytest.raises(OracleFailure, match="input modified: extend_seq_lens"):
        judge(scenario(), shortens_in_place, CPU)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rows", [2, 3, 5])
def test_the_last_row_of_a_far_pool_needs_more_than_32_bits(rows: int, wide: bool) -> None:
    inputs = Inputs(far_req_to_token=True, wide_req_to_token=wide)
    pool = pool_of(engine(scenario(pool_size=rows, inputs=inputs)))
    assert pool.shape == (rows, 20)
    assert pool.stride(1) == 1
    assert 1 << 31 <= (rows - 1) * pool.stride(0) < (1 << 31) + 1000
    assert (rows == 2) == (pool.stride(0) >= 1 << 31), "with more rows it is the product that no longer fits"


def test_a_pool_of_one_row_is_not_far_from_anything() -> None:
    pool = pool_of(engine(scenario(pool_size=1, inputs=Inputs(far_req_to_token=True))))
    assert pool.stride() == (20, 1)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is reported by /proc")
def test_a_far_pool_holds_the_same_in_little_memory() -> None:
    near, far = (engine(scenario(inputs=Inputs(far_req_to_token=far))) for far in (False, True))
    before = resident()
    for event in scenario().events:
        for one in (near, far):
            list(one.run(event))
    assert torch.equal(pool_of(near).flip(0), pool_of(far))  # whose last rows are taken first
    assert far.modified_input() is None
    pool_of(far)[2, 19] += 1
    assert far.modified_input() == "req_to_token"
    assert resident() - before < PLENTY
