"""Boundary classes that take two calls, or a row of numbers, to see: cases that visit them, and cases that do not."""

from __future__ import annotations

import pytest

from nsa_oracle.harness.scenarios.classes import IN_COMPANY, LONG_PREFILL, PLAIN_PREFILL, PRODUCTION_INDEX
from nsa_oracle.harness.scenarios.coverage import classes_of
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Event, Finish, Join, Remap, Replay, SetLengths
from nsa_oracle.harness.scenarios.setup import Inputs, Layer, Mirror, Order, Reuse
from nsa_oracle.reference.types import ForwardMode
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND, EXTEND, VERIFY, case

GRAPH = Capture(mode=DECODE, buckets=(2,))
REPLAY, CALL = Replay(mode=DECODE), Eager(mode=VERIFY)
DRAFTS = (Capture(mode=DRAFT_EXTEND, buckets=(2,)), Join(seq_len=3), Join(seq_len=5))


def visited(*events: Event, **setup: object) -> set[str]:
    return classes_of(case(*events, **setup))


@pytest.mark.parametrize("between", [(Finish(request=0), Join(seq_len=5)), (Remap(request=1, prefix_of=0),)])
def test_same_batch_on_other_pages(between: tuple[Event, ...]) -> None:
    first = (GRAPH, Join(seq_len=5), *([Join(seq_len=5)] if len(between) == 1 else []), REPLAY)
    name = "same batch on other pages"
    assert name in visited(*first, *between, REPLAY, reuse=Reuse.QUEUE)
    assert name not in visited(*first, REPLAY, reuse=Reuse.QUEUE), "the same pages"
    assert name not in visited(*first, *between, CALL, reuse=Reuse.QUEUE), "another call"
    assert name not in visited(*first, *between, Join(seq_len=1), REPLAY, reuse=Reuse.QUEUE), "another batch"


def test_same_batch_eagerly_on_other_pages() -> None:
    name, moved = "same batch on other pages, eager", (Finish(request=0), Join(seq_len=5))
    assert name in visited(Join(seq_len=5), CALL, *moved, CALL, reuse=Reuse.QUEUE)
    assert name not in visited(Join(seq_len=5), CALL, *moved, CALL), "the same pages"
    assert name not in visited(GRAPH, Join(seq_len=5), REPLAY, *moved, REPLAY, reuse=Reuse.QUEUE), "in a graph"


def test_the_same_pages_in_the_same_order_are_not_other_pages() -> None:
    events = (GRAPH, Join(seq_len=5), REPLAY, Finish(request=0), Join(seq_len=5), REPLAY)
    assert "same batch on other pages" not in visited(*events)


def test_row_grown_on_other_pages() -> None:
    def grown(length: int, reuse: Reuse) -> bool:
        events = (GRAPH, Join(seq_len=5), REPLAY, Finish(request=0), Join(seq_len=length), REPLAY)
        return "row grown on other pages" in visited(*events, reuse=reuse)

    assert grown(6, Reuse.QUEUE)
    assert not grown(5, Reuse.QUEUE)
    assert not grown(6, Reuse.STACK)


def test_eager_after_the_longest_left() -> None:
    joins = (Join(seq_len=9), Join(seq_len=4))
    name = "eager after the longest left"
    assert name in visited(*joins, CALL, Finish(request=0), CALL)
    assert name not in visited(*joins, CALL, Finish(request=1), CALL)
    assert name not in visited(*joins, CALL, Finish(request=0), Eager(mode=DECODE))
    assert name not in visited(*joins, CALL, Finish(request=0, count=2), CALL), "nobody is left"


def test_small_after_large_in_one_bucket() -> None:
    name, large = "small after large in one bucket", (Join(seq_len=5), Join(seq_len=5), REPLAY)
    assert name in visited(GRAPH, *large, Finish(request=0), REPLAY)
    assert name not in visited(Capture(mode=DECODE, buckets=(1, 2)), *large, Finish(request=0), REPLAY)


def test_smaller_draft_extend_with_other_accepts() -> None:
    name, replay = "smaller draft extend, other accepts", Replay(mode=DRAFT_EXTEND)
    accepts, others = Accept(accept_lengths=(2, 1)), Accept(accept_lengths=(0,))
    assert name in visited(*DRAFTS, accepts, replay, Finish(request=1), others, replay)
    assert name in visited(*DRAFTS, accepts, replay, Finish(request=0), replay), "those of the other request"
    assert name not in visited(*DRAFTS, accepts, replay, Finish(request=1), replay)
    assert name not in visited(*DRAFTS, accepts, replay, others, replay)


def test_same_lengths_with_other_accepts() -> None:
    name, replay = "same lengths, other accepts", Replay(mode=DRAFT_EXTEND)
    others = SetLengths(pool_rows=(0, 1), seq_lens=(3, 5), accept_lengths=(2, 1))
    assert name in visited(*DRAFTS, replay, others, replay)
    assert name not in visited(*DRAFTS, replay, Accept(accept_lengths=(2, 1)), replay), "the lengths grow with them"
    none = (Accept(accept_lengths=(0,)), replay)
    assert name not in visited(*DRAFTS, *none, *none), "the same accepts"
    assert name not in visited(*DRAFTS, replay, others, Eager(mode=DRAFT_EXTEND)), "another call"


def test_other_pages_between_the_same_ends() -> None:
    name, size = "other pages between the same ends", {"page_size": 2, "max_context_len": 12}
    first = (GRAPH, Join(seq_len=7), Join(seq_len=7, prefix_of=0), REPLAY)
    assert name in visited(*first, Remap(request=1, prefix_of=0, prefix_pages=2), REPLAY, **size)
    assert name in visited(*first, Remap(request=1, prefix_of=0, prefix_pages=3), REPLAY, **size)
    assert name not in visited(*first, Remap(request=1, prefix_of=0), REPLAY, **size), "the same pages"
    apart = (GRAPH, Join(seq_len=7), Join(seq_len=7), REPLAY)
    assert name not in visited(*apart, Remap(request=1, prefix_of=0, prefix_pages=2), REPLAY, **size), "another first"


def test_a_length_grown_within_its_page() -> None:
    name, size = "a length grown within its page", {"page_size": 4, "max_context_len": 16}
    first = (GRAPH, Join(seq_len=9), Join(seq_len=5), REPLAY)
    assert name in visited(*first, Accept(accept_lengths=(0, 1)), REPLAY, **size)
    assert name not in visited(*first, Accept(accept_lengths=(1, 0)), REPLAY, **size), "the longest grows"
    tight = (GRAPH, Join(seq_len=9), Join(seq_len=8), REPLAY)
    assert name not in visited(*tight, Accept(accept_lengths=(0, 1)), REPLAY, page_size=1, max_context_len=16)


def test_more_replays_of_one_graph_than_a_few_bits_count() -> None:
    name, joined = "more than 128 replays of one graph", (GRAPH, Join(seq_len=5))
    assert name in visited(*joined, *[REPLAY] * 129)
    assert name not in visited(*joined, *[REPLAY] * 128)
    assert name not in visited(*joined, *[CALL] * 129), "in a graph"


def test_prefills() -> None:
    joins = (Join(seq_len=3), Join(seq_len=9))
    whole = visited(*joins, Eager(mode=EXTEND, extend_lens=(16,)))
    assert {"prefill from the first token", "prefill of several requests", "prefill beyond K"} <= whole
    assert {"prefill within K", "K between the lengths"} <= whole
    assert "cached prefix extended" not in whole
    one = visited(Join(seq_len=9), Eager(mode=EXTEND, extend_lens=(2,)))
    assert {"cached prefix extended", "prefill beyond K"} <= one
    assert not {"prefill from the first token", "prefill of several requests", "prefill within K"} & one
    assert not any("prefill" in name for name in visited(Eager(mode=EXTEND)))


def segments(length: int, **changes: object) -> set[str]:
    sizes = {"max_context_len": 400, "num_steps": 4, "index_topk": 128, "step_semantics": "advancing"}
    joined = (GRAPH, Join(seq_len=length), REPLAY)
    return {name for name in visited(*joined, **(sizes | changes)) if "segment" in name or "block" in name}


@pytest.mark.parametrize(
    ("parts", "name", "unit"),
    [("paged_mqa_num_sms", "a paged-MQA segment", 256), ("flashmla_num_sm_parts", "a FlashMLA block", 64)],
)
def test_steps_that_cross_a_segment(parts: str, name: str, unit: int) -> None:
    """The steps of a call see one token more, two more, and so on."""
    both = {f"steps cross {name}", f"N >= 4 steps cross {name}"}
    assert segments(unit - 1, **{parts: 3}) >= both
    assert segments(unit - 3, **{parts: 3}) >= both
    for length in (unit, unit - 4):
        assert not segments(length, **{parts: 3}) & both
    assert not segments(unit - 1) & both, "no schedule"
    assert not segments(unit - 1, **{parts: 3}, step_semantics="shared") & both
    assert segments(unit - 1, **{parts: 3}, num_steps=2) == {f"steps cross {name}"}


def test_what_is_attended_to_ends_at_k() -> None:
    """No step needs another FlashMLA block beyond K, however long the request is."""
    assert segments(127, flashmla_num_sm_parts=3) == set()
    assert segments(127, flashmla_num_sm_parts=3, index_topk=200) != set()


def test_many_steps_at_once_over_several_segments() -> None:
    (name,) = segments(257, paged_mqa_num_sms=3)
    assert name == "N >= 4 multi-step replay of several paged-MQA segments"
    assert segments(257, paged_mqa_num_sms=3, step_semantics="shared") == {name}
    for changes in ({"drive": "single_step"}, {"num_steps": 3}, {"paged_mqa_num_sms": 0}):
        assert segments(257, **({"paged_mqa_num_sms": 3} | changes)) == set()
    assert segments(256, paged_mqa_num_sms=3) == set()


def test_prefill_without_a_new_token() -> None:
    joins, name = (Join(seq_len=3), Join(seq_len=9)), "prefill without a new token"
    assert name in visited(*joins, Eager(mode=EXTEND, extend_lens=(0, 2)))
    assert name not in visited(*joins, Eager(mode=EXTEND, extend_lens=(1, 2)))
    assert name not in visited(*joins, Eager(mode=EXTEND, extend_lens=(0,))), "of no request"


def test_prefill_without_a_new_token_between_others() -> None:
    joins, name = [Join(seq_len=length) for length in (3, 9, 5)], "prefill without a new token between others"
    for new in ((2, 0, 1), (1, 0)):  # repeated for the third: 1, 0, 1
        assert name in visited(*joins, Eager(mode=EXTEND, extend_lens=new))
    for new in ((0, 2, 1), (2, 1, 0), (0, 2, 0), (1, 2, 1), (0,)):
        assert name not in visited(*joins, Eager(mode=EXTEND, extend_lens=new))


def test_host_mirror_in_another_order() -> None:
    joins, name = [Join(seq_len=length) for length in (9, 1, 5, 9)], "host mirror in another order"

    def told(*mirror: int, kind: Mirror = Mirror.STALE) -> set[str]:
        replay = Replay(mode=DECODE, bucket=4, mirror=kind, seq_lens_cpu=mirror)
        return visited(Capture(mode=DECODE, buckets=(4,)), *joins, replay, pool_size=4)

    assert name in told(9, 5, 1, 9)
    for mirror in ((9, 1, 5, 9), (1, 9, 5, 9), (9, 5, 2, 9)):
        assert name not in told(*mirror)
    assert name not in told(9, 5, 1, 9, kind=Mirror.EQUAL)


def test_prefill_of_cached_tokens_alone() -> None:
    joins, name = (Join(seq_len=3), Join(seq_len=9)), "prefill of cached tokens alone"
    assert name in visited(*joins, Eager(mode=EXTEND, extend_lens=(0,)))
    assert name not in visited(*joins, Eager(mode=EXTEND, extend_lens=(0, 2)))
    assert name not in visited(Eager(mode=EXTEND, extend_lens=(0,))), "an empty batch"


def test_idle_rank_after_several_segments() -> None:
    name, idle = "graph idle after several segments", (Finish(request=0), REPLAY)
    sizes = {"max_context_len": 600, "paged_mqa_num_sms": 3}
    assert name in visited(GRAPH, Join(seq_len=257), REPLAY, *idle, **sizes)
    assert name not in visited(GRAPH, Join(seq_len=256), REPLAY, *idle, **sizes), "one segment, as padding has"
    assert name not in visited(GRAPH, Join(seq_len=257), *idle, **sizes), "the graph served no request"
    assert name not in visited(GRAPH, Join(seq_len=257), REPLAY, *idle, REPLAY, max_context_len=600), "no schedule"
    served = (Join(seq_len=257), REPLAY, Finish(request=0), Join(seq_len=5), REPLAY)
    assert name not in visited(GRAPH, *served, *idle, **sizes), "a short batch in between"


def test_prefill_mixed_with_decodes() -> None:
    joins, name = (Join(seq_len=3), Join(seq_len=9)), "prefill mixed with decodes"
    assert name in visited(*joins, Eager(mode=EXTEND, extend_lens=(1, 2)))
    assert name in visited(*joins, Eager(mode=EXTEND, extend_lens=(3, 1)))
    assert name not in visited(*joins, Eager(mode=EXTEND, extend_lens=(1, 1))), "decodes alone"
    assert name not in visited(*joins, Eager(mode=EXTEND, extend_lens=(2, 2))), "prefills alone"
    assert name not in visited(Join(seq_len=1), Join(seq_len=9), Eager(mode=EXTEND, extend_lens=(1, 2))), "no prefix"


def test_serving_cycle() -> None:
    verify = ForwardMode.TARGET_VERIFY
    graphs = (GRAPH, Capture(mode=verify, buckets=(2,)), Join(seq_len=5))
    name = "drafts behind a verification"
    assert name in visited(*graphs, Replay(mode=verify), REPLAY)
    assert name not in visited(*graphs, REPLAY, Replay(mode=verify))
    prefill = Eager(mode=EXTEND)
    assert "prefill between replays" in visited(*graphs, REPLAY, prefill, REPLAY)
    assert "prefill between replays" not in visited(*graphs, REPLAY, prefill, Replay(mode=verify))


def test_company() -> None:
    twice = Replay(mode=DECODE, preparations=2)
    assert "prepared twice" in visited(GRAPH, Join(seq_len=5), twice)
    assert "prepared twice" not in visited(GRAPH, twice, Join(seq_len=5), REPLAY), "an empty batch"
    assert "second backend" in visited(GRAPH, Join(seq_len=5), REPLAY, neighbour_context_len=70)
    assert "second backend" not in visited(GRAPH, Join(seq_len=5), REPLAY)
    alike = visited(GRAPH, Join(seq_len=5), REPLAY, max_context_len=70, neighbour_context_len=70)
    assert "second backend, alike" in alike
    assert "second backend" not in alike


def test_ordinary_numbers_in_an_fp8_cache() -> None:
    name, fp8, random = "ordinary numbers in an FP8 cache", {"kv_cache_dtype": "fp8"}, {"regime": "random"}
    assert name in visited(Join(seq_len=5), CALL, layer={**fp8, **random})
    assert name not in visited(Join(seq_len=5), CALL, layer=fp8)
    assert name not in visited(Join(seq_len=5), CALL, layer=random)


def test_padding_of_length_0() -> None:
    name = "padding of length 0"
    assert name in visited(GRAPH, Join(seq_len=5), REPLAY, padding_len=0)
    assert name not in visited(GRAPH, Join(seq_len=5), REPLAY)
    assert name not in visited(GRAPH, Join(seq_len=5, count=2), REPLAY, padding_len=0), "nothing pads the batch"


def test_more_tokens_than_slots() -> None:
    joins = (
        Join(seq_len=16),
        Join(seq_len=16, prefix_of=0, prefix_pages=9),
        Join(seq_len=16, prefix_of=0, prefix_pages=9),
    )
    sizes = {"page_size": 1, "max_context_len": 18, "pool_size": 3}
    assert "more tokens than slots" in visited(*joins, CALL, cache_pages=40, **sizes)
    assert "more tokens than slots" not in visited(*joins, CALL, **sizes)
    assert "more tokens than slots" not in visited(*joins[:2], CALL, cache_pages=40, **sizes)


def test_order_of_reuse_counts_once_something_is_reused() -> None:
    events = (Join(seq_len=5), CALL, Finish(request=0))
    assert not {name for name in visited(*events, reuse=Reuse.QUEUE) if name.startswith("reuse")}
    assert "reuse queue" in visited(*events, Join(seq_len=1), reuse=Reuse.QUEUE)


def test_modes_count_with_several_steps_if_they_have_work() -> None:
    assert "replay DECODE, N > 1" in visited(GRAPH, Join(seq_len=1), REPLAY, num_steps=2)
    assert "replay DECODE, N > 1" not in visited(GRAPH, Join(seq_len=1), REPLAY)
    assert "replay DECODE, N > 1" not in visited(GRAPH, REPLAY, num_steps=2)


def test_layer_visits_classes_of_its_own() -> None:
    events = (Join(seq_len=9), Eager(mode=EXTEND, extend_lens=(2,)))
    assert "layer: cached prefix extended" in visited(*events, layer=Layer())
    assert not any(name.startswith("layer: ") for name in visited(*events))


def test_plain_prefill_is_of_several_requests_and_strided() -> None:
    joins, prefill, strided = (Join(seq_len=3), Join(seq_len=9)), Eager(mode=EXTEND), Inputs(strided=True)
    assert PLAIN_PREFILL in visited(*joins, prefill, inputs=strided)
    assert PLAIN_PREFILL not in visited(*joins, prefill)
    assert PLAIN_PREFILL not in visited(joins[0], prefill, inputs=strided)
    switched = case(*joins, prefill, inputs=strided).model_copy(update={"optimizations": ("precompute",)})
    assert PLAIN_PREFILL not in classes_of(switched)


@pytest.mark.parametrize(("others", "is_long"), [(1, False), (2, True)])
def test_long_prefill_counts_the_rows_of_all_requests(others: int, is_long: bool) -> None:
    events = (Join(seq_len=200), Join(seq_len=9), Eager(mode=EXTEND, extend_lens=(127, others), order=Order.JOINED))
    assert (LONG_PREFILL in visited(*events, layer=Layer(), max_context_len=261, pool_size=2)) is is_long
    assert LONG_PREFILL not in visited(*events, max_context_len=261, pool_size=2)


def test_production_index_sizes_are_those_of_keys_and_pages() -> None:
    events, layer = (Join(seq_len=9), CALL), Layer(index_n_heads=64, index_head_dim=128)
    assert PRODUCTION_INDEX in visited(*events, layer=layer, page_size=64)
    assert PRODUCTION_INDEX not in visited(*events, layer=layer, page_size=32)
    assert PRODUCTION_INDEX not in visited(*events, layer=Layer(index_n_heads=32, index_head_dim=128), page_size=64)


def test_each_kind_of_call_beside_a_second_backend() -> None:
    def seen(*events: Event, **setup: int) -> set[str]:
        return visited(*events, **setup) & set(IN_COMPANY)

    served, alike = (GRAPH, Join(seq_len=5)), {"max_context_len": 70, "neighbour_context_len": 70}
    assert seen(*served, REPLAY, **alike) == {"second backend, DECODE replay"}
    assert seen(*served, CALL, **alike) == {"second backend, TARGET_VERIFY eagerly"}
    assert seen(Eager(mode=ForwardMode.IDLE), **alike) == {"second backend, IDLE eagerly"}
    assert seen(*served, REPLAY, CALL) == set(), "alone"
    idle = "second backend, idle replay"
    assert idle in visited(*served, REPLAY, Finish(request=0), REPLAY, **alike)
    assert idle not in visited(*served, REPLAY, **alike)
    assert idle not in visited(GRAPH, REPLAY)
    assert idle not in visited(Capture(mode=VERIFY, buckets=(2,)), Replay(mode=VERIFY), **alike), "of another mode"
