"""What a busy server does to a backend and a quiet test bench does not: late inputs, slow streams, reused memory.

A quiet stream hides a missing wait, for whatever was queued has long been done; memory that was freed a moment ago
still holds what it held. On a GPU, calls take turns: before one the engine's stream is busy, so that its inputs arrive
late; in the next every other stream that the backend turns to is busy. A backend that waits where it must sees no
difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

BUSY_CYCLES = 20_000_000  # about 10 ms: longer than the host takes to prepare a batch
SIDE_BUSY_CYCLES = 5 * BUSY_CYCLES  # and to spoil free memory and launch the graph, with other processes on the GPU


class Delivery:
    """Delivers the engine's inputs to their fixed addresses on the device, at once or, ``late``, behind other work.

    A copy from the host makes the host wait for the stream. So what is to come late is brought to the device first, and
    moves to its place in the order of the stream.
    """

    def __init__(self, device: torch.device, late: bool) -> None:
        self.device = device
        self.late = late and device.type == "cuda"
        self._waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def send(self, target: torch.Tensor, content: torch.Tensor) -> None:
        """``content``, on the host, is what ``target`` holds from the next ``deliver`` on."""
        if self.late:
            self._waiting[target.data_ptr()] = target, content.to(self.device, copy=True)
        else:
            target.copy_(content)

    def deliver(self, busy: bool = False) -> None:
        """Put everything in its place; if ``busy``, the stream does something else first."""
        if busy and self.late:
            _keep_busy(BUSY_CYCLES)
        for target, staged in self._waiting.values():
            target.copy_(staged)
        self._waiting.clear()


@contextmanager
def busy_side_streams(device: torch.device) -> Iterator[None]:
    """Whenever the current stream is changed to another one, that one has something else to do first."""
    if device.type != "cuda":
        yield
        return
    set_stream, seen = torch.cuda.set_stream, {torch.cuda.current_stream(device).cuda_stream}

    def set_busy_stream(stream: torch.cuda.Stream) -> None:
        set_stream(stream)
        if stream.cuda_stream not in seen:
            seen.add(stream.cuda_stream)
            _keep_busy(SIDE_BUSY_CYCLES)

    torch.cuda.set_stream = set_busy_stream
    try:
        yield
    finally:
        torch.cuda.set_stream = set_stream


def _keep_busy(cycles: int) -> None:
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
