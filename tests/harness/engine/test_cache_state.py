"""What the caches of a layer must hold, after each event of a scenario."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from nsa_oracle.harness.engine.observations import LayerLoad, dense_copy
from nsa_oracle.harness.memory.bits import as_bytes
from nsa_oracle.harness.scenarios.scales import SMALL
from nsa_oracle.harness.scenarios.scenario import Accept, Eager, Finish, Join, Remap, Scenario
from nsa_oracle.harness.scenarios.setup import Layer, Regime
from nsa_oracle.harness.scenarios.strategies import scenarios
from nsa_oracle.reference.types import KVCacheDtype
from tests.support.layer_cases import case
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND_V2, VERIFY
from tests.support.model import Model


@pytest.fixture(params=KVCacheDtype, ids=lambda dtype: dtype.value)
def model(request: pytest.FixtureRequest) -> Model:
    return Model(case(layer={"kv_cache_dtype": request.param}))


def test_everything_is_poison_at_first(model: Model) -> None:
    assert all(model.is_poison(slot) for slot in range(model.setup.num_pages * model.setup.page_size))


def test_cached_tokens_of_a_request_that_joins_have_keys_and_nothing_else_has(model: Model) -> None:
    model.settle(Join(seq_len=6), Join(seq_len=3))
    held = {*model.slots(0), *model.slots(1)}
    assert len(held) == 9
    for slot in range(model.setup.num_pages * model.setup.page_size):
        assert model.is_poison(slot) != (slot in held)
        assert model.version(slot) == (0 if slot in held else None)


def test_pages_of_a_request_that_ends_are_poison_again(model: Model) -> None:
    model.settle(Join(seq_len=6), Join(seq_len=3))
    freed, kept = model.slots(0), model.slots(1)
    model.settle(Finish(request=0))
    assert all(model.is_poison(slot) for slot in freed)
    assert not any(model.is_poison(slot) for slot in kept)


def test_recycled_page_has_the_keys_of_its_new_request_alone(model: Model) -> None:
    model.settle(Join(seq_len=6))
    before = model.slots(0)
    model.settle(Finish(request=0))
    model.settle(Join(seq_len=2))
    after = model.slots(0)
    assert after == before[:2]
    assert all(model.is_poison(slot) != (slot in after) for slot in before)


def test_page_that_is_taken_at_once_keeps_what_was_drafted_there(model: Model) -> None:
    """Nobody clears a page between two requests: behind the new one's tokens lies a key, and no NaN gives it away."""
    model.run(Join(seq_len=6), Eager(mode=VERIFY))
    model.settle(Finish(request=0), Join(seq_len=6))
    row = model.world.running[0].pool_row
    assert [model.version(slot) for slot in model.world.req_to_token[row, :8].tolist()] == [0] * 6 + [1, 1]


def test_shared_prefix_survives_the_request_that_wrote_it(model: Model) -> None:
    model.settle(Join(seq_len=9), Join(seq_len=9, prefix_of=0, prefix_pages=1))
    shared = model.slots(1)[:4]
    assert shared == model.slots(0)[:4]
    own = model.slots(0)[4:]
    model.settle(Finish(request=0))
    assert not any(model.is_poison(slot) for slot in shared)
    assert all(model.is_poison(slot) for slot in own)


def test_remapped_request_has_keys_everywhere(model: Model) -> None:
    model.settle(Join(seq_len=9), Join(seq_len=9))
    before = model.slots(1)
    model.settle(Remap(request=1, prefix_of=0, prefix_pages=2))
    assert model.slots(1)[:8] == model.slots(0)[:8]
    assert not any(model.is_poison(slot) for slot in model.slots(1))
    assert all(model.is_poison(slot) for slot in before if slot not in model.slots(1))


def test_passes_write_their_keys_and_no_others(model: Model) -> None:
    (verify,) = model.run(Join(seq_len=6), Eager(mode=VERIFY))
    written = verify.inputs.out_cache_loc.tolist()
    row = model.world.running[0].pool_row
    assert written == model.world.req_to_token[row, 6:8].tolist()
    assert [model.version(slot) for slot in written] == [1, 1]
    assert [model.version(slot) for slot in model.slots(0)] == [0] * 6


def test_accepted_drafts_keep_the_key_of_the_pass_that_wrote_them(model: Model) -> None:
    """And an accepted token that no pass has written gets one as if from prefill."""
    model.run(Join(seq_len=6), Eager(mode=DECODE))
    model.settle(Accept(accept_lengths=(2,)))
    assert [model.version(slot) for slot in model.slots(0)] == [0] * 6 + [1, 0]


@pytest.mark.parametrize("dtype", KVCacheDtype)
def test_versions_are_distinct(dtype: KVCacheDtype) -> None:
    """Each pass has keys of its own, so that one left over from any other is seen."""
    model = Model(case(layer={"kv_cache_dtype": dtype}, num_steps=3))
    seen = []
    for _ in range(3):
        for a_pass in model.run(*([] if model.world.running else [Join(seq_len=6)]), Eager(mode=DECODE)):
            rank = model.state.config.kv_lora_rank
            origin = model.state.content.decode(a_pass.inputs.k[0, :rank])
            assert origin is not None
            assert origin.slot == a_pass.inputs.out_cache_loc[0]
            seen.append(origin.version)
    assert len(seen) == len(set(seen)) == 9
    assert 0 not in seen


def test_dummy_page_is_never_kept(model: Model) -> None:
    """Rows without a token write there; the next call finds poison again."""
    (a_pass,) = model.run(Join(seq_len=1), Eager(mode=DRAFT_EXTEND_V2))
    assert a_pass.inputs.out_cache_loc.tolist()[0] == 0
    assert not model.is_poison(0)
    model.state.settle(model.world)
    assert all(model.is_poison(slot) for slot in range(model.setup.page_size))


def test_load_is_not_touched_by_what_comes_after(model: Model) -> None:
    model.settle(Join(seq_len=6))
    before = dense_copy(model.state.truth)
    load = LayerLoad((), before)
    model.run(Eager(mode=VERIFY))
    assert torch.equal(as_bytes(load.caches.kv), as_bytes(before.kv))
    assert not torch.equal(as_bytes(model.state.truth.kv), as_bytes(before.kv))


@settings(max_examples=15, deadline=None)
@given(scenarios(SMALL))
def test_visible_tokens_have_keys_after_any_history(scenario: Scenario) -> None:
    """Whatever a pass can see is a key of its request's slot; free pages are poison. Both kinds of poison mean that."""
    if scenario.setup.page_size & (scenario.setup.page_size - 1) or scenario.setup.max_context_len > 300:
        return
    small = scenario.setup.model_copy(update={"layer": Layer(num_heads=1, regime=Regime.EQUAL)})
    model = Model(scenario.model_copy(update={"setup": small}))
    for event in scenario.events:
        batch = model.world.apply(event)
        if batch is None:
            continue
        model.state.settle(model.world)
        for request in range(len(model.world.running)):
            assert not any(model.is_poison(slot) for slot in model.slots(request))
        assert all(model.is_poison(page * model.setup.page_size) for page in model.world.pages.free)
        model.state.apply(model.state.passes(model.world, batch, model.config))
