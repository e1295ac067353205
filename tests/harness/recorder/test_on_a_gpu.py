"""What only a GPU shows of a recording: copies behind other work, and none within a capture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_oracle.harness import record
from nsa_oracle.harness.recorder import staging
from nsa_oracle.harness.recorder.wrapper import flush
from nsa_oracle.reference.types import ForwardBatch, ForwardMode, SpecInfo
from tests.support.recordings import Spy, lines

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def batch(numbers: torch.Tensor) -> ForwardBatch:
    accepted = SpecInfo((numbers % 2).to(torch.int32))
    mirror = torch.arange(len(numbers))
    return ForwardBatch(ForwardMode.DRAFT_EXTEND, len(numbers), numbers - 1, numbers, mirror, 3, spec_info=accepted)


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("count", [1, 3, 500, 1024, 5000])
def test_numbers_are_those_of_the_call(
    count: int, by_torch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine overwrites its tensors behind the call, in stream order."""
    assert staging._driver() is not None
    if by_torch:
        monkeypatch.setattr(staging, "_driver", lambda: None)
    pool = torch.arange(6000 * 8, dtype=torch.int32, device=CUDA).view(6000, 8)
    wrapped: Any = record(Spy(), tmp_path / "r.jsonl", req_to_token=pool, tables="whole" if count < 10 else "none")
    numbers = torch.zeros(count, dtype=torch.int64, device=CUDA)
    for call in range(100):
        numbers.copy_(torch.arange(1, count + 1) + call)
        given = batch(numbers)
        wrapped.init_forward_metadata(given)
        numbers.fill_(77)
        given.req_pool_indices.fill_(77)
    assert flush(wrapped, 60)
    said = lines(tmp_path / "r.jsonl")[1:]
    assert len(said) == 100
    for call, line in enumerate(said):
        wanted = list(range(1 + call, count + 1 + call))
        assert line["seq_lens"] == wanted
        assert line["pool_rows"] == [number - 1 for number in wanted]
        assert line["accept_lengths"] == [number % 2 for number in wanted]
        if count < 10:
            assert line["table"] == [[[8 * (number - 1), 8]] for number in wanted]


def test_strided_and_odd_tensors_are_copied_with_the_others(tmp_path: Path) -> None:
    copies = staging.Staging().copies(
        {
            "strided": torch.arange(10, device=CUDA)[::2],
            "bytes": torch.arange(3, dtype=torch.uint8, device=CUDA),
            "empty": torch.empty(0, dtype=torch.int32, device=CUDA),
            "host": torch.arange(2),
            **{str(number): torch.full((2,), number, device=CUDA) for number in range(6)},
        }
    )
    torch.cuda.synchronize()
    done, numbers = copies
    assert done()
    found = {name: tensor.tolist() for name, tensor in numbers().items()}
    assert found == {
        "strided": [0, 2, 4, 6, 8],
        "bytes": [0, 1, 2],
        "empty": [],
        "host": [0, 1],
        **{str(number): [number, number] for number in range(6)},
    }


def test_the_host_does_not_wait(tmp_path: Path) -> None:
    """Calls return while their stream is still busy, and are written behind its work."""
    wrapped: Any = record(Spy(), tmp_path / "r.jsonl")
    given = batch(torch.arange(1, 5, device=CUDA))
    wrapped.init_forward_metadata(given)
    assert flush(wrapped, 60)
    torch.cuda._sleep(2_000_000_000)  # about a second
    wrapped.init_forward_metadata(given)
    busy = torch.cuda.Event()
    busy.record()
    assert not busy.query()
    assert len(lines(tmp_path / "r.jsonl")) == 2
    assert flush(wrapped, 60)
    assert len(lines(tmp_path / "r.jsonl")) == 3


def test_a_call_within_a_capture_is_noted_without_copies(tmp_path: Path) -> None:
    wrapped: Any = record(Spy(), tmp_path / "r.jsonl")
    given, graph = batch(torch.arange(1, 5, device=CUDA)), torch.cuda.CUDAGraph()
    work = torch.zeros(4, device=CUDA)
    with torch.cuda.graph(graph):
        wrapped.init_forward_metadata(given)
        work += 1
    graph.replay()
    torch.cuda.synchronize()
    assert flush(wrapped, 60)
    (line,) = lines(tmp_path / "r.jsonl")[1:]
    assert (line["mode"], line["bs"], "seq_lens" in line) == ("DRAFT_EXTEND", 4, False)
