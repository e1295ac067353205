"""Memory that is spread out: how far, and what a host that gives less of it is reported."""

from __future__ import annotations

import mmap

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
