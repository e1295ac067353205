"""Situations of a call that comes again when something, or one thing alone, has changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from nsa_oracle.harness.scenarios.classes import MANY_REPLAYS
from nsa_oracle.harness.scenarios.scenario import Eager, Remap, SetLengths
from nsa_oracle.harness.scenarios.script import OF_ACCEPTED, Script
from nsa_oracle.harness.scenarios.setup import Mirror, Order
from nsa_oracle.reference.types import ForwardMode

_SAME_EACH_TIME = (Order.JOINED, Order.REVERSED)


def _same_batch_on_other_pages(script: Script, eager: bool = False) -> None:
    script.fill()
    order = _same_order(script)
    call = script.eager(script.eager_mode(), order=order) if eager else script.call(order)
    running = script.running
    moving = script.pick(("all", "last", "first pages"))
    if moving == "first pages" and len(running) > 1 and running[0].seq_len >= script.setup.page_size:
        script.add(Remap(request=len(running) - 1, prefix_of=0, prefix_pages=1))
    else:
        count = len(running) if moving == "all" else 1
        lengths = [request.seq_len for request in running[-count:]]
        script.finish(len(running) - count, count)  # each time, the next one has that index
        for length in lengths:
            script.join(length)
    script.again(call)


def _same_order(script: Script) -> Order:
    wanted = [order for order in script.goal.of("order") if order in _SAME_EACH_TIME]
    return Order(script.pick(wanted or _SAME_EACH_TIME))


def _row_grown_on_other_pages(script: Script) -> None:
    limit = script.setup.max_seq_len
    script.fill()
    last = script.running[-1].seq_len
    if last == limit and limit > 1:
        script.finish(len(script.running) - 1)
        last = script.pick((1, limit // 2, limit - 1))
        script.join(last)
    call = script.call()
    script.finish(len(script.running) - 1)
    script.join(script.pick((last + 1, limit, (last + limit + 1) // 2)))
    script.again(call)


def _longest_leaves(script: Script) -> None:
    for _ in range(script.most - 1 - len(script.running)):
        script.join(min(script.first_length(), script.setup.max_seq_len - 1))
    script.join(max((request.seq_len for request in script.running), default=0) + script.pick((1, 70)))
    mode = script.eager_mode()
    script.accept_before(mode)
    call = script.eager(mode)
    lengths = [request.seq_len for request in script.running]
    if lengths:
        script.finish(lengths.index(max(lengths)))
    script.again(call)


def _small_after_large(script: Script) -> None:
    mode = script.graph_mode()
    if mode is None:
        return
    script.fill(least=2)
    call = script.replay(mode)
    script.finish(script.any_running(), script.pick(range(1, max(2, len(script.running)))))
    script.again(call)


def _small_large_small(script: Script) -> None:
    mode = script.graph_mode()
    if mode is None:
        return
    script.fill(1)
    for bucket in {1, script.most}:
        script.graph(mode, bucket, exact=True)
    script.replay(mode)
    script.fill(least=2)
    script.replay(mode)
    script.finish(0, script.pick(range(1, max(2, len(script.running)))))
    script.replay(mode)


def _smaller_draft_extend(script: Script) -> None:
    script.fill(least=2)
    script.accept()
    call = script.replay(ForwardMode.DRAFT_EXTEND)
    script.finish(script.any_running())
    drafts = script.setup.num_draft_tokens
    others = tuple((request.accept_length + script.pick((1, 2))) % (drafts + 1) for request in script.running)
    if others:
        script.accept(others)
    script.again(call)


def _other_accepts(script: Script) -> None:
    """Two draft extends of the same requests, whose lengths and pages stay: other drafts of theirs were accepted."""
    script.fill()
    script.accept()
    call = script.replay(ForwardMode.DRAFT_EXTEND, order=_same_order(script))
    running, drafts = script.running, script.setup.num_draft_tokens
    if running:
        others = tuple((request.accept_length + script.pick((1, 2))) % (drafts + 1) for request in running)
        rows, lengths = (tuple(getattr(request, name) for request in running) for name in ("pool_row", "seq_len"))
        script.add(SetLengths(pool_rows=rows, seq_lens=lengths, accept_lengths=others))
    script.again(call)


def _same_ends(script: Script) -> None:
    """A request whose first page is shared gets others between that one and its last."""
    limit, page = script.setup.max_seq_len, script.setup.page_size
    length = min(limit, script.pick((2 * page + 1, 3 * page, limit)))
    mode = script.graph_mode()
    if mode is None:
        return
    script.join(length)
    script.join(length, prefix_of=0)
    call = script.replay(mode, order=_same_order(script))
    script.add(Remap(request=1, prefix_of=0, prefix_pages=script.pick(range(2, max(3, -(-length // page))))))
    script.again(call)


def _grown_within_its_page(script: Script) -> None:
    """One between longer requests grows by a token: no page changes, nor does the longest length or a stale mirror."""
    limit, page = script.setup.max_seq_len, script.setup.page_size
    modes = [mode for mode in script.graph_modes if mode not in OF_ACCEPTED]
    if not modes:
        return
    script.join(limit)
    script.join(script.pick((1, max(1, min(page, limit - 1) - 1))))
    if script.most > 2:
        script.join(limit)
    order = _same_order(script)
    lengths = [request.seq_len for request in script.running][:: -1 if order is Order.REVERSED else 1]
    mode = script.pick(modes)
    call = script.replay(mode, script.graph(mode, len(lengths), exact=True), order=order)
    script.accept((0, 1, 0))
    script.again(call.model_copy(update={"mirror": Mirror.STALE, "seq_lens_cpu": tuple(lengths)}))


def _mirror_in_another_order(script: Script) -> None:
    """The host mirror has the lengths of the batch, two of them in each other's place; sum, ends and longest agree."""
    limit, page = script.setup.max_seq_len, script.setup.page_size
    modes = [mode for mode in script.graph_modes if mode not in OF_ACCEPTED]
    if not modes:
        return
    short = script.pick((1, max(1, min(page, limit) - 1)))
    for length in (limit, short, script.pick((min(short + page, limit - 1), limit - 1)), limit)[: script.most]:
        script.join(length)
    mode, count = script.pick(modes), len(script.running)
    call = script.replay(mode, script.graph(mode, count, exact=True), order=Order.JOINED)
    lengths = [request.seq_len for request in script.running]
    lengths[1:-1] = lengths[1:-1][::-1]
    swapped: dict[str, Any] = {"mirror": Mirror.STALE, "seq_lens_cpu": tuple(lengths)}
    script.again(call.model_copy(update=swapped))
    script.add(Eager(mode=mode, order=Order.JOINED, **swapped))


def _often_replayed(script: Script) -> None:
    """A full graph, replayed for two batches in turn more often than a counter of a few bits counts."""
    modes = [mode for mode in script.graph_modes if mode not in OF_ACCEPTED] or script.graph_modes
    if not modes:
        return
    mode = script.pick(modes)
    script.fill(2)
    call = script.replay(mode, script.graph(mode, len(script.running), exact=True), order=Order.JOINED)
    other = call.model_copy(update={"order": Order.REVERSED})
    for number in range(MANY_REPLAYS + 1):
        script.again(call if number % 2 else other)


CALLS_AGAIN: dict[str, Callable[[Script], None]] = {
    "same batch on other pages": _same_batch_on_other_pages,
    "same batch on other pages, eager": partial(_same_batch_on_other_pages, eager=True),
    "row grown on other pages": _row_grown_on_other_pages,
    "eager after the longest left": _longest_leaves,
    "small after large in one bucket": _small_after_large,
    "small, large, small": _small_large_small,
    "smaller draft extend, other accepts": _smaller_draft_extend,
    "same lengths, other accepts": _other_accepts,
    "other pages between the same ends": _same_ends,
    "a length grown within its page": _grown_within_its_page,
    "mirror in another order": _mirror_in_another_order,
    "often replayed": _often_replayed,
}
HAPPENINGS = (  # those that can occur in any history
    _same_batch_on_other_pages,
    _row_grown_on_other_pages,
    _longest_leaves,
    _small_after_large,
)
