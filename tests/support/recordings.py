"""Runs of the simulated engine that are recorded, and what a record says of each call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from nsa_oracle.harness import record
from nsa_oracle.harness.engine.engine import Engine
from nsa_oracle.harness.engine.observations import Conditions
from nsa_oracle.harness.judge import sentinels
from nsa_oracle.harness.protocol import BackendFactory, MultiStepBackend
from nsa_oracle.harness.recorder.wrapper import Tables, flush
from nsa_oracle.harness.scenarios.scenario import Scenario
from nsa_oracle.harness.subjects.default import optimized_layer
from nsa_oracle.reference.types import BackendConfig

CPU = torch.device("cpu")
OF_A_CALL = ("act", "mode", "bs", "pool_rows", "seq_lens", "seq_lens_cpu", "seq_lens_sum", "accept_lengths")


def recorded_run(scenario: Scenario, factory: BackendFactory, file: Path, tables: Tables = "none") -> Path:
    """``file``, which records what the engine gives to a backend of ``factory`` in the events of ``scenario``."""
    built = list[MultiStepBackend]()

    def recorded(config: BackendConfig, req_to_token: torch.Tensor, names: tuple[str, ...]) -> MultiStepBackend:
        backend = factory(config, req_to_token, names)
        built.append(record(backend, file, config=config, req_to_token=req_to_token, tables=tables))
        return built[-1]

    engine = Engine(scenario, recorded, optimized_layer, CPU, Conditions(sentinels(scenario.setup)[0], 0))
    for event in scenario.events:
        for _ in engine.run(event):
            pass
    assert flush(built[0])
    return file


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def calls(file: Path) -> list[dict[str, Any]]:
    """What the record says of each replay and eager call, without where and when it was made."""
    found = []
    for line in lines(file):
        if line.get("act") in ("replay", "eager"):
            called = {name: line.get(name) for name in (*OF_A_CALL, "extend_lens")}
            found.append(called | {"table": _live(line) if "table" in line else None})
    return found


def _live(line: dict[str, Any]) -> list[list[int]]:
    """The slots of the tokens of each request."""
    slots = [[first + i for first, count in row for i in range(count)] for row in line["table"]]
    return [row[:length] for row, length in zip(slots, line["seq_lens"], strict=True)]
