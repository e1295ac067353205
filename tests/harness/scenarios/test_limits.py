"""What a backend or a layer is made for: how it says so, and which cases do not fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nsa_oracle.harness.scenarios.limits import (
    BACKEND_FIELDS,
    EVERYTHING,
    LAYER_FIELDS,
    Limits,
    declared,
    modes_of,
    within,
)
from nsa_oracle.harness.scenarios.scales import SMALL
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Join, Replay
from nsa_oracle.harness.scenarios.setup import Drive, Inputs, IntDtype, Layer, Mirror, Setup
from nsa_oracle.reference.types import ForwardMode, KVCacheDtype, StepSemantics
from tests.support.limits import CASE, limits, only
from tests.support.metadata_cases import DECODE, EXTEND, IDLE, VERIFY, case


def test_nothing_declared_is_everything() -> None:
    assert declared(object(), LAYER_FIELDS, "nobody") == EVERYTHING
    assert EVERYTHING.modes == tuple(ForwardMode)


def test_every_field_of_a_case_can_be_named() -> None:
    assert set(BACKEND_FIELDS) == {*Setup.model_fields, *Inputs.model_fields} - {
        "inputs",
        "layer",
        "neighbour_context_len",
        "cache_pages",
    }
    assert set(LAYER_FIELDS) == {*BACKEND_FIELDS, *Layer.model_fields}


def test_values_may_be_given_as_a_file_has_them() -> None:
    found = limits(kv_cache_dtype=["fp8"], page_size=range(1, 17), drive=(Drive.SINGLE_STEP,), strided=[True])
    assert found.sizes == {
        "kv_cache_dtype": (KVCacheDtype.FP8,),
        "page_size": tuple(range(1, 17)),
        "drive": (Drive.SINGLE_STEP,),
        "strided": (True,),
    }
    modes = declared(SimpleNamespace(modes=["TARGET_VERIFY", DECODE]), LAYER_FIELDS, "nobody").modes
    assert modes == (DECODE, VERIFY)


MALFORMED = {
    "a list": ({"sizes": [1, 2]}, "sizes must map fields to allowed values"),
    "a method": ({"sizes": len}, "sizes must map fields to allowed values"),
    "a number": ({"sizes": {"page_size": 64}}, "'page_size' must have a list or tuple of allowed values, not 64"),
    "text": ({"sizes": {"kv_cache_dtype": "fp8"}}, "'kv_cache_dtype' must have a list or tuple of allowed values"),
    "a mapping of a mapping": ({"sizes": {"page_size": {64: 1}}}, "'page_size' must have a list or tuple"),
    "no value": ({"sizes": {"page_size": ()}}, "'page_size' allows no value at all"),
    "unknown field": ({"sizes": {"colour": ("red",)}}, "sizes: nobody has 'colour'; choose from page_size, "),
    "unknown field that is no text": ({"sizes": {7: (1,)}}, "sizes: nobody has '7'"),
    "a record of fields": ({"sizes": {"inputs": ({},)}}, "name the fields of 'inputs' themselves"),
    "another type": ({"sizes": {"page_size": ("big",)}}, "'page_size' cannot be big: it must be a whole number"),
    "a bool for a number": ({"sizes": {"num_heads": (True,)}}, "'num_heads' cannot be True"),
    "a number for a bool": ({"sizes": {"strided": (1,)}}, "'strided' cannot be 1"),
    "out of range": ({"sizes": {"num_steps": (17,)}}, "'num_steps' cannot be 17"),
    "unknown member": ({"sizes": {"regime": ("easy",)}}, "'regime' cannot be easy; choose from dominating, equal, "),
    "endless": ({"sizes": {"x" * 5000: (1,)}}, "nobody has 'xxx"),
    "several lines": ({"sizes": {"page_size": ("a\nb",)}}, "'page_size' cannot be a\\nb"),
    "modes as text": ({"modes": "DECODE"}, "modes must be a list or tuple of modes, not DECODE"),
    "unknown mode": ({"modes": ("PREFILL",)}, "there is no PREFILL; choose from EXTEND, DECODE, "),
    "mode that is no name": ({"modes": ([],)}, "there is no []"),
    "no mode": ({"modes": ()}, "modes allows no mode at all"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_declaration_is_refused_in_one_line(name: str) -> None:
    attributes, cause = MALFORMED[name]
    with pytest.raises(ValueError, match=r".") as caught:
        declared(SimpleNamespace(**attributes), LAYER_FIELDS, "nobody")
    message = str(caught.value)
    assert cause in message
    assert len(message.splitlines()) == 1
    assert len(message) < 800


def test_both_of_two_must_allow() -> None:
    one = Limits({"page_size": (16, 64), "num_heads": (2,)}, (DECODE, VERIFY))
    other = Limits({"page_size": (64, 32), "index_topk": (4,)}, (VERIFY, EXTEND))
    assert one & other == Limits({"page_size": (64,), "num_heads": (2,), "index_topk": (4,)}, (VERIFY,))
    assert one & EVERYTHING == one
    assert EVERYTHING & one == one


def test_misfit_is_named() -> None:
    assert EVERYTHING.misfit(CASE) is None
    assert limits(page_size=(16, 64), num_heads=(3,), strided=(True,)).misfit(CASE) is None
    assert limits(page_size=(64,)).misfit(CASE) == "page_size 16"
    assert limits(num_heads=(2,)).misfit(CASE) == "num_heads 3"
    assert limits(strided=(False,)).misfit(CASE) == "strided True"
    assert limits(regime=("random",)).misfit(CASE) == "regime dominating"
    assert only(DECODE, VERIFY).misfit(CASE) is None
    assert only(DECODE).misfit(CASE) == "mode TARGET_VERIFY"
    assert only(VERIFY).misfit(CASE) == "mode DECODE"


def test_layer_that_is_not_there_has_no_size() -> None:
    alone = CASE.model_copy(update={"setup": CASE.setup.model_copy(update={"layer": None})})
    assert limits(num_heads=(2,)).misfit(alone) is None


def test_decode_of_nobody_is_idle() -> None:
    empty = CASE.model_copy(update={"events": (*CASE.events, Replay(mode=DECODE))})
    assert modes_of(empty) == [DECODE, DECODE, VERIFY, IDLE]
    assert only(DECODE, VERIFY).misfit(empty) == "mode IDLE"


def test_enumerations_are_reported_by_their_values() -> None:
    assert limits(step_semantics=(StepSemantics.SHARED,)).misfit(
        CASE.model_copy(update={"setup": CASE.setup.model_copy(update={"step_semantics": StepSemantics.ADVANCING})})
    ) == ("step_semantics advancing")
    assert limits(seq_lens=(IntDtype.INT64,)).excluded(SMALL.drawn()) == ["seq_lens int32"]


EMPTY = case(Capture(mode=DECODE, buckets=(1,)), Replay(mode=DECODE), Eager(mode=VERIFY))
MIRRORS = case(
    Capture(mode=DECODE, buckets=(1,)),
    Join(seq_len=3),
    Replay(mode=DECODE, mirror=Mirror.STALE),
    Eager(mode=DECODE, mirror=Mirror.ABSENT),
    Eager(mode=EXTEND, mirror=Mirror.ABSENT),
)


def test_empty_batches_are_refused_and_left_out() -> None:
    found = declared(SimpleNamespace(empty_batches=False), BACKEND_FIELDS, "nobody")
    assert found.misfit(EMPTY) == "an empty batch"
    assert within(EMPTY, found).events == EMPTY.events[:2], "a replay of an empty batch has padding"
    assert EVERYTHING.misfit(EMPTY) is None
    assert "empty batches" in found.excluded({})


def test_replays_without_a_request_are_refused_and_left_out() -> None:
    found = declared(SimpleNamespace(empty_replays=False), BACKEND_FIELDS, "nobody")
    assert found.misfit(EMPTY) == "an empty batch"
    assert within(EMPTY, found).events == (EMPTY.events[0], EMPTY.events[2])
    assert found.excluded({}) == ["replays without a request"]
    joined = EMPTY.model_copy(update={"events": (EMPTY.events[0], Join(seq_len=3), *EMPTY.events[1:])})
    assert found.misfit(joined) is None


def test_requests_without_a_new_token_are_refused_and_left_out() -> None:
    found = declared(SimpleNamespace(empty_chunks=False), BACKEND_FIELDS, "nobody")
    chunks = case(Join(seq_len=3), Eager(mode=EXTEND, extend_lens=(0,)), Eager(mode=EXTEND, extend_lens=(2,)))
    assert EVERYTHING.misfit(chunks) is None
    assert found.misfit(chunks) == "a request without a new token"
    assert within(chunks, found).events == (chunks.events[0], chunks.events[2])
    assert found.excluded({}) == ["EXTEND of a request without a new token"]


def test_calls_of_some_draft_steps_are_refused_and_left_out() -> None:
    found = declared(SimpleNamespace(fewer_steps=False), BACKEND_FIELDS, "nobody")
    some = case(Join(seq_len=3), Eager(mode=DECODE, draft_steps=1), Eager(mode=DECODE), num_steps=2)
    assert EVERYTHING.misfit(some) is None
    assert found.misfit(some) == "a call of some draft steps"
    assert within(some, found).events == (some.events[0], some.events[2])
    assert found.excluded({}) == ["calls of some draft steps"]
    assert (found & EVERYTHING).misfit(some) == found.misfit(some)


def test_mirrors_are_by_call_or_mode() -> None:
    found = declared(
        SimpleNamespace(mirrors={"eager": ("equal",), "EXTEND": ("equal", "absent")}), BACKEND_FIELDS, "nobody"
    )
    assert found.misfit(MIRRORS) == "mirror absent"
    *_, replay, eager, extend = within(MIRRORS, found).events
    assert (replay, extend) == (MIRRORS.events[2], MIRRORS.events[4])
    assert eager == Eager(mode=DECODE, mirror=Mirror.EQUAL)
    assert found.misfit(within(MIRRORS, found)) is None
    assert found.excluded({}) == ["mirror stale, ahead, absent (eager)", "mirror stale, ahead (EXTEND)"]


def test_a_replay_that_no_bucket_holds_is_an_eager_call() -> None:
    found = declared(SimpleNamespace(mirrors={"eager": ("equal",)}), BACKEND_FIELDS, "nobody")
    held = case(Capture(mode=DECODE, buckets=(1,)), Join(seq_len=3), Replay(mode=DECODE, mirror=Mirror.STALE))
    assert found.misfit(held) is None
    crowd = held.model_copy(update={"events": (held.events[0], held.events[1], *held.events[1:])})
    assert found.misfit(crowd) == "mirror stale"


@pytest.mark.parametrize(
    ("mirrors", "message"),
    [
        (("equal",), "mirrors must map modes, 'graph' or 'eager' to states of the mirror; it is of type tuple"),
        ({"replay": ("equal",)}, "mirrors: there is no 'replay'; choose from graph, eager, EXTEND"),
        ({"graph": ("wrong",)}, "mirrors: 'graph' must list some of equal, stale, ahead, absent"),
        ({"graph": ()}, "mirrors: 'graph' must list some of"),
    ],
)
def test_malformed_mirrors_are_refused(mirrors: object, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        declared(SimpleNamespace(mirrors=mirrors), BACKEND_FIELDS, "nobody")
    assert message in str(caught.value)
