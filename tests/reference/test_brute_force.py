"""Every mode, layout, step and page size against a statement of docs/contract.md in nested loops over plain lists.

``brute_force`` reads the contract's table alone: it knows neither torch nor how ``reference`` is built. Lengths are
compared whole, page tables in their live cells (``None`` marks a dead one). The schedules have tests of their own
(``test_schedules``); here it is checked that they are those of the right lengths.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from nsa_oracle.reference import schedules
from nsa_oracle.reference.metadata import compute_metadata
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata, SpecInfo, StepSemantics

POOL_SIZE = 5
GRAPH_MODES = [mode for mode in ForwardMode if mode is not ForwardMode.EXTEND]


@dataclass(frozen=True)
class Request:
    """One request, in host integers. ``tokens`` is what seq_lens says; ``new`` of them are of this forward pass."""

    pool_row: int
    tokens: int
    new: int


@dataclass(frozen=True)
class Scenario:
    """Sizes, flags and one seed; tensors are built from them in the test."""

    mode: ForwardMode
    in_graph: bool
    step: int
    config: BackendConfig
    requests: tuple[Request, ...]
    dtype: torch.dtype
    strided: bool
    seed: int


@st.composite
def scenarios(draw: st.DrawFn, in_graph: bool | None = None, modes: Sequence[ForwardMode] | None = None) -> Scenario:
    """Structure alone; small numbers first, so that failures shrink towards one short request."""
    mode = draw(st.sampled_from(modes or list(ForwardMode)))
    page_size = draw(st.sampled_from([1, 16, 32, 64]))
    num_drafts = draw(st.integers(1, 5))
    num_steps = draw(st.integers(1, 4))
    room = max(num_drafts, num_steps) if mode not in (ForwardMode.EXTEND, ForwardMode.DRAFT_EXTEND) else 0
    width = draw(st.integers(room + 1, 140))
    config = BackendConfig(
        page_size=page_size,
        max_context_len=width,
        index_topk=draw(st.sampled_from([1, 2, 8, 64, 2048])),
        speculative_num_steps=num_steps,
        speculative_num_draft_tokens=num_drafts,
        step_semantics=draw(st.sampled_from(StepSemantics)),
        paged_mqa_num_sms=draw(st.sampled_from([0, 3])),
        flashmla_num_sm_parts=draw(st.sampled_from([0, 2])),
    )
    tokens = st.integers(0, width - room) | st.sampled_from([1, width - room])
    is_extend = mode is ForwardMode.EXTEND
    new = (
        st.sampled_from([100, 0, 1, 40, 95]) if is_extend else st.sampled_from([0, num_drafts, *range(num_drafts)])
    )  # EXTEND: percent
    bs = draw(st.sampled_from([1, 0, 2, 3, 5]))
    request = st.builds(Request, st.integers(0, POOL_SIZE - 1), tokens, new)
    requests = draw(st.lists(request, min_size=bs, max_size=bs))
    if is_extend:
        requests = [dataclasses.replace(request, new=-(-request.tokens * request.new // 100)) for request in requests]
    return Scenario(
        mode=mode,
        in_graph=draw(st.booleans()) if in_graph is None else in_graph,
        step=draw(st.integers(0, num_steps - 1)),
        config=config,
        requests=tuple(requests),
        dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def make_pool(scenario: Scenario) -> list[list[int]]:
    """Slots of each pooled request: pages in no order, some shared between requests, page 0 among them."""
    page_size, width = scenario.config.page_size, scenario.config.max_context_len
    rng = random.Random(scenario.seed)
    num_pages = -(-width // page_size)
    pool = []
    for _row in range(POOL_SIZE):
        pages = rng.sample(range(2 * num_pages + 3), num_pages)
        pool.append([page * page_size + offset for page in pages for offset in range(page_size)][:width])
    return pool


def to_tensor(values: list[int], scenario: Scenario) -> torch.Tensor:
    """``values`` as the engine may hand them over; between strided ones stands what nobody may read."""
    if not scenario.strided:
        return torch.tensor(values, dtype=scenario.dtype)
    wide = torch.full((len(values), 3), -12345, dtype=scenario.dtype)
    wide[:, 1] = torch.tensor(values, dtype=scenario.dtype)
    return wide[:, 1]


def pool_to_tensor(pool: list[list[int]], scenario: Scenario) -> torch.Tensor:
    """The pool, wider than the context when strided."""
    if not scenario.strided:
        return torch.tensor(pool, dtype=torch.int32)
    width = scenario.config.max_context_len
    wide = torch.full((2 * POOL_SIZE, width + 9), -54321, dtype=torch.int32)
    wide[::2, 2 : width + 2] = torch.tensor(pool, dtype=torch.int32)
    return wide[::2, 2:]


def make_batch(scenario: Scenario) -> ForwardBatch:
    """The batch, with host mirrors that lag behind: they must not matter."""
    requests, rng = scenario.requests, random.Random(scenario.seed + 1)
    stale = [rng.randint(0, 200) for _ in requests]
    is_extend = scenario.mode is ForwardMode.EXTEND
    new = to_tensor([request.new for request in requests], scenario)
    return ForwardBatch(
        scenario.mode,
        len(requests),
        to_tensor([request.pool_row for request in requests], scenario),
        to_tensor([request.tokens for request in requests], scenario),
        seq_lens_cpu=torch.tensor(stale) if rng.random() < 0.5 else None,
        seq_lens_sum=sum(stale),
        spec_info=None if is_extend else SpecInfo(new),
        extend_seq_lens=new if is_extend else None,
        extend_prefix_lens=to_tensor([r.tokens - r.new for r in requests], scenario) if is_extend else None,
    )


def running_sum(values: list[int]) -> list[int]:
    sums = [0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums


def visible_lengths(scenario: Scenario, request: Request) -> tuple[int, list[int]]:
    """KV length of the request, and of each of its query tokens, as the contract's table has them mode by mode."""
    drafts = scenario.config.speculative_num_draft_tokens
    seq_len = request.tokens
    if scenario.mode in (ForwardMode.DECODE, ForwardMode.IDLE):
        advancing = scenario.config.step_semantics is StepSemantics.ADVANCING
        kv_len = seq_len + scenario.step + 1 if advancing else seq_len
        return kv_len, [kv_len]
    if scenario.mode is ForwardMode.TARGET_VERIFY:
        return seq_len + drafts, [seq_len + j + 1 for j in range(drafts)]
    if scenario.mode is ForwardMode.EXTEND:
        prefix = seq_len - request.new
        return seq_len, [prefix + j for j in range(1, request.new + 1)]
    committed = drafts if scenario.mode is ForwardMode.DRAFT_EXTEND_V2 else request.new
    lengths = []
    for behind in range(committed - 1, -1, -1):  # tokens of this request that come later
        lengths.append(seq_len - behind if seq_len > behind else 0)
    return seq_len, lengths


def live_row(slots: list[int], kv_len: int, width: int) -> list[int | None]:
    return [slots[column] if column < kv_len else None for column in range(width)]


def live_pages(slots: list[int], kv_len: int, width: int, page_size: int) -> list[int | None]:
    """One column a page begun in the table; live where the page holds a visible token."""
    pages: list[int | None] = []
    for first_token in range(0, width, page_size):
        pages.append(slots[first_token] // page_size if first_token < kv_len else None)
    return pages


def brute_force(scenario: Scenario, pool: list[list[int]]) -> dict[str, Any]:
    """All fields but the schedules, as plain lists."""
    config, is_extend = scenario.config, scenario.mode is ForwardMode.EXTEND
    kv_lens: list[int] = []
    expanded: list[int] = []
    request_of_row: list[int] = []
    for number, request in enumerate(scenario.requests):
        kv_len, visible = visible_lengths(scenario, request)
        kv_lens.append(kv_len)
        expanded.extend(visible)
        request_of_row.extend([number] * len(visible))

    width = config.max_context_len if scenario.in_graph else (max(kv_lens) if kv_lens else 0)
    # Rows of the page tables: (pool row, live columns); one a request in EXTEND, one a query token otherwise.
    if is_extend:
        rows = [(request.pool_row, request.tokens) for request in scenario.requests]
    else:
        rows = [(scenario.requests[i].pool_row, n) for i, n in zip(request_of_row, expanded, strict=True)]
    if scenario.in_graph and scenario.mode is ForwardMode.DRAFT_EXTEND:
        unused = len(scenario.requests) * config.speculative_num_draft_tokens - len(expanded)
        expanded += [0] * unused
        rows += [(0, 0)] * unused

    kept = [n if n < config.index_topk else config.index_topk for n in expanded]
    fields: dict[str, Any] = {
        "page_size": config.page_size,
        "max_seq_len_q": 1,
        "max_seq_len_k": width,
        "cache_seqlens_int32": kv_lens,
        "cu_seqlens_k": running_sum(kv_lens),
        "cu_seqlens_q": list(range(len(expanded) + 1)),
        "seqlens_expanded": expanded,
        "nsa_cache_seqlens_int32": kept,
        "nsa_cu_seqlens_k": running_sum(kept),
        "nsa_cu_seqlens_q": list(range(len(expanded) + 1)),
        "page_table_1": [live_row(pool[row], n, width) for row, n in rows],
        "real_page_table": [live_pages(pool[row], n, width, config.page_size) for row, n in rows],
    }
    if is_extend:
        new = [request.new for request in scenario.requests]
        begins = [running_sum(kv_lens)[number] for number in request_of_row]
        fields |= {
            "max_seq_len_q": max(new, default=0),
            "cu_seqlens_q": running_sum(new),
            "topk_indices_offset": begins,
            "indexer_k_start_end": (begins, [begin + n for begin, n in zip(begins, expanded, strict=True)]),
            "token_to_batch_idx": request_of_row,
        }
        if any(request.tokens > request.new for request in scenario.requests):
            flat = [slot for request in scenario.requests for slot in pool[request.pool_row][: request.tokens]]
            fields["page_table_1_flattened"] = flat
    return fields


def assert_equals(name: str, got: Any, expected: Any, columns: int) -> None:
    if expected is None or isinstance(expected, int):
        assert got == expected, f"{name} is {got}, expected {expected}"
    elif isinstance(expected, tuple):
        assert len(got) == len(expected)
        for part, expected_part in zip(got, expected, strict=True):
            assert_equals(name, part, expected_part, columns)
    elif name in ("page_table_1", "real_page_table"):
        assert got.dtype == torch.int32
        assert tuple(got.shape) == (len(expected), columns), f"{name}: {got.shape}"
        for row, (got_row, expected_row) in enumerate(zip(got.tolist(), expected, strict=True)):
            for column, wanted in enumerate(expected_row):
                assert wanted is None or got_row[column] == wanted, f"{name}[{row}, {column}]: {got_row[column]}"
    else:
        assert got.dtype == torch.int32, f"{name} is {got.dtype}"
        assert got.tolist() == expected, f"{name} is {got.tolist()}, expected {expected}"


def assert_schedules(metadata: Metadata, scenario: Scenario, expected: dict[str, Any]) -> None:
    """The paged-MQA schedule is dealt from unclipped lengths, FlashMLA's from clipped ones; EXTEND has neither."""
    sms, parts = scenario.config.paged_mqa_num_sms, scenario.config.flashmla_num_sm_parts
    if sms == 0 or scenario.mode is ForwardMode.EXTEND:
        assert metadata.paged_mqa_schedule_metadata is None
    else:
        visible = torch.tensor(expected["seqlens_expanded"], dtype=torch.int32)
        assert metadata.paged_mqa_schedule_metadata is not None
        assert torch.equal(metadata.paged_mqa_schedule_metadata, schedules.paged_mqa_schedule(visible, sms))
    if parts == 0 or scenario.mode is ForwardMode.EXTEND:
        assert metadata.flashmla_metadata is None
        assert metadata.flashmla_num_splits is None
    else:
        kept = torch.tensor(expected["nsa_cache_seqlens_int32"], dtype=torch.int32)
        words, num_splits = schedules.flashmla_schedule(kept, parts)
        assert metadata.flashmla_metadata is not None
        assert metadata.flashmla_num_splits is not None
        assert torch.equal(metadata.flashmla_metadata[:, :7], words[:, :7])
        assert torch.equal(metadata.flashmla_num_splits, num_splits)


def check(scenario: Scenario) -> None:
    """Run the reference and compare every field; its inputs must come back unchanged."""
    pool = make_pool(scenario)
    batch = make_batch(scenario)
    req_to_token = pool_to_tensor(pool, scenario)
    inputs = [req_to_token, batch.seq_lens, batch.req_pool_indices, batch.extend_seq_lens, batch.extend_prefix_lens]
    inputs += [batch.spec_info.accept_length] if batch.spec_info is not None else []
    copies = [None if tensor is None else tensor.clone() for tensor in inputs]

    metadata = compute_metadata(scenario.config, req_to_token, batch, scenario.step, scenario.in_graph)

    expected = brute_force(scenario, pool)
    width, page_size = expected["max_seq_len_k"], scenario.config.page_size
    for field in dataclasses.fields(Metadata):
        if field.name.startswith(("paged_mqa", "flashmla")):
            continue
        columns = (width + page_size - 1) // page_size if field.name == "real_page_table" else width
        assert_equals(field.name, getattr(metadata, field.name), expected.get(field.name), columns)
    assert_schedules(metadata, scenario, expected)
    for tensor, copy in zip(inputs, copies, strict=True):
        assert tensor is None or copy is None or torch.equal(tensor, copy)
    for case in cases_of(scenario, expected):
        event(case)


def cases_of(scenario: Scenario, expected: dict[str, Any]) -> list[str]:
    """The hard cases this scenario reaches, by name."""
    drafts, new = scenario.config.speculative_num_draft_tokens, [request.new for request in scenario.requests]
    ragged = scenario.mode is ForwardMode.DRAFT_EXTEND
    committed = new if ragged else [drafts] * len(new)
    draft_extends = (ForwardMode.DRAFT_EXTEND, ForwardMode.DRAFT_EXTEND_V2)
    shorter = [r.tokens < count - 1 for r, count in zip(scenario.requests, committed, strict=True)]
    width = scenario.config.max_context_len
    cases = {
        "empty batch": not new,
        "nothing accepted": ragged and bool(new) and not any(new),
        "accepts mixed": ragged and {0, drafts} <= set(new),
        "length clamped at 0": scenario.mode in draft_extends and any(shorter),
        "clipped by index_topk": expected["nsa_cache_seqlens_int32"] != expected["seqlens_expanded"],
        "last page partial": scenario.in_graph and width % scenario.config.page_size != 0,
        "prefix cached": "page_table_1_flattened" in expected,
        "no prefix": scenario.mode is ForwardMode.EXTEND and "page_table_1_flattened" not in expected,
        "pool row shared": len({request.pool_row for request in scenario.requests}) < len(new),
        "table full": any(n == width for n in expected["cache_seqlens_int32"]),
        "step advances": scenario.config.step_semantics is StepSemantics.ADVANCING and scenario.step > 0,
    }
    return [f"{scenario.mode.name} in_graph={scenario.in_graph}", *(name for name, seen in cases.items() if seen)]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(scenarios(in_graph=False))
def test_eager_equals_brute_force(scenario: Scenario) -> None:
    check(scenario)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(scenarios(in_graph=True, modes=GRAPH_MODES))
def test_graph_equals_brute_force(scenario: Scenario) -> None:
    check(scenario)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(scenarios(modes=[ForwardMode.DRAFT_EXTEND, ForwardMode.DRAFT_EXTEND_V2]))
def test_draft_extend_equals_brute_force(scenario: Scenario) -> None:
    check(scenario)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(scenarios(in_graph=False, modes=[ForwardMode.EXTEND]))
def test_extend_equals_brute_force(scenario: Scenario) -> None:
    check(scenario)


def test_hard_cases_are_reached() -> None:
    """The strategies above are worth nothing if they never draw the cases the contract rules on."""
    seen: Counter[str] = Counter()

    def collect(scenario: Scenario) -> None:
        seen.update(cases_of(scenario, brute_force(scenario, make_pool(scenario))))

    profile = settings(deadline=None, max_examples=150, derandomize=True, database=None)
    profile(given(scenarios(in_graph=False))(collect))()
    profile(given(scenarios(in_graph=True, modes=GRAPH_MODES))(collect))()
    profile(given(scenarios(in_graph=False, modes=[ForwardMode.EXTEND]))(collect))()
    profile(given(scenarios(modes=[ForwardMode.DRAFT_EXTEND, ForwardMode.DRAFT_EXTEND_V2]))(collect))()
    modes = {f"{mode.name} in_graph={graph}" for mode in GRAPH_MODES for graph in (False, True)}
    named = {
        "empty batch", "nothing accepted", "accepts mixed", "length clamped at 0", "clipped by index_topk",
        "last page partial", "prefix cached", "no prefix", "pool row shared", "table full", "step advances",
    }  # fmt: skip
    assert (modes | named | {"EXTEND in_graph=False"}) <= set(seen), seen
