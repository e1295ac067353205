"""The model around the layer: what its caches must hold, which token each row is, and slots that lie far apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from planted_layers import Clean
from test_layer_detection import DECODE, DRAFT_EXTEND, DRAFT_EXTEND_V2, EXTEND, VERIFY, case

from nsa_oracle.harness.engine.cache_state import CacheState, query_rows
from nsa_oracle.harness.engine.caches import new_caches
from nsa_oracle.harness.engine.expected import _as_forward_batch, expected_metadata
from nsa_oracle.harness.engine.layer_driver import LayerDriver
from nsa_oracle.harness.engine.observations import LayerLoad, Modified, dense_copy
from nsa_oracle.harness.engine.passes import Pass
from nsa_oracle.harness.judge import sentinels
from nsa_oracle.harness.memory.bits import as_bytes, unwritten_memory
from nsa_oracle.harness.memory.far_apart import far_apart
from nsa_oracle.harness.memory.poison import POISON_BYTES
from nsa_oracle.harness.scenarios.regime import Regime
from nsa_oracle.harness.scenarios.scales import SMALL
from nsa_oracle.harness.scenarios.scenario import Accept, Eager, Event, Finish, Join, Layer, Remap, Replay, Scenario
from nsa_oracle.harness.scenarios.strategies import scenarios
from nsa_oracle.harness.scenarios.world import Batch, World
from nsa_oracle.reference import kv_cache
from nsa_oracle.reference.cycle import out_cache_loc, query_positions, request_of_row
from nsa_oracle.reference.types import (
    AttentionCaches,
    BackendConfig,
    ForwardMode,
    KVCacheDtype,
    Metadata,
    StepSemantics,
)

CPU = torch.device("cpu")
POISON = POISON_BYTES[0]
MANY = 100 << 20  # bytes


class Model:
    """World and caches of a scenario, event by event, as the engine has them."""

    def __init__(self, scenario: Scenario, poison: int = POISON) -> None:
        self.setup = scenario.setup
        self.config = scenario.setup.backend_config()
        self.world = World(scenario, sentinels(scenario.setup)[0])
        self.state = CacheState(scenario.setup, scenario.seed, poison, CPU)

    def run(self, *events: Event) -> list[Pass]:
        """The passes of the last call among ``events``; their keys are written."""
        passes: list[Pass] = []
        for event in events:
            batch = self.world.apply(event)
            if batch is not None:
                self.state.settle(self.world)
                passes = self.state.passes(self.world, batch, self.config)
                self.state.apply(passes)
        return passes

    def settle(self, *events: Event) -> None:
        self.run(*events)
        self.state.settle(self.world)

    def slots(self, request: int) -> list[int]:
        running = self.world.running[request]
        slots: list[int] = self.world.req_to_token[running.pool_row, : running.seq_len].tolist()
        return slots

    def version(self, slot: int) -> int | None:
        """Of the forward pass whose key lies in ``slot``, where keys tell; None where there is no key."""
        key = kv_cache.load_kv(self.state.config, self.state.truth.kv, torch.tensor([slot]))[0]
        origin = self.state.content.decode(key[: self.state.config.kv_lora_rank])
        assert origin is None or origin.slot == slot
        return None if origin is None else origin.version

    def is_poison(self, slot: int) -> bool:
        """Whether nothing but poison lies in ``slot``, in both caches."""
        config, size = self.state.config, self.setup.page_size
        page, offset = divmod(slot, size)
        index = self.state.truth.index_k[page]
        dim = config.index_head_dim
        parts = (
            as_bytes(self.state.truth.kv)[slot],
            index[offset * dim : (offset + 1) * dim],
            index[size * dim + 4 * offset : size * dim + 4 * offset + 4],
        )
        poisoned = {bool((part == self.state.poison).all()) for part in parts}
        assert len(poisoned) == 1, "either cache or none"
        return poisoned == {True}


@pytest.fixture(params=KVCacheDtype, ids=lambda dtype: dtype.value)
def model(request: pytest.FixtureRequest) -> Model:
    return Model(case(layer={"kv_cache_dtype": request.param}))


# What caches must hold


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
        assert all(model.is_poison(page * model.setup.page_size) for page in model.world.free_pages)
        model.state.apply(model.state.passes(model.world, batch, model.config))


# Rows of a pass


def calls(scenario: Scenario) -> Iterator[tuple[World, Batch]]:
    world = World(scenario, sentinels(scenario.setup)[0])
    for event in scenario.events:
        batch = world.apply(event)
        if isinstance(event, Replay | Eager) and batch is not None:
            yield world, batch


def described(config: BackendConfig, world: World, batch: Batch, step: int, metadata: Metadata) -> list[list[int]]:
    """Request, length, position and slot of each row that belongs to a request, by the reference."""
    forward_batch = _as_forward_batch(batch)
    table = torch.from_numpy(world.req_to_token)
    columns = (
        request_of_row(config, forward_batch, metadata),
        metadata.seqlens_expanded,
        query_positions(config, forward_batch, step, metadata),
        out_cache_loc(config, table, forward_batch, step, metadata),
    )
    return [row for row in torch.stack([column.long() for column in columns], dim=1).tolist() if row[0] >= 0]


def slot_of(world: World, batch: Batch, request: int, position: int) -> int:
    return int(world.req_to_token[batch.pool_rows[request], position]) if position >= 0 else 0


@settings(max_examples=80, deadline=None)
@given(scenarios(SMALL))
def test_rows_are_those_of_the_reference(scenario: Scenario) -> None:
    """In every mode and under both semantics, eagerly and padded to a bucket."""
    config, setup = scenario.setup.backend_config(), scenario.setup
    for world, batch in calls(scenario):
        graph = batch.mode is not EXTEND
        for shown, in_graph in (
            (batch, False),
            *([(batch.padded(batch.size + 2, setup.num_draft_tokens), True)] * graph),
        ):
            metadata = expected_metadata(config, world.req_to_token, shown, in_graph)
            for step in range(setup.num_steps):
                rows = [
                    [request, length, max(-1, position), slot_of(world, shown, request, position)]
                    for request, _, length, position in query_rows(shown, config, step)
                ]
                assert rows == described(config, world, shown, step, metadata[step])


def test_every_mode_and_both_semantics_are_met() -> None:
    """The rows of requests of 6 and 2 tokens, as numbers."""

    def rows(
        mode: ForwardMode, step: int = 0, semantics: StepSemantics = StepSemantics.SHARED
    ) -> list[tuple[int, ...]]:
        config = BackendConfig(4, 20, 8, 2, 3, semantics)
        batch = Batch(mode, (0, 1), (6, 2), None, (2, 0), (2, 1) if mode is EXTEND else ())
        return list(query_rows(batch, config, step))

    advancing = StepSemantics.ADVANCING
    # (request, draft token, length seen, position of the own key)
    assert rows(DECODE) == [(0, 0, 6, 6), (1, 0, 2, 2)]
    assert rows(DECODE, 1) == [(0, 0, 6, 7), (1, 0, 2, 3)]
    assert rows(DECODE, 1, advancing) == [(0, 0, 8, 7), (1, 0, 4, 3)]
    verified = [(0, 0, 7, 6), (0, 1, 8, 7), (0, 2, 9, 8), (1, 0, 3, 2), (1, 1, 4, 3), (1, 2, 5, 4)]
    assert rows(VERIFY) == rows(VERIFY, 1, advancing) == verified
    assert rows(DRAFT_EXTEND) == [(0, 0, 5, 4), (0, 1, 6, 5)]
    extended = [(0, 0, 4, 3), (0, 1, 5, 4), (0, 2, 6, 5), (1, 0, 0, -1), (1, 1, 1, 0), (1, 2, 2, 1)]
    assert rows(DRAFT_EXTEND_V2) == extended
    assert rows(EXTEND) == [(0, 0, 5, 4), (0, 1, 6, 5), (1, 0, 2, 1)]


def verify_pass() -> Pass:
    (a_pass,) = Model(case()).run(Join(seq_len=6), Join(seq_len=3), Join(seq_len=9), Eager(mode=VERIFY))
    return a_pass


def test_pass_of_some_requests() -> None:
    whole = verify_pass()
    part = whole.of_requests((2, 0))
    assert (part.requests, part.tokens) == ((0, 0, 1, 1), (0, 1, 0, 1))
    assert (part.seqlens, part.positions) == ((10, 11, 7, 8), (9, 10, 6, 7))
    for name, tensor in vars(part.inputs).items():
        assert torch.equal(as_bytes(tensor), as_bytes(getattr(whole.inputs, name)[[4, 5, 0, 1]])), name
    assert part.step == whole.step


def test_pass_of_all_requests_and_of_none() -> None:
    whole = verify_pass()
    again = whole.of_requests((0, 1, 2))
    assert (again.requests, again.seqlens, again.positions) == (whole.requests, whole.seqlens, whole.positions)
    assert whole.of_requests(()).rows == 0
    assert whole.of_requests(()).inputs.q.shape == (0, *whole.inputs.q.shape[1:])


def test_request_without_rows_is_left_out() -> None:
    (a_pass,) = Model(case()).run(
        Join(seq_len=6), Join(seq_len=3), Accept(accept_lengths=(0, 2)), Eager(mode=DRAFT_EXTEND)
    )
    assert a_pass.requests == (1, 1)
    assert a_pass.of_requests((0,)).rows == 0
    assert a_pass.of_requests((1, 0)).requests == (0, 0)


def test_query_does_not_depend_on_its_place() -> None:
    """What makes relations comparable: the same request, in another batch at the same moment, asks the same."""
    scenario = case(layer={"regime": Regime.RANDOM})
    joins = (Join(seq_len=6), Join(seq_len=3))
    (one,) = Model(scenario).run(*joins, Eager(mode=VERIFY))
    (other,) = Model(scenario).run(*joins, Eager(mode=VERIFY, order="reversed"))
    assert torch.equal(one.of_requests((1, 0)).inputs.q, other.inputs.q)
    assert torch.equal(one.of_requests((1, 0)).inputs.k, other.inputs.k)


# Caches whose slots lie far apart


def resident() -> int:
    """Bytes of memory that this process has really been given."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


tells_memory = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is told by /proc")


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


# Caches of the layer on the device


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
    driver.load(LayerLoad((a_pass,), model.state.truth))
    static = driver._static[0]
    for name, tensor in vars(static).items():
        assert torch.equal(as_bytes(tensor[: a_pass.rows]), as_bytes(getattr(a_pass.inputs, name))), name
        unused = tensor[a_pass.rows :].float()
        assert (unused == 0 if name == "out_cache_loc" else unused.isnan()).all(), name
    assert driver.modified_input() is None
    static.index_weights[5, 1] = 0
    assert driver.modified_input() == Modified(0, "index_weights")


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 32), (0, 2, 32), (1,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_unwritten_memory_of_strided_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Nothing in it or around it is a number that somebody could use, and vectors of 16 bytes stay aligned."""
    dense, apart = (unwritten_memory(shape, dtype, torch.device("cpu"), strided) for strided in (False, True))
    assert dense.is_contiguous()
    assert apart.shape == dense.shape == shape
    if len(shape) == 1:
        assert apart.stride() == (2,)
    else:
        assert apart.stride(-1) == 1
        assert apart.stride(-2) == shape[-1] + 16
    memory = torch.empty(0, dtype=torch.uint8).set_(apart.untyped_storage())
    assert memory.eq(0xFF).all()
