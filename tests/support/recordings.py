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
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, SpecInfo

CPU = torch.device("cpu")
OF_A_CALL = ("act", "mode", "bs", "pool_rows", "seq_lens", "seq_lens_cpu", "seq_lens_sum", "accept_lengths")
CONFIG = {
    "page_size": 4,
    "max_context_len": 32,
    "index_topk": 8,
    "speculative_num_steps": 1,
    "speculative_num_draft_tokens": 2,
}
HEAD: dict[str, Any] = {"nsa_oracle_record": 1, "session": "a", "config": CONFIG, "pool": [8, 32], "tables": "none"}


class Spy:
    """A backend that keeps what it is given."""

    known = 7

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.changed = "no"

    def init_forward_metadata(self, forward_batch: Any) -> str:
        self.calls.append((forward_batch,))
        if forward_batch == "raise":
            raise LookupError("the backend's own")
        return "returned"

    def init_forward_metadata_replay_cuda_graph(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))


def batch(count: int = 2, mode: ForwardMode = ForwardMode.DRAFT_EXTEND) -> ForwardBatch:
    numbers = torch.arange(1, count + 1)
    return ForwardBatch(mode, count, numbers - 1, numbers, numbers, 3, spec_info=SpecInfo(numbers % 2))


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
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def calls(file: Path) -> list[dict[str, Any]]:
    """What the record says of each replay and eager call, without where and when it was made."""
    found = []
    for line in lines(file):
        if line.get("act") in ("replay", "eager"):
            called = {name: line.get(name) for name in (*OF_A_CALL, "extend_lens")}
            found.append(called | {"table": _live(line) if "table" in line else None})
    return found


def _live(line: dict[str, Any]) -> list[list[int]]:
    """The slots of the tokens of each request; of none that looks like padding, whose row an import does not keep."""
    slots = [[first + i for first, count in row for i in range(count)] for row in line["table"]]
    requests = zip(slots, line["pool_rows"], line["seq_lens"], strict=True)
    return [row[:length] if (pool_row, length) != (0, 1) else [] for row, pool_row, length in requests]


def called(mode: str, rows: list[int], lengths: list[int], bs: int | None = None, **more: Any) -> dict[str, Any]:
    """A replay in the graph of ``bs`` requests, or an eager call."""
    act = "eager" if bs is None else "replay"
    size = len(rows) if bs is None else bs
    numbers = {"pool_rows": rows, "seq_lens": lengths, "seq_lens_cpu": lengths}
    return {"call": act, "act": act, "mode": mode, "bs": size, **numbers, **more}


def written(tmp_path: Path, *lines: dict[str, Any], head: dict[str, Any] = HEAD) -> Path:
    file = tmp_path / "server.jsonl"
    numbered = [{"n": number, **line} for number, line in enumerate(lines)]
    file.write_text("".join(json.dumps(line) + "\n" for line in (head, *numbered)))
    return file
