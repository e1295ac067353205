"""Made-up keys: each kind is what it says, whatever the sizes, and the same for the same case on every machine."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch

from nsa_oracle.harness.checks.caches import with_canonical_nans
from nsa_oracle.harness.content.edge_keys import EdgeKeys, edge_keys
from nsa_oracle.harness.content.key_kinds import KeyKind
from nsa_oracle.harness.engine.allocation import new_caches
from nsa_oracle.harness.memory.bits import as_bytes
from nsa_oracle.reference.kv_cache import load_index_k, quantize, store_cache
from nsa_oracle.reference.types import KVCacheDtype
from tests.support.layer_cases import case

LAYERS = [{}, {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "kv_cache_dtype": KVCacheDtype.FP8}]
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=["small", "production"])
TINY = torch.finfo(torch.bfloat16).tiny


def made_up(layer: dict[str, Any], seed: int = 3, run: int = 0, call: int = 1, **sizes: Any) -> EdgeKeys:
    setup = case(layer=layer, **sizes).setup
    assert setup.layer is not None
    return edge_keys(setup, setup.layer.attention_config(), seed, run, call)


def tiles_of(layer: dict[str, Any], kind: KeyKind) -> list[torch.Tensor]:
    """The tiles of keys, float32, and of index keys, of the rows of one kind in several calls."""
    found = []
    for call in range(12):
        given = made_up(layer, call=call)
        row = given.kinds.index(kind)
        latent = given.inputs.k[row].float()
        rank = len(latent) - len(latent) // 9 if layer else 64
        found += [*latent[:rank].view(4, -1), given.inputs.index_k[row].float()]
    return found


def ties(tile: torch.Tensor) -> torch.Tensor:
    """Which elements lie half-way between two e4m3 numbers, divided by the scale of their tile."""
    values, scales = quantize(tile[None].to(torch.bfloat16), len(tile))
    scaled, rounded = tile / scales[0], values[0].float()
    other = 2 * scaled - rounded  # the neighbour that would be as near
    return (other == other.to(torch.float8_e4m3fn).float()) & (other != rounded)


@each_layer
def test_each_kind_once_in_slots_of_their_own(layer: dict[str, Any]) -> None:
    given = made_up(layer)
    slots = given.inputs.out_cache_loc.tolist()
    assert set(given.kinds) == set(KeyKind)
    assert len(set(slots)) == len(slots) == len(given.kinds)
    assert all(4 <= slot < 4 * case().setup.num_pages for slot in slots), "the dummy page is nobody's"
    assert [given.kind_in(slot) for slot in slots] == list(given.kinds)
    assert given.kind_in(0) is None


def test_fewer_slots_than_kinds() -> None:
    sizes = {"page_size": 1, "max_context_len": 2, "pool_size": 1, "num_draft_tokens": 1}
    found = [made_up({}, call=call, **sizes) for call in range(len(KeyKind))]
    assert all(len(set(given.inputs.out_cache_loc.tolist())) == len(given.kinds) < len(KeyKind) for given in found)
    assert {kind for given in found for kind in given.kinds} == set(KeyKind)


@each_layer
def test_tiles_are_of_their_kind(layer: dict[str, Any]) -> None:
    def some(kind: KeyKind) -> list[torch.Tensor]:
        """Index keys always are of the kind, of a key's tiles one at least."""
        holds = {
            KeyKind.NAN: lambda tile: tile.isnan().any(),
            KeyKind.INFINITE: lambda tile: tile.isinf().any(),
            KeyKind.ZEROS: lambda tile: (tile == 0).all(),
            KeyKind.DENORMAL: lambda tile: ((tile != 0) & (tile.abs() < TINY)).all(),
            KeyKind.LARGEST: lambda tile: tile.abs().max() == torch.finfo(torch.bfloat16).max,
            KeyKind.HALFWAY: lambda tile: bool(ties(tile).sum() == len(tile) - 1),
            KeyKind.EQUAL: lambda tile: len(tile.abs().unique()) == 1,
        }[kind]
        tiles = tiles_of(layer, kind)
        held = [bool(holds(tile)) for tile in tiles]
        assert all(any(held[row : row + 4]) and held[row + 4] for row in range(0, len(held), 5))
        assert not all(held)
        return [tile for tile, holds in zip(tiles, held, strict=True) if holds]

    assert all(int(tile.isnan().sum()) == 1 for tile in some(KeyKind.NAN))
    assert {float(tile[tile.isinf()][0]) for tile in some(KeyKind.INFINITE)} == {torch.inf, -torch.inf}
    assert all(0 < int(tile.signbit().sum()) < len(tile) for tile in some(KeyKind.ZEROS))
    assert len({float(tile[0].abs()) for tile in some(KeyKind.EQUAL)}) > 12
    for kind in (KeyKind.DENORMAL, KeyKind.LARGEST, KeyKind.HALFWAY):
        some(kind)


def test_the_same_case_has_the_same_keys_and_no_other_has() -> None:
    def reported(**changes: int) -> str:
        inputs = made_up({}, **changes).inputs
        return str([as_bytes(inputs.k).tolist(), as_bytes(inputs.index_k).tolist(), inputs.out_cache_loc.tolist()])

    assert reported() == reported()
    assert len({reported(), reported(seed=4), reported(run=1), reported(call=2)}) == 4


def test_bytes_are_the_same_on_every_machine() -> None:
    inputs = made_up({}).inputs
    content = [as_bytes(inputs.k), as_bytes(inputs.index_k), as_bytes(inputs.out_cache_loc)]
    assert [zlib.crc32(part.numpy().tobytes()) for part in content] == [1632037127, 2672966420, 3285834027]


@each_layer
def test_nan_is_like_any_other_and_nothing_else_is(layer: dict[str, Any]) -> None:
    given = made_up(layer)
    setup = case(layer=layer).setup
    assert setup.layer is not None
    config = setup.layer.attention_config()
    caches = new_caches(setup, config, setup.num_pages, torch.device("cpu"), 0x7F)
    store_cache(config, caches, given.inputs)
    slots = given.inputs.out_cache_loc
    one = with_canonical_nans(config, caches, slots)
    values, scales = load_index_k(config, one.index_k, slots)
    before, scales_before = load_index_k(config, caches.index_k, slots)
    assert values.isnan().any()
    assert torch.equal(values.nan_to_num(), before.nan_to_num())
    assert torch.equal(scales.nan_to_num(), scales_before.nan_to_num())
    for cache, of_one in zip((caches.kv.flatten(1), caches.index_k), (one.kv.flatten(1), one.index_k), strict=True):
        changed = as_bytes(cache) != as_bytes(of_one)
        assert (as_bytes(of_one)[changed] == 0xFF).all()
    others = torch.tensor([slot for slot in range(len(caches.kv)) if slot not in slots.tolist()])
    assert torch.equal(as_bytes(one.kv[others]), as_bytes(caches.kv[others]))
