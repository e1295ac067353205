"""The engine's host state by brute force: whose page is where, what is dead, and the same bytes on every machine."""

from __future__ import annotations

import hashlib
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_oracle.harness.scenarios.batch import Batch
from nsa_oracle.harness.scenarios.scales import LARGE, SMALL
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Event, Finish, Join, Remap, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Inputs, Mirror, Order, PageLayout, Reuse, Setup
from nsa_oracle.harness.scenarios.strategies import scenarios
from nsa_oracle.harness.scenarios.world import World
from nsa_oracle.reference.types import ForwardMode
from tests.support.metadata_cases import SIZES

POISON = 0x5A5A5A5A
DECODE, DRAFT_EXTEND, EXTEND = ForwardMode.DECODE, ForwardMode.DRAFT_EXTEND, ForwardMode.EXTEND
DRAFTING = (DECODE, ForwardMode.IDLE, ForwardMode.TARGET_VERIFY)

small_scenarios = scenarios(SMALL)


def setup(**changes: object) -> Setup:
    return Setup.model_validate(SIZES | changes)


def states(scenario: Scenario) -> list[tuple[World, Event, Batch | None]]:
    """The (one) world after each event, and what the event sent."""
    world = World(scenario, POISON)
    return [(world, event, batch) for event in scenario.events for batch in [world.apply(event)]]


@settings(max_examples=80, deadline=None)
@given(small_scenarios)
def test_invariants_hold_after_every_event(scenario: Scenario) -> None:
    world = World(scenario, POISON)
    check(world)
    for event in scenario.events:
        batch = world.apply(event)
        check(world)
        if batch is not None:
            check_batch(world, event, batch)


def check(world: World) -> None:
    sizes = world.scenario.setup
    rows = [r.pool_row for r in world.running]
    assert sorted(rows + world.free_rows) == list(range(sizes.pool_size)), "each row has one owner"
    held = {page for r in world.running for page in r.pages}
    count = sizes.held_pages
    assert sorted([*held, *world.pages.free]) == list(range(1, count + 1)), "pages are neither lost nor doubled; no 0"
    for request in world.running:
        check_request(world, request.pool_row, request.seq_len, request.pages)
    for row in world.free_rows:
        assert (world.req_to_token[row] == POISON).all(), "nothing is left of a request that ended"
    for one, other in combinations(world.running, 2):
        for place, page in enumerate(one.pages):
            if page in other.pages:
                assert other.pages[place] == page, "a page is shared at the same place"
                assert (place + 1) * sizes.page_size <= min(one.seq_len, other.seq_len), "a page being written is not"


def check_request(world: World, row: int, seq_len: int, pages: list[int]) -> None:
    sizes = world.scenario.setup
    assert 1 <= seq_len <= sizes.max_context_len
    assert len(set(pages)) == len(pages)
    covered = min(seq_len + sizes.draft_overshoot, sizes.max_context_len)
    for column, slot in enumerate(world.req_to_token[row].tolist()):
        if column < covered:
            assert slot == pages[column // sizes.page_size] * sizes.page_size + column % sizes.page_size
        else:
            assert slot == POISON


def check_batch(world: World, event: Event, batch: Batch) -> None:
    assert isinstance(event, Replay | Eager)
    sizes = world.scenario.setup
    assert batch.mode is (ForwardMode.IDLE if event.mode is DECODE and not batch.size else event.mode)
    by_row = {r.pool_row: r for r in world.running}
    wanted = set() if batch.mode is ForwardMode.IDLE else set(by_row)
    assert set(batch.pool_rows) == wanted
    assert len(batch.pool_rows) == len(wanted)
    requests = [by_row[row] for row in batch.pool_rows]
    assert batch.seq_lens == tuple(r.seq_len for r in requests)
    assert batch.accept_lengths == tuple(r.accept_length for r in requests)
    assert all(0 <= r.accept_length <= min(sizes.num_draft_tokens, r.seq_len) for r in requests)
    if batch.mode in DRAFTING:
        assert all(length <= sizes.max_seq_len for length in batch.seq_lens), "there is room for the drafts"
    match event.mirror:
        case Mirror.ABSENT:
            assert batch.seq_lens_cpu is None
        case Mirror.EQUAL:
            assert batch.seq_lens_cpu == batch.seq_lens
        case Mirror.STALE | Mirror.AHEAD:
            assert batch.seq_lens_cpu is not None
            assert all(a != b and a >= 0 for a, b in zip(batch.seq_lens_cpu, batch.seq_lens, strict=True))
    assert bool(batch.extend_lens) == (batch.mode is EXTEND and batch.size > 0)
    assert all(0 <= e <= s for e, s in zip(batch.extend_lens, batch.seq_lens, strict=False))
    joined = [r.pool_row for r in world.running]
    if event.order is Order.JOINED and wanted:
        assert list(batch.pool_rows) == joined
    if event.order is Order.REVERSED and wanted:
        assert list(batch.pool_rows) == joined[::-1]


def check_common_prefixes(world: World) -> None:
    """What a page holds depends on all tokens before it: requests share a page only behind the same pages."""
    for one, other in combinations(world.running, 2):
        common = {place for place, page in enumerate(one.pages) if page in other.pages}
        assert common == set(range(len(common))), f"{one.pages} and {other.pages}"


def test_remapped_prefix_leaves_no_page_behind_another_prefix() -> None:
    events = (
        Join(seq_len=8),
        Join(seq_len=8, prefix_of=0, prefix_pages=2),
        Join(seq_len=8),
        Remap(request=0, prefix_of=2, prefix_pages=1),
    )
    check_common_prefixes(states(Scenario(setup=setup(), events=events))[-1][0])


@settings(max_examples=40, deadline=None)
@given(small_scenarios)
def test_rows_and_pages_change_hands_only_when_given_up(scenario: Scenario) -> None:
    """A row passes on when its request ended, a page also when its request was re-mapped."""
    world = World(scenario, POISON)
    for event in scenario.events:
        before = [(r, r.pool_row, list(r.pages)) for r in world.running]
        world.apply(event)
        for request, row, pages in before:
            if any(request is r for r in world.running):
                assert request.pool_row == row
                kept = request.pages[: len(pages)]
                assert list(kept) == pages or isinstance(event, Remap)
            else:
                assert isinstance(event, Finish | Replay | Eager)
                assert row in world.free_rows


@settings(max_examples=25, deadline=None)
@given(scenarios(LARGE), st.sampled_from([0, POISON]))
def test_same_scenario_is_the_same_world(scenario: Scenario, poison: int) -> None:
    assert digest(scenario, poison) == digest(scenario.model_copy(update={"note": "x"}), poison)


def test_padding_is_what_engines_put_there() -> None:
    batch = Batch(DRAFT_EXTEND, (2,), (7,), None, (0,))
    assert batch.padded(3, 4) == Batch(DRAFT_EXTEND, (2, 0, 0), (7, 1, 1), None, (0, 1, 1))
    v2 = Batch(ForwardMode.DRAFT_EXTEND_V2, (2,), (7,), (6,), (3,))
    assert v2.padded(2, 4) == Batch(ForwardMode.DRAFT_EXTEND_V2, (2, 0), (7, 1), (6, 1), (3, 4))
    assert batch.padded(1, 4) == batch


@pytest.mark.parametrize(
    ("layout", "first", "second"),
    [
        (PageLayout.CONTIGUOUS, [1, 2], [3, 4]),
        (PageLayout.DESCENDING, [12, 11], [10, 9]),
        (PageLayout.INTERLEAVED, [1, 4], [7, 10]),
    ],
)
def test_page_layouts(layout: PageLayout, first: list[int], second: list[int]) -> None:
    events = (Join(seq_len=5), Join(seq_len=5))
    world = states(Scenario(setup=setup(page_layout=layout), events=events))[-1][0]
    assert [list(r.pages) for r in world.running] == [first, second]


def test_row_and_pages_freed_last_are_reused_first() -> None:
    events = (Join(seq_len=5), Join(seq_len=9), Finish(request=0), Join(seq_len=2))
    world = states(Scenario(setup=setup(), events=events))[-1][0]
    assert [(r.pool_row, list(r.pages)) for r in world.running] == [(1, [3, 4, 5]), (0, [1])]
    assert world.req_to_token[0, :5].tolist() == [4, 5, 6, 7, POISON]  # 2 tokens, 2 drafts


def after_a_finish(reuse: Reuse, seed: int = 0) -> World:
    """Two of three rows are in use; the first request ends, and two join."""
    events = (Join(seq_len=5), Join(seq_len=9), Finish(request=0), Join(seq_len=5), Join(seq_len=5))
    return states(Scenario(setup=setup(reuse=reuse), seed=seed, events=events))[-1][0]


def test_in_a_queue_the_same_row_gets_other_pages() -> None:
    world = after_a_finish(Reuse.QUEUE)
    assert [(r.pool_row, list(r.pages)) for r in world.running] == [(1, [3, 4, 5]), (0, [6, 7]), (2, [8, 9])]
    again = World(world.scenario, POISON)
    for event in (Join(seq_len=13), Join(seq_len=13), Finish(request=0), Join(seq_len=13), Join(seq_len=13)):
        again.apply(event)
    assert [list(r.pages) for r in again.running] == [[5, 6, 7, 8], [9, 10, 11, 12], [1, 2, 3, 4]], (
        "first given up, first back"
    )


def test_shuffled_rows_and_pages_come_back_in_any_order_that_the_seed_decides() -> None:
    found = {tuple((r.pool_row, *r.pages) for r in after_a_finish(Reuse.SHUFFLED, seed).running) for seed in range(20)}
    assert len(found) > 10
    assert {rows[1][0] for rows in found} == {0, 2}
    one, other = (after_a_finish(Reuse.SHUFFLED, 3) for _ in range(2))
    assert (one.req_to_token == other.req_to_token).all()


def test_several_requests_finish_one_by_one() -> None:
    def left(request: int, count: int) -> list[int]:
        joins = tuple(Join(seq_len=length) for length in (5, 6, 7, 8))
        scenario = Scenario(setup=setup(pool_size=4), events=(*joins, Finish(request=request, count=count)))
        return [r.seq_len for r in states(scenario)[-1][0].running]

    assert left(2, count=1) == [5, 6, 8]
    assert left(2, count=2) == [5, 6]
    assert left(2, count=3) == [6]  # of two, number 2 is number 0
    assert left(1, count=4) == left(0, count=9) == []


def test_rows_of_a_far_pool_are_used_from_its_far_end() -> None:
    far = setup(pool_size=3, inputs=Inputs(far_req_to_token=True))
    world = states(Scenario(setup=far, events=(Join(seq_len=5), Join(seq_len=2))))[-1][0]
    assert [r.pool_row for r in world.running] == [2, 1]


def test_prefix_is_shared_in_whole_pages_only() -> None:
    events = (Join(seq_len=7), Join(seq_len=12, prefix_of=0, prefix_pages=3), Finish(request=0), Join(seq_len=3))
    world = states(Scenario(setup=setup(), events=events))[-1][0]
    # The first had pages 1, 2, 3, of which one was full; only the other two are free again.
    assert [list(r.pages) for r in world.running] == [[1, 4, 5, 6], [2, 3]]


def test_lengths_stop_at_the_context_and_the_request_ends_before_the_next_draft() -> None:
    events = (
        Join(seq_len=14),
        Accept(accept_lengths=(2,)),
        Replay(mode=DRAFT_EXTEND),
        Accept(accept_lengths=(2,)),
        Replay(mode=DRAFT_EXTEND),
        Replay(mode=DECODE),
    )
    batches = [batch for _, _, batch in states(Scenario(setup=setup(), events=events)) if batch is not None]
    assert [(b.seq_lens, b.accept_lengths) for b in batches] == [((16,), (2,)), ((16,), (0,)), ((), ())]
    assert batches[-1].mode is ForwardMode.IDLE


def test_lagging_host_believes_the_length_before_the_last_accept() -> None:
    events = (Join(seq_len=5), Accept(accept_lengths=(2,)), Eager(mode=DECODE, mirror=Mirror.STALE))
    batch = states(Scenario(setup=setup(), events=events))[-1][2]
    assert batch is not None
    assert (batch.seq_lens, batch.seq_lens_cpu) == ((7,), (5,))


@pytest.mark.parametrize(("accepted", "hoped"), [(0, 7), (1, 7), (2, 9)])
def test_hopeful_host_believes_that_every_draft_was_accepted(accepted: int, hoped: int) -> None:
    events = (Join(seq_len=5), Accept(accept_lengths=(accepted,)), Eager(mode=DECODE, mirror=Mirror.AHEAD))
    batch = states(Scenario(setup=setup(), events=events))[-1][2]
    assert batch is not None
    assert (batch.seq_lens, batch.seq_lens_cpu) == ((5 + accepted,), (hoped,))


def test_no_host_believes_in_tokens_beyond_the_context() -> None:
    sizes = setup()
    events = (Join(seq_len=sizes.max_seq_len), Accept(accept_lengths=(2,)), Eager(mode=EXTEND, mirror=Mirror.AHEAD))
    batch = states(Scenario(setup=sizes, events=events))[-1][2]
    assert batch is not None
    assert batch.seq_lens == (sizes.max_context_len,)
    assert batch.seq_lens_cpu == (sizes.max_context_len - 1,)


def test_full_pool_and_empty_batch_change_nothing() -> None:
    events: tuple[Event, ...] = (
        Finish(request=3),
        Remap(request=0, prefix_of=1),
        Accept(accept_lengths=(1,)),
        *(Join(seq_len=4) for _ in range(5)),
        Capture(mode=DECODE, buckets=(1,)),
    )
    world = states(Scenario(setup=setup(), events=events))[-1][0]
    assert len(world.running) == 3


TIGHT = {"page_size": 2, "max_context_len": 12, "pool_size": 3, "num_draft_tokens": 2}


def test_a_request_that_finds_too_few_pages_does_not_join() -> None:
    sizes = setup(**TIGHT, cache_pages=7)
    events = (Join(seq_len=9), Join(seq_len=3), Join(seq_len=9, prefix_of=0, prefix_pages=6))
    world = states(Scenario(setup=sizes, events=events))[-1][0]
    check(world)
    assert len(world.running) == 1, "1 page is free, and 3 and 2 would be needed"
    more = setup(**TIGHT, cache_pages=8)
    (first, second) = states(Scenario(setup=more, events=events))[-1][0].running
    assert second.seq_len == 9
    assert second.pages[:4] == first.pages[:4]


def test_a_request_that_cannot_grow_finishes() -> None:
    sizes = setup(**TIGHT, cache_pages=7)
    joins = (Join(seq_len=5), Join(seq_len=2))
    world = states(Scenario(setup=sizes, events=(*joins, Accept(accept_lengths=(0, 1)))))[-1][0]
    assert [request.seq_len for request in world.running] == [5, 3]
    world = states(Scenario(setup=sizes, events=(*joins, Accept(accept_lengths=(2, 2)))))[-1][0]
    check(world)
    assert [request.seq_len for request in world.running] == [7]
    assert len(world.pages.free) == 2


def test_a_prefix_is_not_replaced_without_pages_for_what_is_behind() -> None:
    sizes = setup(**TIGHT, cache_pages=6)
    joins = (Join(seq_len=4), Join(seq_len=4, prefix_of=0, prefix_pages=2), Join(seq_len=2))
    remap = Remap(request=1, prefix_of=2, prefix_pages=1)
    world = states(Scenario(setup=sizes, events=(*joins, remap)))[-1][0]
    check(world)
    assert world.running[1].pages[0] == world.running[0].pages[0]


def digest(scenario: Scenario, poison: int = POISON) -> str:
    """Of every byte of ``req_to_token`` after each event, and of every number of each batch."""
    sha = hashlib.sha256()
    world = World(scenario, poison)
    for event in scenario.events:
        batch = world.apply(event)
        sha.update(world.req_to_token.astype("<i4").tobytes())
        if batch is not None:
            numbers = (batch.pool_rows, batch.seq_lens, batch.seq_lens_cpu, batch.accept_lengths, batch.extend_lens)
            sha.update(f"{batch.mode.value} {numbers}".encode())
    return sha.hexdigest()


def life_of_a_server(seed: int, **changes: object) -> Scenario:
    """Every event, in every order and mirror, twice around a pool of 5."""
    one_round: list[Event] = [
        Join(seq_len=37),
        Join(seq_len=64, prefix_of=0, prefix_pages=2),
        Replay(mode=DECODE, order=Order.SHUFFLED),
        Accept(accept_lengths=(3, 0, 1)),
        Replay(mode=DRAFT_EXTEND, order=Order.REVERSED, mirror=Mirror.STALE),
        Join(seq_len=1),
        Remap(request=2, prefix_of=1, prefix_pages=1),
        Eager(mode=EXTEND, order=Order.SHUFFLED, mirror=Mirror.STALE, extend_lens=(5, 64)),
        Finish(request=1),
        Replay(mode=ForwardMode.TARGET_VERIFY, mirror=Mirror.ABSENT, order=Order.SHUFFLED),
    ]
    sizes = {"page_size": 16, "max_context_len": 100, "num_steps": 3, "num_draft_tokens": 4, "pool_size": 5}
    return Scenario(setup=setup(**(sizes | changes)), seed=seed, events=(*one_round, *one_round))


COMMITTED = {
    "contiguous": (life_of_a_server(0), "8182e6b07a120181b8505c1aacc46391c090b07da6dec653e652464c27567b10"),
    "shuffled": (
        life_of_a_server(2**64 - 1, page_layout="shuffled"),
        "cbbeac7af505fa1549bf4db515d9123e73f3f3184d6c3e6c490aae7dc77fa0f4",
    ),
    "page size 1": (
        life_of_a_server(12345, page_size=1, page_layout="shuffled"),
        "e37d16c38ec013e6fd8c9ea67b8aa8b5faaead33fc77150a2e7d7da7a567df38",
    ),
    "pages reused last": (
        life_of_a_server(7, reuse="queue"),
        "c44727157cc4118a79f804a306311c1e6d0b1dea6a9471c9433d378c81c9bafc",
    ),
    "rows and pages reused in any order": (
        life_of_a_server(8, reuse="shuffled"),
        "063707f72833b4bb07140533579cf42cd3c86eb91f42beb8270ac219f0fd9fe1",
    ),
}


@pytest.mark.parametrize("name", COMMITTED)
def test_saved_case_means_the_same_bytes_everywhere(name: str) -> None:
    """If this fails, every saved case means something else: change ``SCHEMA_VERSION`` with it."""
    scenario, committed = COMMITTED[name]
    assert digest(scenario) == committed
