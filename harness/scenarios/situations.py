"""Situations: short histories that goals name, of events that engines run back to back and chance rarely would."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from nsa_oracle.harness.scenarios.classes import COPY_CHUNK, FLASHMLA_BLOCK, MQA_SEGMENT
from nsa_oracle.harness.scenarios.scenario import GRAPH_MODES, Eager, Remap, Replay
from nsa_oracle.harness.scenarios.script import OF_ACCEPTED, Script
from nsa_oracle.harness.scenarios.setup import Order
from nsa_oracle.reference.types import ForwardMode

DECODE, DRAFT_EXTEND, EXTEND = ForwardMode.DECODE, ForwardMode.DRAFT_EXTEND, ForwardMode.EXTEND


def _replayed(mode: ForwardMode, script: Script) -> None:
    script.fill()
    script.accept_before(mode)
    _fewer_steps(script.replay(mode), script)


def _fewer_steps(call: Replay | Eager, script: Script) -> None:
    """Some of the draft steps of ``call``, then all, with other lengths each time; if the limits allow it."""
    most = script.setup.num_steps
    in_a_graph_with_a_layer = isinstance(call, Replay) and script.setup.layer is not None
    if call.mode is not DECODE or most < 2 or in_a_graph_with_a_layer or not script.scale.limits.fewer_steps:
        return
    script.accept()
    script.again(call.model_copy(update={"draft_steps": script.pick(range(1, most))}))
    script.accept()
    script.again(call)


def _called(mode: ForwardMode, script: Script) -> None:
    if mode is not ForwardMode.IDLE:
        script.fill()
        script.accept_before(mode)
    _fewer_steps(script.eager(mode), script)
    limits = script.scale.limits
    if mode is ForwardMode.IDLE and limits.empty_batches and EXTEND in limits.modes:
        script.eager(EXTEND)  # of no request: no padding makes up for it, as it may in the call before


def _cached_prefixes(script: Script) -> None:
    """Prompts beyond K, of which one token is new, or a few. In a tight cache they share all but their ends."""
    limit, topk = script.setup.max_seq_len, script.setup.index_topk
    if script.setup.cache_pages:
        script.join(limit)
        for _ in range(script.most - 1):
            script.join(limit, prefix_of=0, prefix_pages=script.setup.pages_per_request)
    else:
        for _ in range(script.pick((2, 1, 3))):
            script.join(script.pick((topk + 1, limit, (topk + limit) // 2)))
    script.eager(EXTEND, script.pick(((1,), (2, 1), (1, 3))))


def _chunks(script: Script) -> None:
    """Prefills in chunks: requests whose tokens are all cached, before, behind and between some with new tokens; a
    decode beside one; the cached tokens of all requests, and nothing else.
    """
    script.join(max(2, _full_page(script)))
    script.join(script.pick((2, 3, script.setup.max_seq_len)))
    new = max(2, min(script.scale.most_new_tokens_of(script.setup) or 3, 3))
    script.eager(EXTEND, script.pick(((0, new), (0, 1))), order=Order.JOINED)
    script.eager(EXTEND, script.pick(((1, new), (new, 1))), order=Order.JOINED)
    if script.most > 2:
        script.join(script.pick((3, script.setup.max_seq_len)))
        script.eager(EXTEND, script.pick(((new, 0, 1), (1, 0, new))), order=Order.JOINED)
    script.eager(EXTEND, script.pick(((new, 0, 0), (0, new, 0), (0, 0, new))), order=Order.JOINED)
    script.eager(EXTEND, (0,))


def _whole_prompts(script: Script) -> None:
    """A prompt within K, prefilled from its first token, beside one beyond K."""
    limit, topk = script.setup.max_seq_len, script.setup.index_topk
    most_new = script.scale.most_new_tokens_of(script.setup) or limit
    script.join(script.pick((1, min(topk, most_new), max(1, min(topk, most_new) - 1))))
    script.join(script.pick((topk + 1, limit, script.first_length())))
    if script.pick((False, True)):
        script.fill()
    script.eager(EXTEND, (most_new,), order=Order.JOINED)
    script.finish(len(script.running) - 1)
    script.eager(EXTEND)


def _prefills(script: Script) -> None:
    """A prefill of several requests, and one of those that are left when one has finished."""
    script.fill(least=2)
    script.eager(EXTEND)
    script.finish(script.any_running())
    script.eager(EXTEND)


def _long_prefill(script: Script) -> None:
    """A prompt of more rows than a layer takes at once, with a cached prefix or without, among a few other rows; then
    few rows of the same requests.
    """
    limit, most_new = script.setup.max_seq_len, script.pick(script.scale.long_prefills)
    others = script.pick(range(1, max(2, script.most)))
    new_tokens = [script.pick((1, 3, 66)) for _ in range(others)]
    new_tokens.insert(script.pick(range(others + 1)), most_new)
    for new in new_tokens:
        script.join(script.pick((new, limit, min(new + 5, limit))))
    script.eager(EXTEND, tuple(new_tokens), order=Order.JOINED)
    script.eager(EXTEND, script.pick(((1,), (2, 1), (1, 3))))


def _padded(script: Script) -> None:
    mode = script.graph_mode()
    if mode is None:
        return
    script.fill(max(1, script.most - script.pick((1, 2))))
    script.accept_before(mode)
    script.replay(mode, script.graph(mode, max(len(script.running) + 1, script.most)))


def _outgrown(script: Script) -> None:
    mode = script.graph_mode()
    if mode is None:
        return
    script.graph(mode, 1, exact=True)
    script.fill(least=2)
    script.replay(mode, 1)


def _emptied(script: Script) -> None:
    """A graph is replayed for requests, for none, and again: half the time in DECODE, where none of them is IDLE."""
    mode = DECODE if DECODE in script.graph_modes and script.pick((True, False)) else script.graph_mode()
    if mode is None:
        return
    script.fill()
    call = script.replay(mode)
    script.finish(0, script.most)
    script.again(call)
    script.fill()
    script.again(call)


def _nothing_accepted(script: Script) -> None:
    script.fill()
    script.accept((0,))
    script.replay(DRAFT_EXTEND, script.graph(DRAFT_EXTEND, len(script.running), exact=True))


def _all_accepted(script: Script) -> None:
    script.fill()
    script.accept((script.setup.num_draft_tokens,))
    script.replay(DRAFT_EXTEND)


def _accepts(script: Script) -> None:
    drafts = script.setup.num_draft_tokens
    script.fill(least=2)
    script.accept((1, drafts))
    script.call()
    script.accept((script.pick(range(2, drafts)) if drafts > 2 else 1, 0))
    script.call()


def _crowd(least: int, most: int, script: Script) -> None:
    script.fill(script.pick(range(least, max(least, min(most, script.most)) + 1)))
    script.call()


def _throng(script: Script) -> None:
    """More requests than 8; where the pool has as many rows, than one or two warps have lanes, and then fewer."""
    throng = script.scale.throng
    if script.setup.pool_size <= throng:
        _crowd(9, 12, script)
        return
    script.fill(script.pick((throng, throng - 1, 65, 33)))
    for mode in script.graph_modes:
        script.accept_before(mode)
        script.replay(mode)
    script.eager(script.eager_mode())
    script.finish(script.pick((0, 1)), script.pick((31, 20)))
    for mode in script.graph_modes:
        script.accept_before(mode)
        script.replay(mode)
    if EXTEND in script.scale.limits.modes:
        script.eager(EXTEND, script.pick(((1,), (1, 2))))


def _two_modes(script: Script) -> None:
    first = script.graph_mode()
    second = None if first is None else script.graph_mode(first)
    if first is None or second is None:
        return
    script.fill()
    script.replay(first)
    script.accept_before(second)
    script.replay(second)
    script.eager(script.pick((first, second)))
    script.replay(first)


def _serving_cycle(script: Script) -> None:
    """Draft, verify, extend and draft again, behind each other in graphs; a prefill comes before the last draft."""
    modes = [
        mode for mode in (DECODE, ForwardMode.TARGET_VERIFY, script.pick(OF_ACCEPTED)) if mode in script.graph_modes
    ]
    if not modes:
        return
    script.fill()
    for mode in modes:
        if mode in OF_ACCEPTED:
            script.accept()
        script.replay(mode)
    if EXTEND in script.scale.limits.modes:
        script.eager(EXTEND)
    script.replay(modes[0])


def _recycled(script: Script) -> None:
    script.fill()
    script.call()
    script.finish(script.any_running())
    script.join()
    script.call()


def _full_page(script: Script) -> int:
    """A length that fills a page at least."""
    return max(script.first_length(), script.setup.page_size)


def _remapped(script: Script) -> None:
    script.join(_full_page(script))
    script.join(_full_page(script))
    call = script.call()
    script.add(Remap(request=1, prefix_of=0, prefix_pages=script.pick((1, 2))))
    script.again(call)


def _long(script: Script) -> None:
    limit = script.setup.max_seq_len
    script.join(script.pick((COPY_CHUNK + 1, limit, (COPY_CHUNK + limit) // 2)))
    script.call()


def _wide(script: Script) -> None:
    """A short request in a wide table: what is wide are the rows that top-k gets by itself."""
    topk = script.setup.index_topk
    script.join(script.pick((topk + 1, topk, max(1, topk // 2))))
    script.eager(script.pick([mode for mode in script.scale.limits.modes if mode is not ForwardMode.IDLE] or [DECODE]))


def _several_segments(script: Script) -> None:
    """The lengths at capture and of an idle rank need one segment, those of the replay in between several."""
    bucket = script.graph(DECODE, script.pick(range(1, script.most + 1)))
    while len(script.running) < bucket:
        script.join(script.pick((MQA_SEGMENT + 1, script.setup.max_seq_len, 2 * MQA_SEGMENT)))
    call = script.replay(DECODE, bucket)
    script.finish(0, script.most)
    script.again(call)


def _crossed(size: int, script: Script) -> None:
    """The first steps of a call need fewer segments than the last."""
    setup = script.setup
    most = min(setup.max_context_len, setup.index_topk if size == FLASHMLA_BLOCK else setup.max_context_len)
    units = [unit for unit in range(size, most, size) if unit - setup.num_steps + 1 <= setup.max_seq_len] or [size]
    for _ in range(script.pick(range(1, script.most + 1))):
        script.join(script.pick(units) - script.pick(range(1, max(2, setup.num_steps))))
    script.replay(DECODE)


SITUATIONS: dict[str, Callable[[Script], None]] = {
    "several segments": _several_segments,
    "steps cross a paged-MQA segment": partial(_crossed, MQA_SEGMENT),
    "steps cross a FlashMLA block": partial(_crossed, FLASHMLA_BLOCK),
    **{f"replay {mode.value}": partial(_replayed, mode) for mode in GRAPH_MODES},
    **{f"eager {mode.value}": partial(_called, mode) for mode in ForwardMode if mode is not EXTEND},
    "cached prefixes": _cached_prefixes,
    "whole prompts": _whole_prompts,
    "long prefill": _long_prefill,
    "prefills": _prefills,
    "batch of 5..8": partial(_crowd, 5, 8),
    "batch of more than 8": _throng,
    "replay, padded": _padded,
    "outgrown": _outgrown,
    "graph empty after requests": _emptied,
    "nothing accepted": _nothing_accepted,
    "accepts": _accepts,
    "all accepted": _all_accepted,
    "mode change": _two_modes,
    "recycled": _recycled,
    "serving cycle": _serving_cycle,
    "prefix re-mapped": _remapped,
    "several copy chunks": _long,
    "wide rows": _wide,
    "chunks": _chunks,
}
