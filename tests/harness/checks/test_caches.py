"""How a wrong byte of a cache is named, and which bytes count."""

from __future__ import annotations

import pytest

from nsa_oracle.harness.engine.observations import Feed, LayerObservation
from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.memory.bits import as_bytes
from nsa_oracle.harness.scenarios.scenario import Eager
from nsa_oracle.reference.types import KVCacheDtype
from tests.support.layer_cases import BF16, FP8
from tests.support.metadata_cases import VERIFY, case
from tests.support.seen_layers import TWO, seen, verified


@pytest.mark.parametrize(
    ("dtype", "byte", "part"),
    [
        (BF16, 0, "latent element 0"),
        (BF16, 127, "latent element 63"),
        (BF16, 128, "RoPE element 0"),
        (BF16, 159, "RoPE element 15"),
        (FP8, 63, "latent element 63"),
        (FP8, 64, "scale 0"),
        (FP8, 79, "scale 3"),
        (FP8, 80, "RoPE element 0"),
        (FP8, 111, "RoPE element 15"),
    ],
)
def test_byte_of_the_cache_has_a_name(dtype: KVCacheDtype, byte: int, part: str) -> None:
    clean = verified(dtype=dtype)
    slot = int(clean.layer.load.passes[0].inputs.out_cache_loc[3])
    before = int(as_bytes(clean.layer.steps[0].caches.kv)[slot, 0, byte])

    def change(layer: LayerObservation) -> None:
        as_bytes(layer.steps[0].caches.kv)[slot, 0, byte] = before ^ 1

    finding = clean.found(change)
    assert (finding.kind, finding.field, finding.how, finding.step) == (Kind.VALUE, "kv_cache", "eager chain", 0)
    assert finding.place == f"slot {slot} (running request 1, position 4), {part}"
    texts = finding.got, finding.expected
    numbers = [text.partition(" (")[0] for text in texts]  # the number that the byte belongs to
    assert float(numbers[0]) != float(numbers[1])
    assert texts == (f"{numbers[0]} (byte {before ^ 1:#04x})", f"{numbers[1]} (byte {before:#04x})")
    assert finding.differing == 1
    assert finding.picture is not None
    (row,) = (row for row in finding.picture.rows if "x" in row.states)
    assert (row.label, row.states.count("x")) == (f"slot {slot} (running request 1, position 4)", 1)


@pytest.mark.parametrize(
    ("byte", "place"),
    [
        (0, "slot 12 (running request 0, position 8), key element 0"),
        (33, "slot 13 (running request 0, position 9), key element 1"),
        (127, "slot 15 (running request 0, position 11), key element 31"),
        (128, "slot 12 (running request 0, position 8), scale"),
        (143, "slot 15 (running request 0, position 11), scale"),
    ],
)
def test_byte_of_an_index_page_has_a_name(byte: int, place: str) -> None:
    """Page 3: 4 keys of 32 bytes, then 4 scales of 4."""
    finding = verified().found(lambda layer: layer.steps[0].caches.index_k[3].__setitem__(byte, 0x55))
    assert (finding.kind, finding.field, finding.place) == (Kind.VALUE, "index_k_cache", place)
    assert finding.picture is not None
    (row,) = (row for row in finding.picture.rows if "x" in row.states)
    assert (row.label, row.got[byte - finding.picture.column]) == ("page 3", "0x55")


@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_a_row_that_is_stored_elsewhere_is_named(dtype: KVCacheDtype) -> None:
    clean = verified(dtype=dtype)
    own = int(clean.layer.load.passes[0].inputs.out_cache_loc[3])

    def store_elsewhere(layer: LayerObservation) -> None:
        layer.steps[0].caches.kv[70] = layer.steps[0].caches.kv[own]

    finding = clean.found(store_elsewhere)
    assert finding.place.startswith("slot 70 (no running request), latent element")
    assert finding.got.endswith(", as row 3 (request 1, draft token 1) stores")


def test_an_index_key_that_is_stored_elsewhere_is_named() -> None:
    clean = verified()
    own = int(clean.layer.load.passes[0].inputs.out_cache_loc[3])

    def store_elsewhere(layer: LayerObservation) -> None:
        pages = layer.steps[0].caches.index_k  # 4 keys of 32 bytes, then 4 scales of 4
        page, offset = divmod(own, 4)
        pages[17, 64:96] = pages[page, 32 * offset : 32 * (offset + 1)]
        pages[17, 136:140] = pages[page, 128 + 4 * offset : 132 + 4 * offset]

    finding = clean.found(store_elsewhere)
    assert finding.place.startswith("slot 70 (no running request), ")
    assert finding.got.endswith(", as row 3 (request 1, draft token 1) stores")


def test_write_into_a_page_of_nobody_is_reported() -> None:
    finding = verified().found(lambda layer: layer.steps[0].caches.kv[-1].fill_(1))
    assert finding.place == "slot 71 (no running request), latent element 0"
    assert finding.differing == 160


def test_dummy_page_is_left_out() -> None:
    def change(layer: LayerObservation) -> None:
        layer.steps[0].caches.kv[:4] = 1
        layer.steps[0].caches.index_k[0] = 1

    assert verified().judged(change) is None
    assert (
        verified()
        .found(lambda layer: layer.steps[0].caches.kv[4].fill_(1))
        .place.startswith("slot 4 (running request 0, ")
    )
    assert verified().found(lambda layer: layer.steps[0].caches.index_k[1].fill_(1)).field == "index_k_cache"


def test_dummy_page_counts_where_padding_has_slot_minus_one() -> None:
    """Nothing stores padding then, so a row of slot 0 is one whose slot was clamped."""
    layer = {"kv_cache_dtype": BF16, "padding_slot": -1}
    clean = seen(case(*TWO, Eager(mode=VERIFY), layer=layer, index_topk=4), Feed.CHAIN)
    assert clean.judged(lambda layer: None) is None
    finding = clean.found(lambda layer: layer.steps[0].caches.kv[0].fill_(1))
    assert finding.place == "slot 0 (no running request), latent element 0"
    finding = clean.found(lambda layer: layer.steps[0].caches.index_k[0].fill_(1))
    assert (finding.field, finding.place) == ("index_k_cache", "slot 0 (no running request), key element 0")
