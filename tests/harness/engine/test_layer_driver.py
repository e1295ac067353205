"""The caches and the static inputs of the layer on the device, slots far apart included."""

from __future__ import annotations

import pytest
import torch

from nsa_oracle.harness.engine.allocation import new_caches
from nsa_oracle.harness.engine.layer_driver import LayerDriver
from nsa_oracle.harness.engine.observations import LayerLoad, Modified
from nsa_oracle.harness.judge import sentinels
from nsa_oracle.harness.memory.bits import as_bytes
from nsa_oracle.harness.memory.far_apart import far_apart
from nsa_oracle.harness.memory.poison import POISON_BYTES
from nsa_oracle.harness.scenarios.scenario import Eager, Join
from nsa_oracle.reference.types import AttentionCaches, AttentionInputs, KVCacheDtype
from tests.support.layer_cases import case
from tests.support.layers.clean import Clean
from tests.support.metadata_cases import VERIFY
from tests.support.model import Model
from tests.support.process_memory import resident, tells_memory

CPU = torch.device("cpu")
POISON = POISON_BYTES[0]
MANY = 100 << 20  # bytes


@tells_memory
@pytest.mark.parametrize("dtype", KVCacheDtype)
def test_far_slots_hold_the_same_in_little_memory(dtype: KVCacheDtype) -> None:
    scenario = case(layer={"kv_cache_dtype": dtype}, max_context_len=67, page_size=16, pool_size=5)
    setup = scenario.setup
    assert setup.layer is not None
    dense = new_caches(setup, setup.layer.attention_config(), setup.num_pages, CPU, POISON)
    as_bytes(dense.kv).copy_(torch.arange(as_bytes(dense.kv).numel()).view(as_bytes(dense.kv).shape) % 251)
    before = resident()
    far = AttentionCaches(far_apart(dense.kv), far_apart(dense.index_k))
    for name in ("kv", "index_k"):
        one, other = getattr(dense, name), getattr(far, name)
        assert other.shape == one.shape
        assert other.dtype is one.dtype
        assert torch.equal(as_bytes(other.contiguous()), as_bytes(one))
        assert other.stride(0) > 1 << 31, f"{name}: an offset in elements fits 32 bits in another row than the first"
        assert 2 * other.stride(0) > 1 << 32, f"{name}: without a sign it fits in more than two"
        assert other.stride(0) % 8 == 0
        assert other.stride()[1:] == one.stride()[1:], "what is within a row stays dense"
    assert resident() - before < MANY


@tells_memory
def test_far_slots_can_be_cloned_and_written_in_little_memory() -> None:
    """As the judge does: load, store, copy out."""
    setup = case(layer={"far_slots": True}).setup
    assert setup.layer is not None
    before = resident()
    driver = LayerDriver(setup, Clean(setup.backend_config(), setup.layer.attention_config()), CPU, POISON, 4, 1)
    dense = new_caches(setup, driver.config, setup.num_pages, CPU, 7)
    driver.load_caches(dense)
    assert torch.equal(driver.cached().kv, dense.kv)
    assert torch.equal(driver.cached().index_k, dense.index_k)
    assert resident() - before < MANY


def test_every_used_page_is_far() -> None:
    """Of either cache, although one has a page for each slot of the other."""
    setup = case(layer={"far_slots": True}, page_size=16, max_context_len=130, pool_size=5).setup
    driver = LayerDriver(setup, Clean(setup.backend_config(), setup.layer.attention_config()), CPU, POISON, 4, 1)
    for cache, first in ((driver.caches.kv, 16), (driver.caches.index_k, 1)):
        assert first * cache.stride(0) > 1 << 31
        assert (first + 2) * cache.stride(0) > 1 << 32


@pytest.mark.parametrize("far", [False, True], ids=["dense", "far"])
@pytest.mark.parametrize("dtype", KVCacheDtype)
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_every_poison_slot_exists_also_as_a_page(page_size: int, dtype: KVCacheDtype, far: bool) -> None:
    """What reads a dead cell of a table, as a slot or by mistake as a page, finds poison and nothing worse."""
    setup = case(layer={"kv_cache_dtype": dtype, "far_slots": far}, page_size=page_size).setup
    assert setup.layer is not None
    layer = Clean(setup.backend_config(), setup.layer.attention_config())
    driver = LayerDriver(setup, layer, CPU, POISON, max_rows=2, num_steps=1)
    other = new_caches(setup, driver.config, setup.num_pages, CPU, POISON)
    held = setup.pool_size * setup.pages_per_request * page_size + page_size  # first slot behind the requests' own
    as_bytes(other.kv)[:held] = 1
    other.index_k[: held // page_size] = 1
    driver.load_caches(other)
    for sentinel in sentinels(setup):
        assert held <= sentinel < len(driver.caches.kv)
        assert (as_bytes(driver.caches.kv[sentinel]) == POISON).all()
        for page in (sentinel, sentinel // page_size):
            assert (driver.caches.index_k[page] == POISON).all()
    assert len(set(sentinels(setup))) == 2
    assert sentinels(setup)[0] // page_size != sentinels(setup)[1] // page_size


def test_padding_of_static_inputs_is_not_a_number() -> None:
    scenario = case()
    model = Model(scenario)
    (a_pass,) = model.run(Join(seq_len=6), Eager(mode=VERIFY))
    layer = Clean(model.config, model.state.config)
    driver = LayerDriver(scenario.setup, layer, CPU, POISON, max_rows=6, num_steps=1)
    driver.load(LayerLoad((a_pass,), model.state.truth), 4)
    static = driver._static[0]
    for name, tensor in vars(static).items():
        assert torch.equal(as_bytes(tensor[: a_pass.rows]), as_bytes(getattr(a_pass.inputs, name))), name
        unused = tensor[a_pass.rows :].float()
        assert (unused == 0 if name == "out_cache_loc" else unused.isnan()).all(), name
    assert driver.modified_input() is None
    static.index_weights[5, 1] = 0
    assert driver.modified_input() == Modified(0, "index_weights")


def test_slots_of_all_steps_lie_behind_each_other_and_are_watched() -> None:
    scenario = case(layer={"slots_by_step": True, "extra_rows": 1}, num_steps=2)
    model = Model(scenario)
    (a_pass,) = model.run(Join(seq_len=6), Eager(mode=VERIFY))[:1]
    seen: list[torch.Tensor] = []

    class Remembers(Clean):
        def store_cache(self, caches: AttentionCaches, inputs: AttentionInputs) -> None:
            seen.append(inputs.out_cache_loc)

    driver = LayerDriver(scenario.setup, Remembers(model.config, model.state.config), CPU, POISON, 6, 2)
    driver.reserve()
    driver.load(LayerLoad((a_pass, a_pass), model.state.truth), 4)
    rows = 4 + 1
    for step in (0, 1):
        driver.layer.store_cache(driver.caches, driver.graph_inputs(step, 4))
    assert seen[1].data_ptr() - seen[0].data_ptr() == 8 * rows
    assert seen[1].data_ptr() % 16 == 8, "those of a step begin anywhere"
    for slots in seen:
        assert slots.tolist() == [*a_pass.inputs.out_cache_loc.tolist(), *[0] * (rows - a_pass.rows)]
    assert driver.modified_input() is None
    seen[1][0] = 7
    assert driver.modified_input() == Modified(None, "out_cache_loc")
