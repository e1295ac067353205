"""Cases whose far memory takes much of a GPU wait for each other."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from nsa_oracle.harness.engine import far_memory
from nsa_oracle.harness.memory import far_apart
from nsa_oracle.harness.scenarios.setup import Inputs, Layer, Setup
from nsa_oracle.reference.types import KVCacheDtype

SMALL: Any = {"index_topk": 4, "num_steps": 1, "num_draft_tokens": 1}


def places(folder: Path, count: int) -> list[Path]:
    return [folder / f"{number}.lock" for number in range(count)]


@pytest.mark.parametrize(("there", "needed", "at_a_time"), [(2, 1, 2), (4, 2, 2), (3, 2, 1), (2, 9, 1)])
def test_cases_that_need_memory_of_one_gpu_take_turns(tmp_path: Path, there: int, needed: int, at_a_time: int) -> None:
    """At most as many at a time as the places are for; nobody waits while there are enough."""
    all_hold, done = threading.Barrier(at_a_time + 1), threading.Event()
    holding: list[int] = []

    def hold(number: int) -> None:
        with far_memory._turn(places(tmp_path, there), needed):
            holding.append(number)
            all_hold.wait()
            done.wait()

    def hold_late() -> None:
        with far_memory._turn(places(tmp_path, there), needed):
            holding.append(-1)

    holders = [threading.Thread(target=hold, args=(number,)) for number in range(at_a_time)]
    for holder in holders:
        holder.start()
    all_hold.wait()  # so that many got in
    late = threading.Thread(target=hold_late)
    late.start()
    late.join(0.2)
    assert sorted(holding) == list(range(at_a_time))
    done.set()
    for thread in (*holders, late):
        thread.join()
    assert sorted(holding) == [-1, *range(at_a_time)]


def test_case_that_needs_little_waits_for_nobody(tmp_path: Path) -> None:
    with far_memory._turn(places(tmp_path, 1), 1), far_memory._turn(places(tmp_path, 1), 0):
        pass


def test_turn_ends_with_an_exception(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^of the case$"), far_memory._turn(places(tmp_path, 2), 2):
            raise ValueError("of the case")


def test_what_a_case_needs_where_the_driver_maps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: processes must wait for each other."""
    monkeypatch.setattr(far_apart, "driver_bindings", lambda: None)
    table = Setup(**SMALL, page_size=1, max_context_len=4096, pool_size=50, inputs=Inputs(far_req_to_token=True))
    assert 3 << 33 <= far_memory.far_bytes(table) < (3 << 33) + (3 * 50 << 21)
    assert far_memory.far_bytes(table) > far_memory.LITTLE


def test_what_a_case_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A granule of 2 MiB for each row with a gap; the whole reach where rows are close; and the fillers of the gaps."""
    monkeypatch.setattr(far_apart, "driver_bindings", object)
    granule, fillers, engines = 2 << 20, 34 << 20, 3
    table = Setup(**SMALL, page_size=1, max_context_len=4096, pool_size=50, inputs=Inputs(far_req_to_token=True))
    assert far_memory.far_bytes(table) == engines * (50 * granule + fillers)
    assert far_memory.far_bytes(table) <= far_memory.LITTLE
    few = Setup(**SMALL, page_size=64, max_context_len=64, pool_size=1, layer=Layer(far_slots=True))
    assert far_memory.far_bytes(few) == engines * (256 * granule + 4 * granule + 2 * fillers)
    fp8 = Layer(far_slots=True, kv_cache_dtype=KVCacheDtype.FP8)
    many = Setup(**SMALL, page_size=64, max_context_len=640, pool_size=50, layer=fp8)  # 503 pages, 32,192 slots
    assert abs(far_memory.far_bytes(many) / engines - (4 << 30) - 503 * granule) < 3 * fillers
