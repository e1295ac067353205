"""The reference backend as an engine drives it: eager calls, captures, replays, in any order."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.multi_step import MultiStepBackend, SingleStepBackend, copy_into
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata, SpecInfo, StepSemantics

WIDTH = 37
POOL_SIZE = 6
GRAPH_MODES = [mode for mode in ForwardMode if mode is not ForwardMode.EXTEND]
SEMANTICS = pytest.mark.parametrize("semantics", list(StepSemantics), ids=lambda value: f"semantics={value.value}")


def make_config(semantics: StepSemantics = StepSemantics.ADVANCING, num_steps: int = 3) -> BackendConfig:
    return BackendConfig(
        page_size=16,
        max_context_len=WIDTH,
        index_topk=8,
        speculative_num_steps=num_steps,
        speculative_num_draft_tokens=3,
        step_semantics=semantics,
        paged_mqa_num_sms=4,
        flashmla_num_sm_parts=3,
    )


def make_pool(seed: int = 0) -> torch.Tensor:
    """Page-aligned slots of POOL_SIZE requests, 3 pages of 16 each, one row a request. [POOL_SIZE, 48]"""
    rng = random.Random(seed)
    pages = rng.sample(range(3 * POOL_SIZE + 1), 3 * POOL_SIZE)
    slots = [page * 16 + offset for page in pages for offset in range(16)]
    return torch.tensor(slots, dtype=torch.int32).view(POOL_SIZE, 48)


def make_batch(mode: ForwardMode, bs: int, seed: int, spare: int = 0) -> ForwardBatch:
    """Random requests. ``spare`` elements behind them belong to the engine's own, longer buffers."""
    rng = random.Random(seed)
    junk = [-777] * spare
    accept = [rng.randint(0, 3) for _ in range(bs)]
    return ForwardBatch(
        mode,
        bs,
        torch.tensor([rng.randrange(POOL_SIZE) for _ in range(bs)] + junk, dtype=torch.int64),
        torch.tensor([rng.choice([1, rng.randint(1, WIDTH - 4)]) for _ in range(bs)] + junk, dtype=torch.int64),
        seq_lens_cpu=torch.full((bs,), 1) if rng.random() < 0.5 else None,  # lags behind, or absent
        seq_lens_sum=bs,
        out_cache_loc=torch.zeros(bs, dtype=torch.int64),
        spec_info=SpecInfo(torch.tensor(accept + junk, dtype=torch.int32)),
    )


def make_extend_batch(seed: int) -> ForwardBatch:
    rng = random.Random(seed)
    seq_lens = [rng.randint(1, WIDTH) for _ in range(2)]
    extend = torch.tensor([rng.randint(1, n) for n in seq_lens])
    lengths = torch.tensor(seq_lens)
    return ForwardBatch(
        ForwardMode.EXTEND,
        2,
        torch.tensor([1, 2]),
        lengths,
        extend_seq_lens=extend,
        extend_prefix_lens=lengths - extend,
    )


def exactly(batch: ForwardBatch) -> ForwardBatch:
    """The batch without the spare elements."""
    bs = batch.batch_size
    assert batch.spec_info is not None
    return dataclasses.replace(
        batch,
        req_pool_indices=batch.req_pool_indices[:bs].clone(),
        seq_lens=batch.seq_lens[:bs].clone(),
        spec_info=SpecInfo(batch.spec_info.accept_length[:bs].clone()),
    )


def tensors(metadata: Metadata) -> dict[str, torch.Tensor]:
    named = {field.name: getattr(metadata, field.name) for field in dataclasses.fields(Metadata)}
    found = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    for name, value in named.items():
        if isinstance(value, tuple):
            found |= {f"{name}[{index}]": part for index, part in enumerate(value)}
    return found


def addresses(metadata: Metadata) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors(metadata).items()}


def assert_same(got: Metadata, expected: Metadata) -> None:
    got_tensors, expected_tensors = tensors(got), tensors(expected)
    assert got_tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        assert got_tensors[name].dtype == tensor.dtype, name
        assert torch.equal(got_tensors[name], tensor), f"{name}: {got_tensors[name]} is not {tensor}"
    for name in ("page_size", "max_seq_len_q", "max_seq_len_k"):
        assert getattr(got, name) == getattr(expected, name), name


def capture(backend: SingleStepBackend, batch: ForwardBatch) -> None:
    rows = batch.batch_size * backend.config.rows_per_request(batch.forward_mode)
    backend.init_forward_metadata_capture_cuda_graph(
        batch.batch_size, rows, batch.req_pool_indices, batch.seq_lens, None, batch.forward_mode, batch.spec_info
    )


def replay(backend: SingleStepBackend, batch: ForwardBatch) -> None:
    backend.init_forward_metadata_replay_cuda_graph(
        batch.batch_size,
        batch.req_pool_indices,
        batch.seq_lens,
        batch.seq_lens_sum,
        batch.encoder_lens,
        batch.forward_mode,
        batch.spec_info,
        batch.seq_lens_cpu,
        batch.out_cache_loc,
    )


@SEMANTICS
@pytest.mark.parametrize("mode", GRAPH_MODES, ids=lambda mode: f"mode={mode.name}")
@pytest.mark.parametrize("step", [0, 2], ids=["step=0", "step=2"])
def test_single_step_capture_then_replay(mode: ForwardMode, step: int, semantics: StepSemantics) -> None:
    """A replay refreshes the captured buffers in place, with the values of its own step."""
    config, pool = make_config(semantics), make_pool()
    backend = SingleStepBackend(config, pool, step)
    backend.init_cuda_graph_state(max_bs=4, max_num_tokens=12)
    capture(backend, make_batch(mode, 4, seed=1))
    captured = backend.forward_metadata
    before = addresses(captured)
    assert_same(captured, compute_metadata(config, pool, make_batch(mode, 4, seed=1), step, in_graph=True))
    batch = make_batch(mode, 4, seed=2)
    replay(backend, batch)
    assert backend.forward_metadata is captured
    assert addresses(backend.forward_metadata) == before
    assert_same(backend.forward_metadata, compute_metadata(config, pool, batch, step, in_graph=True))


@SEMANTICS
@pytest.mark.parametrize("mode", GRAPH_MODES, ids=lambda mode: f"mode={mode.name}")
def test_multi_step_capture_then_replay(mode: ForwardMode, semantics: StepSemantics) -> None:
    """Step i of the multi-step backend holds the metadata of step i, in buffers of its own."""
    config, pool = make_config(semantics), make_pool()
    backend = MultiStepBackend(config, pool)
    assert [single.speculative_step_id for single in backend.attn_backends] == [0, 1, 2]
    backend.init_cuda_graph_state(max_bs=4, max_num_tokens=12)
    backend.init_forward_metadata_capture_cuda_graph(make_batch(mode, 4, seed=1))
    before = [addresses(single.forward_metadata) for single in backend.attn_backends]
    distinct = {address for step in before for address in step.values()}
    assert len(distinct) == sum(len(step) for step in before)
    batch = make_batch(mode, 4, seed=2)
    backend.init_forward_metadata_replay_cuda_graph(batch, 4)
    assert [addresses(single.forward_metadata) for single in backend.attn_backends] == before
    for step, single in enumerate(backend.attn_backends):
        assert_same(single.forward_metadata, compute_metadata(config, pool, batch, step, in_graph=True))


def test_step_semantics_reach_the_buffers() -> None:
    """SHARED: the same lengths in every step. ADVANCING: one, two, three tokens more than seq_lens."""
    pool = make_pool()
    seq_lens, rows = torch.tensor([5, 9]), torch.tensor([1, 2])
    batch = ForwardBatch(ForwardMode.DECODE, 2, rows, seq_lens)
    expected = {
        StepSemantics.SHARED: [[5, 9], [5, 9], [5, 9]],
        StepSemantics.ADVANCING: [[6, 10], [7, 11], [8, 12]],
    }
    for semantics, lengths in expected.items():
        backend = MultiStepBackend(make_config(semantics), pool)
        backend.init_forward_metadata_capture_cuda_graph(batch)
        backend.init_forward_metadata_replay_cuda_graph(batch, 2)
        got = [single.forward_metadata.cache_seqlens_int32.tolist() for single in backend.attn_backends]
        assert got == lengths
        backend.init_forward_metadata(batch)
        got = [single.forward_metadata.cache_seqlens_int32.tolist() for single in backend.attn_backends]
        assert got == lengths


def test_idle_replays_the_decode_capture() -> None:
    config, pool = make_config(), make_pool()
    backend = SingleStepBackend(config, pool, 1)
    capture(backend, make_batch(ForwardMode.DECODE, 2, seed=1))
    captured = backend.forward_metadata
    idle = ForwardBatch(ForwardMode.IDLE, 2, torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
    replay(backend, idle)
    assert backend.forward_metadata is captured
    assert captured.seqlens_expanded.tolist() == [3, 3]  # 1 + step 1 + 1
    assert_same(captured, compute_metadata(config, pool, idle, 1, in_graph=True))


def test_decode_replays_the_idle_capture() -> None:
    backend = MultiStepBackend(make_config(), make_pool())
    backend.init_forward_metadata_capture_cuda_graph(make_batch(ForwardMode.IDLE, 2, seed=1))
    before = [addresses(single.forward_metadata) for single in backend.attn_backends]
    backend.init_forward_metadata_replay_cuda_graph(make_batch(ForwardMode.DECODE, 2, seed=2), 2)
    assert [addresses(single.forward_metadata) for single in backend.attn_backends] == before


@pytest.mark.parametrize("mode", GRAPH_MODES, ids=lambda mode: f"mode={mode.name}")
def test_buckets_and_modes_have_graphs_of_their_own(mode: ForwardMode) -> None:
    """Replaying one bucket leaves the buffers of the others as they were."""
    backend = SingleStepBackend(make_config(), make_pool())
    others: list[tuple[Metadata, dict[str, torch.Tensor]]] = []
    for other in (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND, ForwardMode.DRAFT_EXTEND_V2):
        for bs in (1, 4):
            capture(backend, make_batch(other, bs, seed=bs))
            held = backend.forward_metadata
            others.append((held, {name: tensor.clone() for name, tensor in tensors(held).items()}))
    replay(backend, make_batch(mode, 4, seed=9))
    untouched = 0
    for metadata, before in others:
        if metadata is not backend.forward_metadata:
            untouched += 1
            after = tensors(metadata)
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert untouched == len(others) - 1


@pytest.mark.parametrize("mode", GRAPH_MODES, ids=lambda mode: f"mode={mode.name}")
def test_replay_without_capture_is_refused(mode: ForwardMode) -> None:
    backend = SingleStepBackend(make_config(), make_pool())
    capture(backend, make_batch(mode, 2, seed=1))
    with pytest.raises(KeyError):
        replay(backend, make_batch(mode, 3, seed=1))
    backend.init_cuda_graph_state(max_bs=4, max_num_tokens=12)
    with pytest.raises(KeyError):
        replay(backend, make_batch(mode, 2, seed=1))


def test_multi_step_init_cuda_graph_state_forgets_the_captures_of_every_step() -> None:
    backend = MultiStepBackend(make_config(), make_pool())
    batch = make_batch(ForwardMode.DECODE, 2, seed=1)
    backend.init_forward_metadata_capture_cuda_graph(batch)
    backend.init_cuda_graph_state(max_bs=4, max_num_tokens=12)
    for single in backend.attn_backends:
        with pytest.raises(KeyError):
            replay(single, batch)


@pytest.mark.parametrize("mode", list(ForwardMode), ids=lambda mode: f"mode={mode.name}")
def test_eager_metadata(mode: ForwardMode) -> None:
    """Eager calls lay out exactly the live rows, step by step, and leave captured buffers alone."""
    config, pool = make_config(), make_pool()
    backend = MultiStepBackend(config, pool)
    backend.init_forward_metadata_capture_cuda_graph(make_batch(ForwardMode.DECODE, 3, seed=1))
    captured = [single.forward_metadata for single in backend.attn_backends]
    before = [{name: tensor.clone() for name, tensor in tensors(metadata).items()} for metadata in captured]
    batch = make_extend_batch(seed=3) if mode is ForwardMode.EXTEND else make_batch(mode, 3, seed=3)
    backend.init_forward_metadata(batch)
    for step, single in enumerate(backend.attn_backends):
        assert_same(single.forward_metadata, compute_metadata(config, pool, batch, step, in_graph=False))
        after = tensors(captured[step])
        assert all(torch.equal(after[name], tensor) for name, tensor in before[step].items())


@pytest.mark.parametrize("mode", GRAPH_MODES, ids=lambda mode: f"mode={mode.name}")
def test_inputs_longer_than_the_bucket(mode: ForwardMode) -> None:
    """The engine hands over its own buffers of the largest bucket; only the first bs elements count."""
    config, pool = make_config(), make_pool()
    backend = SingleStepBackend(config, pool)
    capture(backend, make_batch(mode, 2, seed=1, spare=3))
    batch = make_batch(mode, 2, seed=2, spare=3)
    replay(backend, batch)
    assert_same(backend.forward_metadata, compute_metadata(config, pool, exactly(batch), 0, in_graph=True))


def test_multi_step_replay_takes_the_bucket_from_its_argument() -> None:
    """``bs`` is the padded size; batch_size of the batch is the raw one, and its tensors are already padded."""
    config, pool = make_config(), make_pool()
    backend = MultiStepBackend(config, pool)
    backend.init_forward_metadata_capture_cuda_graph(make_batch(ForwardMode.DECODE, 4, seed=1))
    padded = make_batch(ForwardMode.DECODE, 4, seed=2)
    backend.init_forward_metadata_replay_cuda_graph(dataclasses.replace(padded, batch_size=1), 4)
    for step, single in enumerate(backend.attn_backends):
        assert_same(single.forward_metadata, compute_metadata(config, pool, padded, step, in_graph=True))


def test_copy_into_keeps_addresses() -> None:
    config, pool = make_config(), make_pool()
    buffers = compute_metadata(config, pool, make_batch(ForwardMode.TARGET_VERIFY, 2, seed=1), 0, in_graph=True)
    values = compute_metadata(config, pool, make_batch(ForwardMode.TARGET_VERIFY, 2, seed=2), 0, in_graph=True)
    before = addresses(buffers)
    copy_into(buffers, values)
    assert addresses(buffers) == before
    assert_same(buffers, values)


@dataclass(frozen=True)
class Event:
    """One thing the engine does. A bucket that was not captured yet is captured instead of replayed."""

    kind: str  # "capture", "replay", "eager", "remap"
    mode: ForwardMode
    bs: int
    seed: int


events = st.builds(
    Event,
    st.sampled_from(["replay", "replay", "replay", "capture", "eager", "remap"]),
    st.sampled_from(GRAPH_MODES),
    st.sampled_from([0, 1, 2, 4]),
    st.integers(0, 10**6),
)


def graph_of(event: Event) -> tuple[str, int]:
    return ("DECODE" if event.mode is ForwardMode.IDLE else event.mode.name, event.bs)


@settings(deadline=None, max_examples=120, derandomize=True)
@given(st.lists(events, min_size=2, max_size=9), st.sampled_from(StepSemantics), st.integers(1, 3))
def test_history_does_not_matter(history: list[Event], semantics: StepSemantics, num_steps: int) -> None:
    """After any history, a replay equals the metadata of its batch computed afresh, at the captured addresses."""
    config, pool = make_config(semantics, num_steps), make_pool()
    backend = MultiStepBackend(config, pool)
    backend.init_cuda_graph_state(max_bs=4, max_num_tokens=12)
    held: dict[tuple[str, int], list[dict[str, int]]] = {}
    retained: list[Metadata] = []  # keeps replaced buffers alive, so that no address is handed out twice
    for happening in history:
        key = graph_of(happening)
        batch = make_batch(happening.mode, happening.bs, happening.seed)
        if happening.kind == "remap":
            pool.copy_(make_pool(happening.seed))
            continue
        if happening.kind == "eager":
            backend.init_forward_metadata(batch)
        elif happening.kind == "capture" or key not in held:
            backend.init_forward_metadata_capture_cuda_graph(batch)
            held[key] = [addresses(single.forward_metadata) for single in backend.attn_backends]
            retained += [single.forward_metadata for single in backend.attn_backends]
        else:
            event("a replay of a graph captured before")
            backend.init_forward_metadata_replay_cuda_graph(batch, happening.bs)
            assert [addresses(single.forward_metadata) for single in backend.attn_backends] == held[key]
        in_graph = happening.kind != "eager"
        for step, single in enumerate(backend.attn_backends):
            assert_same(single.forward_metadata, compute_metadata(config, pool, batch, step, in_graph))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.sampled_from(GRAPH_MODES), st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
def test_replay_equals_a_cold_capture(mode: ForwardMode, seeds: list[int]) -> None:
    """The last of several replays of one bucket leaves what a backend without a past would have captured."""
    config, pool = make_config(), make_pool()
    warm, cold = SingleStepBackend(config, pool, 1), SingleStepBackend(config, pool, 1)
    capture(warm, make_batch(mode, 3, seed=11))
    for seed in seeds:
        replay(warm, make_batch(mode, 3, seed))
    capture(cold, make_batch(mode, 3, seeds[-1]))
    assert_same(warm.forward_metadata, cold.forward_metadata)
