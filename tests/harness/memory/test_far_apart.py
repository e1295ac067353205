"""Memory that is spread out: how far, and what a host that gives less of it is reported."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import pytest
import torch

from nsa_oracle.harness.errors import ScenarioError
from nsa_oracle.harness.judge import judge
from nsa_oracle.harness.memory import far_apart as far
from nsa_oracle.harness.memory.far_apart import far_apart
from nsa_oracle.harness.scenarios.scenario import Eager, Join
from tests.support.backends.clean import Clean as CleanBackend
from tests.support.layer_cases import case
from tests.support.metadata_cases import VERIFY, factory_of


def test_offset_that_wraps_finds_memory() -> None:
    """Wherever it leads: with a sign or without, of elements or of bytes. Else the process would be gone."""
    rows = 3
    spread = far_apart(torch.ones(rows, 8, dtype=torch.bfloat16))
    reach = spread.stride(0) * (rows - 1)
    for offset in (-(1 << 31), (1 << 31) - 8, (1 << 32) - 8, reach):
        assert spread.as_strided((8,), (1,), spread.storage_offset() + offset).abs().sum() in (0, 8)


def test_more_rows_lie_less_far() -> None:
    """All of a cache together may take so many addresses, and no more."""
    spread = far_apart(torch.zeros(5000, 8, dtype=torch.uint8))
    assert 5000 * spread.stride(0) <= 1 << 42
    assert 10 * spread.stride(0) > 1 << 32


def test_host_that_gives_fewer_addresses_has_them_less_far(monkeypatch: pytest.MonkeyPatch) -> None:
    given = mmap.mmap

    def limited(number: int, count: int, **options: int) -> mmap.mmap:
        if count > 1 << 36:
            raise OSError("not so many")
        return given(number, count, **options)

    monkeypatch.setattr(far.mmap, "mmap", limited)
    spread = far_apart(torch.zeros(40, 8, dtype=torch.uint8))
    assert 39 * spread.stride(0) > 1 << 32
    assert 39 * spread.stride(0) < 1 << 36


def test_host_that_gives_no_addresses_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    def none(number: int, count: int, **_: int) -> None:
        raise OSError("not so many")

    monkeypatch.setattr(far.mmap, "mmap", none)
    with pytest.raises(
        ScenarioError, match=r"^far memory needs \d+ GiB of addresses, and this process may not have them"
    ):
        far_apart(torch.zeros(40, 8, dtype=torch.uint8))
    if device.type == "cpu":
        scenario = case(Join(seq_len=3), Eager(mode=VERIFY), layer={"far_slots": True})
        with pytest.raises(ScenarioError, match=r"^far memory needs "):
            judge(scenario, factory_of(CleanBackend), device)


def test_cases_that_need_far_memory_of_one_gpu_take_turns(tmp_path: Path) -> None:
    """At most as many at a time as there are places; nobody waits for a place while there is one."""
    places = [tmp_path / "first.lock", tmp_path / "second.lock"]
    both_hold, done = threading.Barrier(3), threading.Event()
    holding: list[int] = []

    def hold(number: int) -> None:
        with far._turn(places):
            holding.append(number)
            both_hold.wait()
            done.wait()

    holders = [threading.Thread(target=hold, args=(number,)) for number in (1, 2)]
    for holder in holders:
        holder.start()
    both_hold.wait()  # so two got in
    third = threading.Thread(target=lambda: [holding.append(3) for _ in [0] if _enter(places)])
    third.start()
    third.join(0.2)
    assert sorted(holding) == [1, 2]
    done.set()
    for thread in (*holders, third):
        thread.join()
    assert sorted(holding) == [1, 2, 3]


def _enter(places: list[Path]) -> bool:
    with far._turn(places):
        return True


def test_turn_ends_with_an_exception(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^of the case$"), far._turn([tmp_path / "only.lock"]):
            raise ValueError("of the case")
