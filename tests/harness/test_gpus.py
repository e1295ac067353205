"""Which GPU is left to a process that shares a machine with others."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_oracle.harness import processes
from nsa_oracle.harness.plugin import share_gpus


@pytest.mark.parametrize(
    ("count", "seen", "left"),
    [
        (0, None, [None, None, None]),
        (1, None, [None, None, None]),
        (1, "3", ["3", "3", "3"]),
        (2, None, ["0", "1", "0"]),
        (2, "5,GPU-1f", ["5", "GPU-1f", "5"]),
    ],
)
def test_processes_take_turns(
    count: int, seen: str | None, left: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for number, expected in enumerate(left):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen or "")  # first, so that what take_one sets is undone
        if seen is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        processes.take_gpu(number)
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == expected


@pytest.mark.parametrize(
    ("session", "left"),
    [
        (SimpleNamespace(), "4,5"),  # the controller, whose workers inherit what it leaves
        (SimpleNamespace(workerinput={"workerid": "gw0"}), "4"),
        (SimpleNamespace(workerinput={"workerid": "gw13"}), "5"),
    ],
)
def test_workers_of_xdist_take_turns(session: Any, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    share_gpus(session)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left
