"""Two serving cycles against a model that knows tokens alone: a dict from (request, position) to its last keys.

The model has no slots, pages or metadata. Who attends to what follows from the meaning of each mode; selection is
Python's sorted, attention is rational arithmetic. Every bit of the layer's outputs is compared.
"""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch

from nsa_oracle.reference.cycle import Pass, SpeculativeCycle, out_cache_loc, query_positions, request_of_row
from nsa_oracle.reference.layer import SparseAttention
from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.types import (
    AttentionCaches,
    AttentionConfig,
    AttentionInputs,
    BackendConfig,
    ForwardBatch,
    ForwardMode,
    KVCacheDtype,
    SpecInfo,
    StepSemantics,
)
from tests.support.exact_numbers import dot, exact_attention, to_float32

LN2 = math.log(2.0)
BACKEND = BackendConfig(
    page_size=2, max_context_len=20, index_topk=4, speculative_num_steps=2, speculative_num_draft_tokens=3
)
ATTENTION = AttentionConfig(
    num_heads=2, kv_lora_rank=16, qk_rope_head_dim=4, index_n_heads=2, index_head_dim=8, sm_scale=LN2
)
NUM_REQUESTS, NUM_PAGES = 4, 45
POOL_ROWS = [2, 0, 3, 5]
SHARED_PREFIX = 4  # tokens that request 1 shares with request 0
DEAD_SLOT = 0x5A5A5A5A

Token = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """One query token: whose it is and where, -1 for no token; how many tokens it sees."""

    request: int
    position: int
    visible: int


@dataclass(frozen=True)
class Keys:
    k: list[int]
    index_k: list[int]


def make_req_to_token(rng: random.Random) -> torch.Tensor:
    """Pages in no order; pool row 0 starts with the pages that hold the first tokens of pool row 2."""
    pages = rng.sample(range(1, NUM_PAGES), NUM_REQUESTS * 10)
    pool = torch.full((7, 20), DEAD_SLOT, dtype=torch.int32)
    for number, pool_row in enumerate(POOL_ROWS):
        own = pages[10 * number : 10 * number + 10]
        pool[pool_row] = torch.tensor([2 * page + offset for page in own for offset in (0, 1)])
    pool[POOL_ROWS[1], :SHARED_PREFIX] = pool[POOL_ROWS[0], :SHARED_PREFIX]
    return pool


def make_caches(config: AttentionConfig) -> AttentionCaches:
    """All NaN, whatever the bytes are taken for."""
    is_fp8 = config.kv_cache_dtype is KVCacheDtype.FP8
    width = config.kv_token_bytes if is_fp8 else 2 * config.qk_head_dim
    kv = torch.full((2 * NUM_PAGES, 1, width), 0xFF, dtype=torch.uint8)
    index_k = torch.full((NUM_PAGES, config.index_page_bytes(2)), 0xFF, dtype=torch.uint8)
    return AttentionCaches(kv if is_fp8 else kv.view(torch.bfloat16), index_k)


class TokenModel:
    """Random integers for every row, remembered; 7s where a scale is taken, so that FP8 holds them as they are."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.calls: list[tuple[ForwardMode, int, list[int], list[int]]] = []
        self.queries: list[list[list[int]]] = []
        self.index_queries: list[list[list[int]]] = []
        self.weights: list[list[int]] = []
        self.keys: list[Keys] = []

    def __call__(
        self, mode: ForwardMode, step: int, positions: torch.Tensor, requests: torch.Tensor, out_cache_loc: torch.Tensor
    ) -> AttentionInputs:
        self.calls.append((mode, step, positions.tolist(), requests.tolist()))
        rows = range(positions.shape[0])
        self.queries = [[self.query() for _ in range(2)] for _ in rows]
        self.keys = [self.key() for _ in rows]
        self.index_queries = [[self.integers(8, 2) for _ in range(2)] for _ in rows]
        self.weights = [self.integers(2, 3) for _ in rows]

        def bf16(values: object, *shape: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.bfloat16).view(len(rows), *shape)

        return AttentionInputs(
            q=bf16(self.queries, 2, 20),
            k=bf16([keys.k for keys in self.keys], 20),
            index_q=bf16(self.index_queries, 2, 8).to(torch.float8_e4m3fn),
            index_weights=bf16(self.weights, 2).to(torch.float32),
            index_k=bf16([keys.index_k for keys in self.keys], 8),
            out_cache_loc=out_cache_loc,
        )

    def integers(self, count: int, limit: int) -> list[int]:
        return [self.rng.randint(-limit, limit) for _ in range(count)]

    def key(self) -> Keys:
        latent = self.integers(16, 4)
        latent[3::4] = [7] * 4
        return Keys(latent + self.integers(4, 2), [*self.integers(7, 3), 7])

    def query(self) -> list[int]:
        query = [0] * 20
        query[self.rng.choice([0, 1, 2])], query[self.rng.choice([16, 19])] = self.rng.choice([-1, 1]), 1
        return query


class World:
    """The tokens of all requests, and what each pass must be, from the meaning of its mode."""

    def __init__(self, config: BackendConfig, attention: AttentionConfig, in_graph: bool, seed: int) -> None:
        rng = random.Random(seed)
        self.config, self.in_graph = config, in_graph
        self.tokens: dict[Token, Keys] = {}
        self.lengths = [0] * NUM_REQUESTS
        self.model = TokenModel(rng)
        self.req_to_token = make_req_to_token(rng)
        self.layer = SparseAttention(config, attention)
        self.cycle = SpeculativeCycle(
            self.layer,
            make_caches(attention),
            self.req_to_token,
            torch.tensor(POOL_ROWS, dtype=torch.int32),
            self.model,
            in_graph,
        )

    def token(self, request: int, position: int) -> Token:
        return (0 if request == 1 and position < SHARED_PREFIX else request, position)

    def slot(self, request: int, position: int) -> int:
        return int(self.req_to_token[POOL_ROWS[request], position])

    def prefill(self, prefix: list[int], new: list[int]) -> Pass:
        got = self.cycle.prefill(torch.tensor(prefix), torch.tensor(new))
        self.lengths = [a + b for a, b in zip(prefix, new, strict=True)]
        rows = [Row(i, p, p + 1) for i in range(NUM_REQUESTS) for p in range(prefix[i], prefix[i] + new[i])]
        self.check(got, ForwardMode.EXTEND, 0, rows, widest=max(self.lengths))
        return got

    def draft(self) -> None:
        for step in range(self.config.speculative_num_steps):
            advance = step + 1 if self.config.step_semantics is StepSemantics.ADVANCING else 0
            rows = [Row(i, length + step, length + advance) for i, length in enumerate(self.lengths)]
            got = self.cycle.draft_step(step)
            self.check(got, ForwardMode.DECODE, step, rows, widest=max(self.lengths) + advance)

    def verify(self) -> None:
        rows = [Row(i, length + j, length + j + 1) for i, length in enumerate(self.lengths) for j in range(3)]
        self.check(self.cycle.verify(), ForwardMode.TARGET_VERIFY, 0, rows, widest=max(self.lengths) + 3)

    def accept(self, accepted: list[int]) -> None:
        self.cycle.accept(torch.tensor(accepted))
        self.lengths = [a + b for a, b in zip(self.lengths, accepted, strict=True)]

    def draft_extend(self, mode: ForwardMode, accepted: list[int]) -> None:
        counts = accepted if mode is ForwardMode.DRAFT_EXTEND else [3] * NUM_REQUESTS
        rows = []
        for i, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            for position in range(length - count, length):
                rows.append(Row(i, position, position + 1) if position >= 0 else Row(i, -1, 0))
        if mode is ForwardMode.DRAFT_EXTEND and self.in_graph:
            rows += [Row(-1, -1, 0)] * (3 * NUM_REQUESTS - len(rows))
        self.check(self.cycle.draft_extend(mode), mode, 0, rows, widest=max(self.lengths))

    def check(self, got: Pass, mode: ForwardMode, step: int, rows: list[Row], widest: int) -> None:
        """The model was asked for these rows; their keys are in the cache; each attends to what it must."""
        metadata, outputs = got
        assert self.model.calls[-1] == (mode, step, [row.position for row in rows], [row.request for row in rows])
        for row, keys in zip(rows, self.model.keys, strict=True):
            if row.position >= 0:
                self.tokens[self.token(row.request, row.position)] = keys

        width = 20 if self.in_graph and mode is not ForwardMode.EXTEND else widest
        assert metadata.max_seq_len_k == width
        assert tuple(outputs.logits.shape) == (len(rows), width)
        for number, row in enumerate(rows):
            where = f"{mode.name} step {step} row {number} {row}"
            visible = [self.tokens[self.token(row.request, position)] for position in range(row.visible)]
            logits = [self.logit(number, keys) for keys in visible]
            assert outputs.logits[number].tolist() == logits + [-math.inf] * (width - row.visible), where

            best = sorted(range(row.visible), key=lambda position: (-logits[position], position))
            selected = sorted(best[: self.config.index_topk])
            slots = [self.slot(row.request, position) for position in selected]
            assert outputs.indices[number].tolist() == slots + [-1] * (4 - len(slots)), where

            for head in range(2):
                exact, largest, total = exact_attention(
                    self.model.queries[number][head], [visible[position].k for position in selected], 16
                )
                assert [Fraction(x) for x in outputs.out[number, head].tolist()] == exact, where
                lse = float(to_float32(Fraction(largest * LN2 + math.log(total)))) if total else -math.inf
                assert outputs.lse[number, head].item() == lse, where

    def logit(self, number: int, keys: Keys) -> int:
        products = [int(dot(query, keys.index_k)) for query in self.model.index_queries[number]]
        return sum(w * max(product, 0) for w, product in zip(self.model.weights[number], products, strict=True))


def start(config: BackendConfig, attention: AttentionConfig, in_graph: bool, seed: int) -> World:
    """Four requests of 7, 8, 1 and 3 tokens; the second begins with what the first has cached."""
    world = World(config, attention, in_graph, seed)
    world.prefill([0, 0, 0, 0], [5, 0, 1, 3])
    world.prefill([5, SHARED_PREFIX, 1, 3], [2, 4, 0, 0])
    return world


@pytest.mark.parametrize("in_graph", [False, True], ids=["layout=eager", "layout=graph"])
@pytest.mark.parametrize("mode", [ForwardMode.DRAFT_EXTEND, ForwardMode.DRAFT_EXTEND_V2], ids=["v=1", "v=2"])
@pytest.mark.parametrize("semantics", StepSemantics, ids=lambda semantics: semantics.value)
@pytest.mark.parametrize("dtype", KVCacheDtype, ids=lambda dtype: dtype.value)
def test_two_cycles(dtype: KVCacheDtype, semantics: StepSemantics, mode: ForwardMode, in_graph: bool) -> None:
    """Accepting none, some and all; the drafts that were refused are overwritten and never seen again."""
    backend = dataclasses.replace(BACKEND, step_semantics=semantics)
    world = start(backend, dataclasses.replace(ATTENTION, kv_cache_dtype=dtype), in_graph, seed=1)
    for accepted in ([0, 1, 0, 3], [3, 0, 2, 1]):
        world.draft()
        world.verify()
        world.accept(accepted)
        world.draft_extend(mode, accepted)
    assert world.lengths == [10, 9, 3, 7]
    world.draft()


def test_nothing_accepted_by_anyone() -> None:
    """DRAFT_EXTEND without a row, then a cycle as if nothing had been."""
    for in_graph in (False, True):
        world = start(BACKEND, ATTENTION, in_graph, seed=2)
        world.verify()
        world.accept([0] * NUM_REQUESTS)
        world.draft_extend(ForwardMode.DRAFT_EXTEND, [0] * NUM_REQUESTS)
        world.draft()


def test_draft_is_all_steps() -> None:
    world = start(BACKEND, ATTENTION, in_graph=False, seed=5)
    passes = world.cycle.draft()
    assert [(mode, step) for mode, step, _positions, _requests in world.model.calls[2:]] == [
        (ForwardMode.DECODE, 0),
        (ForwardMode.DECODE, 1),
    ]
    assert [outputs.out.shape[0] for _metadata, outputs in passes] == [4, 4]


@pytest.mark.parametrize("seed", [3, 4])
def test_ragged_through_the_flattened_table_equals_paged(seed: int) -> None:
    """In EXTEND the concatenated KV is page_table_1_flattened: position + offset leads to the same slot."""
    world = World(BACKEND, ATTENTION, False, seed)
    world.prefill([0, 0, 0, 0], [5, 0, 1, 3])
    metadata, outputs = world.prefill([5, SHARED_PREFIX, 1, 3], [9, 4, 1, 0])
    assert metadata.topk_indices_offset is not None
    assert metadata.page_table_1_flattened is not None
    ragged = world.layer.topk_transform_ragged(
        outputs.logits, metadata.seqlens_expanded, metadata.topk_indices_offset
    ).to(torch.int64)
    slots = metadata.page_table_1_flattened[ragged.clamp(min=0)].masked_fill(ragged < 0, -1)
    assert torch.equal(slots, outputs.indices)
    assert int(ragged.max()) > 14  # beyond the first request, whose offset is 0
    assert -1 in ragged[-1].tolist()  # the last row has two tokens


def where_rows_go(
    config: BackendConfig, batch: ForwardBatch, step: int, in_graph: bool, raw_bs: int | None = None
) -> tuple[list[int], list[int], list[int]]:
    pool = torch.tensor([[DEAD_SLOT] * 8, [10, 11, 20, 21, 30, 31, 40, 41], [50, 51, 60, 61, 70, 71, 80, 81]])
    pool = pool.to(torch.int32)
    metadata = compute_metadata(config, pool, batch, step, in_graph)
    positions = query_positions(config, batch, step, metadata)
    requests = request_of_row(config, batch, metadata)
    slots = out_cache_loc(config, pool, batch, step, metadata, raw_bs)
    assert positions.dtype == requests.dtype == slots.dtype == torch.int64
    return positions.tolist(), requests.tolist(), slots.tolist()


def make_batch(mode: ForwardMode, pool_rows: list[int], seq_lens: list[int], accepted: list[int]) -> ForwardBatch:
    int32s = (torch.tensor(values, dtype=torch.int32) for values in (pool_rows, seq_lens, accepted))
    rows, lengths, accepts = int32s
    return ForwardBatch(mode, len(pool_rows), rows, lengths, spec_info=SpecInfo(accepts))


WIDTH_8 = dataclasses.replace(BACKEND, max_context_len=8)


@pytest.mark.parametrize("semantics", StepSemantics, ids=lambda semantics: semantics.value)
@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.IDLE], ids=["mode=DECODE", "mode=IDLE"])
def test_draft_steps_write_behind_the_committed_tokens(mode: ForwardMode, semantics: StepSemantics) -> None:
    config = dataclasses.replace(WIDTH_8, step_semantics=semantics)
    batch = make_batch(mode, [2, 1], [3, 5], [0, 0])
    assert where_rows_go(config, batch, 0, in_graph=False) == ([3, 5], [0, 1], [61, 31])
    assert where_rows_go(config, batch, 1, in_graph=True) == ([4, 6], [0, 1], [70, 40])


def test_rows_that_are_no_token_write_to_slot_0() -> None:
    """A length of 1 with two rows; the tail of the graph; and request 2, which is padding."""
    batch = make_batch(ForwardMode.DRAFT_EXTEND, [2, 1, 0], [4, 1, 1], [1, 2, 1])
    positions, requests = [3, -1, 0, 0], [0, 1, 1, 2]
    assert where_rows_go(WIDTH_8, batch, 0, False, 2) == (positions, requests, [61, 0, 10, 0])
    tail = [-1] * 5
    assert where_rows_go(WIDTH_8, batch, 0, True, 2) == (positions + tail, requests + tail, [61, 0, 10, 0] + [0] * 5)
    assert where_rows_go(WIDTH_8, batch, 0, False)[2] == [61, 0, 10, DEAD_SLOT]  # not reported that it is padding


def test_no_requests() -> None:
    batch = make_batch(ForwardMode.IDLE, [], [], [])
    assert where_rows_go(WIDTH_8, batch, 0, in_graph=False) == ([], [], [])
