"""Scenario files: what is written is read again, and what is no scenario is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.scenarios.coverage import classes_of
from nsa_oracle.harness.scenarios.files import from_json, load, to_json
from nsa_oracle.harness.scenarios.scales import LARGE, LARGE_LAYER
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Finish, Join, Remap, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Layer, Mirror, Regime, Setup
from nsa_oracle.harness.scenarios.story import story
from nsa_oracle.harness.scenarios.strategies import scenarios
from nsa_oracle.harness.subjects.default import OPTIMIZED_SWITCHES
from nsa_oracle.reference.types import ForwardMode, KVCacheDtype
from tests.support.metadata_cases import SIZES

EXAMPLE = Scenario(
    note='a naïve ✓ note with "quotes" and\na second line',
    setup=Setup(**SIZES),
    optimizations=("one_launch",),
    seed=2**64 - 1,
    events=(
        Capture(mode=ForwardMode.DECODE, buckets=(1, 2)),
        Join(seq_len=5),
        Join(seq_len=6, prefix_of=0),
        Accept(accept_lengths=(0, 2)),
        Remap(request=1, prefix_of=0),
        Replay(mode=ForwardMode.DECODE, mirror=Mirror.STALE),
        Eager(mode=ForwardMode.EXTEND, extend_lens=(3,)),
        Finish(request=0),
    ),
)
WRITTEN = """\
{
  "schema_version": 1,
  "note": "a naïve ✓ note with \\"quotes\\" and\\na second line",
  "setup": {"page_size": 4, "max_context_len": 16, "index_topk": 8, "num_steps": 1, "num_draft_tokens": 2, \
"pool_size": 3},
  "optimizations": ["one_launch"],
  "seed": 18446744073709551615,
  "events": [
    {"event": "capture", "mode": "DECODE", "buckets": [1, 2]},
    {"event": "join", "seq_len": 5},
    {"event": "join", "seq_len": 6, "prefix_of": 0},
    {"event": "accept", "accept_lengths": [0, 2]},
    {"event": "remap", "request": 1, "prefix_of": 0},
    {"event": "replay", "mode": "DECODE", "mirror": "stale"},
    {"event": "eager", "mode": "EXTEND", "extend_lens": [3]},
    {"event": "finish", "request": 0}
  ]
}
"""


@settings(max_examples=60, deadline=None)
@given(st.one_of(scenarios(LARGE, OPTIMIZED_SWITCHES), scenarios(LARGE_LAYER, OPTIMIZED_SWITCHES)))
def test_what_is_written_is_read_again(scenario: Scenario) -> None:
    text = to_json(scenario)
    assert from_json(text) == scenario
    assert to_json(from_json(text)) == text
    assert len(text.splitlines()) <= len(scenario.events) + 8  # one event a line


def test_written_form_is_readable() -> None:
    """One event a line, names instead of numbers, defaults left out. The literal also guards the schema."""
    assert to_json(EXAMPLE) == WRITTEN
    assert from_json(WRITTEN) == EXAMPLE


def test_scenario_without_events() -> None:
    scenario = Scenario(setup=Setup(**SIZES))
    assert from_json(to_json(scenario)) == scenario


@pytest.mark.parametrize(
    ("layer", "written"),
    [
        (Layer(), "{}"),
        (Layer(regime=Regime.RANDOM, kv_cache_dtype=KVCacheDtype.FP8), '{"kv_cache_dtype": "fp8", "regime": "random"}'),
        (Layer(num_heads=16, far_slots=True), '{"num_heads": 16, "far_slots": true}'),
    ],
)
def test_layer_is_written_as_what_is_not_the_default(layer: Layer, written: str) -> None:
    """An empty one is a layer all the same; without one there is metadata alone."""
    scenario = Scenario(setup=Setup(**SIZES, layer=layer))
    assert f'"pool_size": 3, "layer": {written}}},' in to_json(scenario)
    assert from_json(to_json(scenario)) == scenario
    assert from_json(WRITTEN).setup.layer is None
    assert "layer" not in to_json(EXAMPLE)


def test_layout_of_the_file_is_free() -> None:
    assert from_json(json.dumps(json.loads(WRITTEN), indent=7)) == EXAMPLE


def with_changes(**changes: Any) -> str:
    return json.dumps(json.loads(WRITTEN) | changes)


def with_setup(**changes: Any) -> str:
    return with_changes(setup={**SIZES, **changes})


def with_layer(**changes: Any) -> str:
    return with_setup(layer=changes)


def with_event(**event: Any) -> str:
    return with_changes(events=[event])


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


MALFORMED = {
    "empty": ("", "the file", "EOF while parsing"),
    "broken JSON": (WRITTEN[:200], "the file", "EOF while parsing"),
    "not JSON": ("capture DECODE 1 2", "the file", "expected value at line 1 column 1"),
    "a list": ("[]", "the file", "must be an object in braces, not a list"),
    "a number": ("7", "the file", "must be an object in braces, not 7"),
    "null": ("null", "the file", "must be an object in braces, not null"),
    "Python": ("__import__('os').abort()", "the file", "expected value"),
    "trailing text": (WRITTEN + "x", "the file", "trailing characters"),
    "schema of the future": (
        with_changes(schema_version=7),
        "schema_version 7 is newer than this version of nsa-oracle reads (1): update it",
        "",
    ),
    "unknown field": (
        with_changes(colour="red"),
        "colour: ",
        "there is no such field of a case; remove it, or choose from schema_version, ",
    ),
    "unknown field of the setup": (
        with_setup(pages=3),
        "setup.pages: ",
        "there is no such field of setup; did you mean page_size?",
    ),
    "no setup": ('{"schema_version": 1}', "setup: ", "is missing; add setup"),
    "field missing": (with_changes(setup={}), "setup.page_size: ", "is missing; add page_size; setup."),
    "unknown event": (
        with_event(event="explode"),
        "events[0]: ",
        "there is no event 'explode'; choose from capture, join, ",
    ),
    "event without a kind": (with_event(seq_len=3), "events[0]: ", "has no 'event'; add one of capture, join, "),
    "field of another event": (
        with_event(event="finish", request=0, mode="DECODE"),
        "events[0].mode: ",
        "no such field of the event finish",
    ),
    "unknown mode": (with_event(event="eager", mode="PREFILL"), "events[0].mode: cannot be ", "'DECODE'"),
    "mode without a graph": (with_event(event="replay", mode="EXTEND"), "events[0].mode: ", "EXTEND has no graph"),
    "no bucket": (with_event(event="capture", mode="DECODE", buckets=[]), "events[0].buckets: ", "at least 1"),
    "bucket 0": (
        with_event(event="capture", mode="DECODE", buckets=[1, 0]),
        "events[0].buckets[1]: ",
        "at least 1, not 0",
    ),
    "no accept length": (with_event(event="accept", accept_lengths=[]), "accept_lengths", "at least 1"),
    "no extend length": (
        with_event(event="eager", mode="EXTEND", extend_lens=[]),
        "events[0].extend_lens: ",
        "must name at least 1 length",
    ),
    "draft steps of a verification": (
        with_event(event="eager", mode="TARGET_VERIFY", draft_steps=1),
        "events[0].draft_steps: ",
        "must be left out in TARGET_VERIFY, which has no draft steps",
    ),
    "more draft steps than there are": (
        with_event(event="eager", mode="DECODE", draft_steps=5),
        "events[0].draft_steps: ",
        "must be at most 1, the number of steps",
    ),
    "some draft steps of a graph with a layer": (
        with_changes(setup={**SIZES, "layer": {}}, events=[{"event": "replay", "mode": "DECODE", "draft_steps": 1}]),
        "events[0].draft_steps: ",
        "must be left out of a replay in a case with a layer",
    ),
    "more extra rows than there may be": (with_layer(extra_rows=65), "setup.layer.extra_rows: ", "at most 64, not 65"),
    "negative length": (with_event(event="join", seq_len=-1), "events[0].seq_len: ", "at least 1, not -1"),
    "length beyond the context": (
        with_event(event="join", seq_len=15),
        "events[0].seq_len: ",
        "15 leaves no room to draft; at most 14 fit",
    ),
    "page size 0": (with_setup(page_size=0), "setup.page_size: ", "at least 1, not 0"),
    "page size is text": (with_setup(page_size="many"), "setup.page_size: ", "must be a whole number, not "),
    "half a page": (with_setup(page_size=0.5), "setup.page_size: ", "must be a whole number, not 0.5"),
    "no room for drafts": (
        with_setup(num_draft_tokens=8, max_context_len=8),
        "setup.max_context_len: ",
        "8 must exceed the 8 tokens",
    ),
    "too many steps": (with_setup(num_steps=17), "setup.num_steps: ", "at most 16, not 17"),
    "negative seed": (with_changes(seed=-1), "seed: ", "at least 0, not -1"),
    "seed of 65 bits": (with_changes(seed=2**64), "seed: ", "less than 18446744073709551616"),
    "huge number": ('{"seed": 1' + "0" * 5000 + "}", "the file", "out of range"),
    "infinite number": (
        with_changes(seed=1).replace('"seed": 1', '"seed": 1e999'),
        "seed: ",
        "must be a whole number, not ",
    ),
    "not a number": (with_changes(seed=float("nan")), "seed: ", "must be a whole number, not "),
    "true for a number": (with_setup(page_size=True), "setup.page_size: ", "must be a whole number, not "),
    "text for a number": (with_setup(page_size="4"), "setup.page_size: ", "must be a whole number, not "),
    "a whole float": (with_setup(page_size=4.0), "setup.page_size: ", "must be a whole number, not "),
    "a number for a flag": (with_layer(far_slots=1), "setup.layer.far_slots: ", "must be true or false, not 1"),
    "a number for text": (with_changes(note=7), "note: ", "must be a text in quotes, not 7"),
    "an object for a list": (with_changes(events={}), "events: ", "must be a list in square brackets, not an object"),
    "schema true": (with_changes(schema_version=True), "schema_version", "must be the number 1, not true"),
    "schema 1.0": (with_changes(schema_version=1.0), "schema_version", "must be the number 1, not 1.0"),
    "a name twice": (WRITTEN.replace('"note"', '"seed": 3,\n  "note"'), "'seed'", "given twice"),
    "a name twice in an event": (
        with_event(event="join", seq_len=3).replace('"seq_len": 3', '"seq_len": 3, "seq_len": 4'),
        "'seq_len'",
        "given twice",
    ),
    "deeply nested list": ("[" * 100_000, "the file", "recursion limit"),
    "deeply nested seed": (with_changes(seed=nested(150)), "seed: ", "must be a whole number, not "),
    "lone surrogate": ('{"note": "\\ud800"}', "the file", "hex escape"),
    "unknown regime": (with_layer(regime="easy"), "setup.layer.regime", "'dominating'"),
    "unknown cache": (with_layer(kv_cache_dtype="fp16"), "setup.layer.kv_cache_dtype", "'fp8'"),
    "unknown field of the layer": (with_layer(heads=2), "setup.layer.heads: ", "did you mean num_heads?"),
    "layer without a head": (with_layer(num_heads=0), "setup.layer.num_heads: ", "at least 1, not 0"),
    "latent of no whole tiles": (with_layer(kv_lora_rank=96), "setup.layer.kv_lora_rank", "multiple of 64"),
    "odd RoPE part": (with_layer(qk_rope_head_dim=20), "setup.layer.qk_rope_head_dim", "multiple of 16"),
    "page size of a layer": (with_setup(page_size=6, layer={}), "setup.page_size: ", "a power of two, not 6"),
    "caches beyond memory": (
        with_setup(pool_size=128, max_context_len=1 << 16, layer={"regime": "random"}),
        "setup.layer: ",
        "its caches would have",
    ),
    "more keys than exact sums hold": (
        with_setup(max_context_len=3000, index_topk=2049, layer={"regime": "equal"}),
        "setup.index_topk: ",
        "at most 2048 keys, not 2049",
    ),
    "more slots than codes": (
        with_setup(pool_size=64, max_context_len=1024, layer={}),
        "setup.layer.qk_rope_head_dim: ",
        "16 can tell 32,768 slots apart; there are 65,",
    ),
}


def test_a_bucket_that_is_too_large_is_not_also_no_bucket(tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    path.write_text(with_event(event="capture", mode="DECODE", buckets=[100_000]), encoding="utf-8")
    assert refusal(path) == f"{path}: events[0].buckets[0]: must be at most 4096, not 100000"


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    text, place, cause = MALFORMED[name]
    path = tmp_path / "case.json"
    path.write_text(text, encoding="utf-8")
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert place in message
    assert cause in message


def refusal(path: Path) -> str:
    with pytest.raises(ScenarioError) as caught:
        load(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert len(message) < len(str(path)) + 300, "one line that a person can read"
    return message


@pytest.mark.parametrize("text", ["a\nb", "\r", "\u2028", "x" * 5000, "\x1b[31mred"])
def test_text_of_the_file_does_not_break_the_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    for document in (with_changes(**{text: 1}), with_event(event=text)):
        path.write_text(document, encoding="utf-8")
        assert "\x1b" not in refusal(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_context_len": 3000, "index_topk": 2049, "layer": {"regime": "random"}},
        {"pool_size": 64, "max_context_len": 1024, "layer": {"regime": "lattice"}},
        {"pool_size": 64, "max_context_len": 1024, "layer": {"qk_rope_head_dim": 32}},
        {"page_size": 6},
    ],
)
def test_limits_of_a_layer_hold_where_they_have_a_reason(changes: dict[str, Any]) -> None:
    """Sums of ordinary numbers are bounded however many; codes are for one regime, powers of two for a layer."""
    assert from_json(with_setup(**changes)).setup.pool_size == changes.get("pool_size", SIZES["pool_size"])


def test_unreadable_files_are_refused_in_one_line(tmp_path: Path) -> None:
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\x80\x81\xff")
    assert refusal(tmp_path / "absent.json") == f"{tmp_path}/absent.json: cannot be read: No such file or directory"
    assert refusal(tmp_path).startswith(f"{tmp_path}: cannot be read: Is a directory; name the saved cases in it, as ")
    assert refusal(binary).startswith(f"{binary}: cannot be read: 'utf-8' codec can't decode byte 0x80")


@pytest.mark.parametrize(
    "event",
    [
        {"event": "finish", "request": 10**40},
        {"event": "join", "seq_len": 3, "prefix_of": 10**40, "prefix_pages": 10**40},
        {"event": "remap", "request": 10**40, "prefix_of": 10**40, "prefix_pages": 10**40},
        {"event": "eager", "mode": "EXTEND", "extend_lens": [10**40]},
    ],
)
def test_numbers_without_a_limit_are_reported_and_played(event: dict[str, Any]) -> None:
    scenario = from_json(with_changes(events=[{"event": "join", "seq_len": 6}, event]))
    assert len(story(scenario).splitlines()) > 2
    assert classes_of(scenario)


def test_switches_are_left_to_the_backend_that_has_them() -> None:
    """Which there are, a file does not say: ``Subject.check`` does."""
    assert from_json(with_changes(optimizations=["teleport"])).optimizations == ("teleport",)


def test_source_is_named_without_a_file() -> None:
    with pytest.raises(ScenarioError, match=r"^scenario: schema_version is missing"):
        from_json("{}")


def test_scenario_that_needs_more_memory_than_a_server_is_refused() -> None:
    """A typing error in a size must not take the machine down: every row of the pool has every column."""
    with pytest.raises(ScenarioError):
        from_json(with_setup(pool_size=4096, max_context_len=1 << 20, page_size=1))
