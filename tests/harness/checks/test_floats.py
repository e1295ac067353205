"""How a wrong number is named, how far it may be off, and what a layer may declare about that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nsa_oracle.harness.checks.bounds import attention_bound
from nsa_oracle.harness.checks.tally import LayerTally
from nsa_oracle.harness.engine.observations import LayerObservation, dense_copy
from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.protocol import Strictness
from nsa_oracle.harness.scenarios.setup import Regime
from nsa_oracle.reference import kv_cache
from tests.support.seen_layers import outputs, put, verified


def test_logit_is_reported_by_row_and_token() -> None:
    finding = verified().found(put("logits", (2, 3), 7.5))
    assert finding.sentence().startswith(
        "wrong value: logits at step 0, row 2 (request 1, draft token 0), token 3 (eager chain): got 7.5, expected "
    )
    assert (finding.differing, finding.compared) == (1, 4 * 13)
    assert [cell.place for cell in finding.neighbours] == [
        f"row 2 (request 1, draft token 0), token {token}" for token in range(7)
    ]
    assert [cell.got == cell.expected for cell in finding.neighbours] == [token != 3 for token in range(7)]


def test_logit_beyond_the_row_must_be_minus_infinity() -> None:
    finding = verified().found(put("logits", (2, 4), 0))
    assert (finding.got, finding.expected) == ("0", "-inf")


@pytest.mark.parametrize("regime", Regime)
def test_nan_is_never_right(regime: Regime) -> None:
    clean = verified(regime)
    for name, place in (("logits", (0, 0)), ("logits", (2, 12)), ("out", (0, 0, 0)), ("lse", (0, 0))):
        assert clean.found(put(name, place, torch.nan)).got.startswith("nan"), name


def test_zeros_of_either_sign_are_equal() -> None:
    clean = verified(Regime.EQUAL)

    def change(layer: LayerObservation) -> None:
        for name in ("logits", "out"):
            tensor = getattr(layer.steps[0].outputs, name)
            tensor[tensor == 0] = -0.0

    out = clean.layer.steps[0].outputs.out
    assert bool((out == 0).any()), "the case has a zero"
    assert clean.judged(change) is None


def test_output_is_reported_by_the_slot_whose_value_it_is() -> None:
    clean = verified()
    keys = kv_cache.load_kv(clean.layer_engine.cache_state.config, clean.layer.steps[0].caches.kv, torch.tensor([6]))
    out = clean.layer.steps[0].outputs.out
    right = clean.layer_engine.cache_state.content.decode(out[2, 1])
    assert right is not None
    finding = clean.found(outputs("out", lambda tensor: tensor[2, 1].copy_(keys[0, :64])))
    assert finding.place.startswith("row 2 (request 1, draft token 0), head 1, element ")
    assert finding.got.endswith(" (the value of slot 6 (running request 0, position 2))")
    assert f"(the value of slot {right.slot} (running request 1, position " in finding.expected

    mixed = clean.found(outputs("out", lambda tensor: tensor[2, 1].mul_(0.5).add_(0.5 * keys[0, :64])))
    assert mixed.got.endswith(" (no single key's value)")


def test_output_of_other_content_has_no_origin() -> None:
    assert "value of" not in verified(Regime.LATTICE).found(put("out", (0, 0, 0), 99)).sentence()


def test_lse_is_reported_by_head() -> None:
    finding = verified(Regime.LATTICE).found(put("lse", (1, 1), 9))
    assert (finding.kind, finding.field) == (Kind.BOUND, "lse")
    assert finding.place == "row 1 (request 0, draft token 1), head 1"


ONE_STEP = {"out": Strictness.ONE_STEP}


def nudged(steps: int, place: tuple[int, ...] = (0, 0, 0)) -> Callable[[LayerObservation], None]:
    """An output that many bf16 numbers further from zero."""

    def change(tensor: torch.Tensor) -> None:
        tensor.view(torch.int16)[place] += steps

    return outputs("out", change)


def test_one_step_of_bf16_is_forgiven_and_two_are_not() -> None:
    clean = verified(Regime.LATTICE)
    assert float(clean.layer.steps[0].outputs.out[0, 0, 0]) != 0
    for steps in (1, -1):
        assert clean.found(nudged(steps)).field == "out"
        tally = LayerTally()
        assert clean.judged(nudged(steps), weaker=ONE_STEP, tally=tally) is None
        assert (tally.stages["out"].exact, tally.stages["out"].weaker) == (0, 4 * 2 * 64)
    for steps in (2, -2):
        finding = clean.found(nudged(steps), weaker=ONE_STEP)
        assert (finding.kind, finding.field, finding.differing) == (Kind.VALUE, "out", 1)


def test_one_step_counts_across_zero() -> None:
    """From the least positive number to 0 is one step, and to the least negative one two."""
    clean = verified(Regime.EQUAL)
    zero = tuple(int(i) for i in (clean.layer.steps[0].outputs.out == 0).nonzero()[0])
    least = torch.tensor([1, -0x7FFF], dtype=torch.int16).view(torch.bfloat16)
    for number in least:
        assert clean.judged(put("out", zero, float(number)), weaker=ONE_STEP) is None
    beyond = torch.tensor([2, -0x7FFE], dtype=torch.int16).view(torch.bfloat16)
    for number in beyond:
        assert clean.found(put("out", zero, float(number)), weaker=ONE_STEP).field == "out"


def test_one_step_does_not_forgive_what_is_no_number() -> None:
    for wrong in (torch.nan, torch.inf, -torch.inf):
        assert verified(Regime.LATTICE).found(put("out", (0, 0, 0), wrong), weaker=ONE_STEP).field == "out"


def test_one_step_of_ordinary_numbers_is_judged_by_their_bound() -> None:
    tally = LayerTally()
    assert verified(Regime.RANDOM).judged(weaker=ONE_STEP, tally=tally) is None
    assert (tally.stages["out"].bounded, tally.stages["out"].weaker) == (4 * 2 * 64, 0)


BOUND = dict.fromkeys(("logits", "out", "lse"), Strictness.BOUND)


def test_bound_is_that_of_ordinary_numbers_and_is_counted_apart() -> None:
    clean = verified(Regime.LATTICE)
    for name in BOUND:
        tally = LayerTally()
        assert clean.judged(weaker={name: Strictness.BOUND}, tally=tally) is None
        stage = tally.stages[name]
        assert (stage.exact, stage.bounded, stage.declared) == (0, 0, "within the error bound")
        assert stage.weaker == getattr(clean.layer.steps[0].outputs, name).numel()
        others = (tally.stages[other] for other in BOUND if other != name)
        assert all(other.weaker == 0 and not other.declared for other in others)


@pytest.mark.parametrize("name", BOUND)
def test_bound_forgives_what_its_numbers_allow_and_no_more(name: str) -> None:
    clean = verified(Regime.LATTICE)
    numbers = getattr(clean.layer.steps[0].outputs, name)[0].float().nan_to_num(neginf=0)
    place = (0, *(int(i) for i in torch.unravel_index(numbers.abs().argmax(), numbers.shape)))
    number = float(numbers[place[1:]])

    def off(fraction: float) -> Callable[[LayerObservation], None]:
        return put(name, place, number * (1 + fraction))

    least = 2.0**-8 if name == "out" else 2.0**-22
    assert clean.judged(off(least), weaker=BOUND) is None
    if name != "lse":
        assert clean.found(off(least)).field == name
    finding = clean.found(off(0.5), weaker=BOUND)
    assert (finding.kind, finding.field) == (Kind.BOUND, name)


def test_worst_fraction_of_the_bound_is_kept() -> None:
    clean = verified(Regime.RANDOM)
    tally = LayerTally()
    assert clean.judged(tally=tally) is None
    before = tally.stages["out"].worst
    assert 0 < before < 0.6, "half of the bound at most is the rounding to bf16"
    assert tally.stages["logits"].worst < 0.1

    logits = clean.layer.steps[0].outputs.logits
    assert clean.judged(outputs("logits", lambda tensor: tensor.mul_(1 + 2**-22)), tally=tally) is None
    assert tally.stages["logits"].worst > 0
    finding = clean.found(outputs("logits", lambda tensor: tensor.mul_(1 + 2**-10)), tally=tally)
    assert (finding.kind, finding.field) == (Kind.BOUND, "logits")
    assert tally.stages["logits"].worst <= 1, "what is beyond the bound is a failure, and no fraction of it"
    assert bool((logits[:, 0] != 0).any())


def test_output_may_use_its_bound_and_no_more() -> None:
    clean = verified(Regime.RANDOM)
    expected = clean.layer_engine.expected
    rows = expected.rows(clean.layer.load.passes[0], clean.metadata[0], dense_copy(clean.layer.load.caches))
    indices = clean.layer.steps[0].outputs.indices
    keys = [kv_cache.load_kv(clean.layer_engine.cache_state.config, rows.caches.kv, row[row >= 0]) for row in indices]
    bound, _ = attention_bound(clean.layer_engine.cache_state.config, rows.inputs.q, keys)
    exact, _ = expected.attention(rows, indices)

    def off(fraction: float) -> Callable[[LayerObservation], None]:
        return outputs("out", lambda tensor: tensor.copy_(exact.double() + fraction * bound))

    tally = LayerTally()
    assert clean.judged(off(0.4), tally=tally) is None
    assert 0.3 < tally.stages["out"].worst <= 1
    finding = clean.found(off(2))
    assert (finding.kind, finding.field) == (Kind.BOUND, "out")
    assert finding.sentence().startswith("beyond the error bound: out at step 0, row 0 (request 0, draft token 0), ")
