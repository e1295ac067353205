"""The optimised backend equals the reference bit for bit, with every subset of its optimisations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsa_oracle.optimized.multi_step import MultiStepBackend
from nsa_oracle.optimized.optimizations import Optimizations
from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata, SpecInfo, StepSemantics

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GRAPH_MODES = [mode for mode in ForwardMode if mode is not ForwardMode.EXTEND]
SENTINEL = 0x5A5A5A5A
FIVE = ["precompute", "transform_table_cache", "strided_indices_cache", "batched_copy", "vectorized_seqlens"]
COMMON = settings(
    deadline=None, max_examples=8, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@dataclass(frozen=True)
class Case:
    """Sizes, flags and one seed; the tensors are built from these."""

    mode: ForwardMode
    batch_sizes: tuple[int, ...]
    page_size: int
    context: int
    num_steps: int
    num_draft_tokens: int
    index_topk: int
    semantics: StepSemantics
    num_sms: int
    num_sm_parts: int
    optimizations: tuple[str, ...]
    dtype: torch.dtype
    strided: bool
    margin: int
    single_step: bool
    seed: int

    @property
    def config(self) -> BackendConfig:
        return BackendConfig(
            self.page_size, self.context, self.index_topk, self.num_steps, self.num_draft_tokens, self.semantics,
            self.num_sms, self.num_sm_parts,
        )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, modes: list[ForwardMode], one_launch: bool) -> Case:
    semantics = draw(st.sampled_from(StepSemantics))
    names = ["one_launch"] if one_launch else draw(st.lists(st.sampled_from(FIVE), unique=True))
    if one_launch and draw(st.booleans()):
        names.append("in_graph")
    if semantics is StepSemantics.SHARED and draw(st.booleans()):
        names.append("aliased_steps")
    return Case(
        mode=draw(st.sampled_from(modes)),
        batch_sizes=tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))),
        page_size=draw(st.sampled_from([1, 3, 16, 64])),
        context=draw(st.sampled_from([70, 128, 1500])),
        num_steps=draw(st.integers(1, 4)),
        num_draft_tokens=draw(st.integers(1, 4)),
        index_topk=draw(st.sampled_from([2, 64, 512])),
        semantics=semantics,
        num_sms=draw(st.sampled_from([0, 1, 5])),
        num_sm_parts=draw(st.sampled_from([0, 1, 4])),
        optimizations=tuple(names),
        dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        strided=draw(st.booleans()),
        margin=draw(st.integers(0, 3)),
        single_step=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def build_batch(case: Case, bs: int, generator: torch.Generator) -> ForwardBatch:
    """A random batch; ``seq_lens_cpu`` is left out, as it may be at any time."""
    nd, mode = case.num_draft_tokens, case.mode

    def tensor(low: int, high: int) -> torch.Tensor:
        values = torch.randint(low, high + 1, (bs, 3 if case.strided else 1), generator=generator)
        return values.to(DEVICE, case.dtype)[:, -1]

    longest = case.context - max(nd, case.num_steps)
    seq_lens = tensor(1, longest)
    batch = ForwardBatch(mode, bs, tensor(0, 7), seq_lens)
    if mode in (ForwardMode.DRAFT_EXTEND, ForwardMode.DRAFT_EXTEND_V2):
        batch = dataclasses.replace(batch, spec_info=SpecInfo(tensor(0, nd)))
    if mode is ForwardMode.EXTEND:
        share = torch.rand(bs, generator=generator).to(DEVICE)
        extend = (seq_lens * share).to(case.dtype).clamp(min=1)
        batch = dataclasses.replace(batch, extend_seq_lens=extend, extend_prefix_lens=seq_lens - extend)
    return batch


def build_pool(case: Case, generator: torch.Generator) -> torch.Tensor:
    """req_to_token [8, context], perhaps a view of a wider tensor; slots are page-aligned."""
    pages = -(-case.context // case.page_size)
    page_ids = torch.randperm(8 * pages, generator=generator).view(8, pages, 1) + 1
    slots = (page_ids * case.page_size + torch.arange(case.page_size)).flatten(1)[:, : case.context]
    wide = torch.full((8, case.context + 2 * case.margin), SENTINEL, dtype=torch.int32, device=DEVICE)
    view = wide[:, case.margin : case.margin + case.context]
    view.copy_(slots)
    return view


def assert_equal(got: Metadata, expected: Metadata, rows_live: torch.Tensor, where: str) -> None:
    """Live cells of every field, bit for bit."""
    for field in dataclasses.fields(Metadata):
        have, want = getattr(got, field.name), getattr(expected, field.name)
        label = f"{where}: {field.name}"
        if isinstance(want, tuple):
            pairs = list(zip(have, want, strict=True))
        elif isinstance(want, torch.Tensor):
            pairs = [(have, want)]
        else:
            assert have == want, label
            continue
        for mine, theirs in pairs:
            assert mine.shape == theirs.shape, f"{label}: {mine.shape} instead of {theirs.shape}"
            assert mine.dtype is torch.int32, label
            a, b = mine.clone(), theirs.clone()
            if field.name in ("page_table_1", "real_page_table"):
                size = 1 if field.name == "page_table_1" else got.page_size
                dead = torch.arange(a.shape[1], device=a.device) * size >= rows_live[:, None]
                a[dead], b[dead] = 0, 0
            if field.name == "flashmla_metadata":
                a[:, 7], b[:, 7] = 0, 0
            assert torch.equal(a, b), f"{label}\ngot      {a.tolist()}\nexpected {b.tolist()}"


def check(case: Case, backend: MultiStepBackend, batch: ForwardBatch, in_graph: bool) -> None:
    for step, single in enumerate(backend.attn_backends):
        got = single.forward_metadata
        expected = compute_metadata(case.config, single.req_to_token, batch, step, in_graph)
        live = expected.cache_seqlens_int32 if batch.forward_mode is ForwardMode.EXTEND else expected.seqlens_expanded
        assert_equal(got, expected, live, f"bs={batch.batch_size} step={step}")


def run_eager(case: Case) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    backend = MultiStepBackend(case.config, build_pool(case, generator), Optimizations.from_names(case.optimizations))
    for bs in case.batch_sizes:
        batch = build_batch(case, bs, generator)
        if case.single_step:
            for single in backend.attn_backends:
                single.init_forward_metadata(batch)
        else:
            backend.init_forward_metadata(batch)
        check(case, backend, batch, in_graph=False)


def run_graph(case: Case) -> None:
    """Captures every bucket, then replays each with other batches, in two orders; addresses must not move."""
    generator = torch.Generator().manual_seed(case.seed)
    pool = build_pool(case, generator)
    backend = MultiStepBackend(case.config, pool, Optimizations.from_names(case.optimizations))
    max_bs = max(case.batch_sizes)
    if case.single_step:
        for single in backend.attn_backends:
            single.init_cuda_graph_state(max_bs, max_bs)
    else:
        backend.init_cuda_graph_state(max_bs, max_bs * case.num_draft_tokens)
    addresses = {}
    for bs in case.batch_sizes:
        batch = build_batch(case, bs, generator)
        capture(case, backend, batch)
        check(case, backend, batch, in_graph=True)
        addresses[bs] = [held(single.forward_metadata) for single in backend.attn_backends]
    for bs in (*case.batch_sizes, *reversed(case.batch_sizes)):
        batch = build_batch(case, bs, generator)
        if case.mode is ForwardMode.DECODE:
            batch = dataclasses.replace(batch, forward_mode=ForwardMode.IDLE)  # an idle rank replays that graph
        replay(case, backend, batch)
        check(case, backend, batch, in_graph=True)
        assert addresses[bs] == [held(single.forward_metadata) for single in backend.attn_backends]


def held(metadata: Metadata) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in vars(metadata).items() if isinstance(value, torch.Tensor)}


def capture(case: Case, backend: MultiStepBackend, batch: ForwardBatch) -> None:
    if not case.single_step:
        backend.init_forward_metadata_capture_cuda_graph(batch)
        return
    for single in backend.attn_backends:
        single.init_forward_metadata_capture_cuda_graph(
            batch.batch_size, batch.batch_size, batch.req_pool_indices, batch.seq_lens, None, batch.forward_mode,
            batch.spec_info,
        )  # fmt: skip


def replay(case: Case, backend: MultiStepBackend, batch: ForwardBatch) -> None:
    """The engine's call, then what the graph does before its consumers (nothing, unless prepared in the graph)."""
    bs = batch.batch_size
    if not case.single_step:
        backend.init_forward_metadata_replay_cuda_graph(batch, bs)
        backend.init_forward_metadata_in_graph(batch, bs)
        return
    for single in backend.attn_backends:
        single.init_forward_metadata_replay_cuda_graph(
            bs, batch.req_pool_indices, batch.seq_lens, None, None, batch.forward_mode, batch.spec_info, None
        )
        single.init_forward_metadata_in_graph(batch, bs)


@COMMON
@given(case=cases(list(ForwardMode), one_launch=False))
def test_eager_composed(case: Case) -> None:
    run_eager(case)


@COMMON
@given(case=cases(list(ForwardMode), one_launch=True))
def test_eager_one_launch(case: Case) -> None:
    run_eager(case)


@COMMON
@given(case=cases(GRAPH_MODES, one_launch=False))
def test_graph_composed(case: Case) -> None:
    run_graph(case)


@COMMON
@given(case=cases(GRAPH_MODES, one_launch=True))
def test_graph_one_launch(case: Case) -> None:
    run_graph(case)


def test_padded_request_has_no_negative_length() -> None:
    case = Case(
        ForwardMode.DRAFT_EXTEND_V2, (3,), 64, 128, 2, 4, 64, StepSemantics.SHARED, 5, 4, ("one_launch",), torch.int64,
        False, 0, False, 0,
    )  # fmt: skip
    pool = build_pool(case, torch.Generator().manual_seed(0))
    batch = ForwardBatch(case.mode, 3, torch.zeros(3, dtype=torch.int64, device=DEVICE), pool.new_ones(3))
    backend = MultiStepBackend(case.config, pool, Optimizations.from_names(case.optimizations))
    backend.init_forward_metadata(batch)
    assert backend.attn_backends[0].forward_metadata.seqlens_expanded.tolist() == [0, 0, 0, 1] * 3
    check(case, backend, batch, in_graph=False)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["no_such"], "unknown optimization 'no_such'"),
        (["in_graph"], "in_graph needs one_launch"),
    ],
)
def test_bad_combination_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optimizations.from_names(names)


def test_aliased_steps_need_shared_semantics() -> None:
    config = BackendConfig(64, 128, 64, 2, 2, StepSemantics.ADVANCING)
    with pytest.raises(ValueError, match="aliased_steps needs shared"):
        MultiStepBackend(config, torch.zeros(1, 128, dtype=torch.int32), Optimizations(aliased_steps=True))


def test_names_round_trip() -> None:
    names = ("precompute", "one_launch", "in_graph")
    assert Optimizations.from_names(reversed(names)).names == names
