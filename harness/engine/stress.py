"""Conditions of a busy server that an idle machine does not have: late inputs, slow streams, reused memory.

On an idle machine a missing wait goes unnoticed, because queued work has long finished, and memory that was freed a
moment ago still holds its old content. On a GPU, calls alternate: in one, the engine's stream is held, so that its
inputs arrive late; in the next, every other stream that the backend uses is held. The held stream is released after all
other streams have had time to run ahead. A backend that synchronises its streams where it must sees no difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

RUN_AHEAD_S = 0.05  # for streams that may legitimately wait for the held one
UNSEEN_S = 0.002  # for streams that are not made current through torch


class Delivery:
    """Copies the engine's inputs to their fixed addresses on the device: at once or, if ``late``, behind other work.

    A copy from the host makes the host wait for the stream. Late content is therefore copied to the device first, and
    from there to its address in stream order.
    """

    def __init__(self, device: torch.device, late: bool) -> None:
        self.device = device
        self.late = late and device.type == "cuda"
        self.calls = 0  # number of calls of ``under_stress``
        self._waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def send(self, target: torch.Tensor, content: torch.Tensor) -> None:
        """Set the content, given on the host, that ``target`` has from the next ``deliver`` on."""
        if self.late:
            self._waiting[target.data_ptr()] = target, content.to(self.device, copy=True)
        else:
            _refresh(target, content)

    def deliver(self) -> None:
        """Copy late content to its addresses, on the current stream."""
        for target, staged in self._waiting.values():
            _refresh(target, staged)
        self._waiting.clear()


def _refresh(target: torch.Tensor, content: torch.Tensor) -> None:
    """Write as an engine's kernels do, of which torch knows nothing: the tensor's version stays."""
    target.data.copy_(content)


def under_stress(delivery: Delivery) -> AbstractContextManager[None]:
    """Context for a preparation and the work that depends on it. In turn, inputs arrive late or other streams are slow.

    Without stress, inputs are delivered at once.
    """
    delivery.calls += 1
    if not delivery.late or delivery.calls % 2:
        return late_inputs(delivery)
    delivery.deliver()
    return slow_side_streams(delivery.device)


@contextmanager
def late_inputs(delivery: Delivery) -> Iterator[None]:
    """Hold the current stream, and deliver the inputs behind the hold.

    The hold ends when the body is done and the side streams have run as far as they can.
    """
    if not delivery.late:
        delivery.deliver()
        yield
        return
    from nsa_oracle.harness.engine.stream_holds import holds_on  # late: it needs Triton's compiler

    holds = holds_on(delivery.device)
    holds.hold()
    delivery.deliver()
    try:
        with _side_streams(delivery.device) as side_streams:
            yield
        time.sleep(UNSEEN_S)
        _run_ahead(side_streams)
    finally:
        holds.release()


@contextmanager
def slow_side_streams(device: torch.device) -> Iterator[None]:
    """Hold each other stream from its first use until the body is done and the current stream has run ahead."""
    if device.type != "cuda":
        yield
        return
    from nsa_oracle.harness.engine.stream_holds import holds_on

    holds = holds_on(device)
    try:
        with _side_streams(device, holds.hold) as side_streams:
            yield
        if side_streams:
            _run_ahead([torch.cuda.current_stream(device)])
    finally:
        holds.release()


@contextmanager
def _side_streams(
    device: torch.device, on_first_use: Callable[[], None] = lambda: None
) -> Iterator[list[torch.cuda.Stream]]:
    """Yields the streams that become current in the body, except the current one. Calls ``on_first_use`` on each."""
    set_stream, engine, streams = torch.cuda.set_stream, torch.cuda.current_stream(device), list[torch.cuda.Stream]()

    def set_recorded_stream(stream: torch.cuda.Stream) -> None:
        set_stream(stream)
        if stream != engine and stream not in streams:
            streams.append(stream)
            on_first_use()

    torch.cuda.set_stream = set_recorded_stream
    try:
        yield streams
    finally:
        torch.cuda.set_stream = set_stream


def _run_ahead(streams: Sequence[torch.cuda.Stream]) -> None:
    """Wait until ``streams`` have finished their work, for at most ``RUN_AHEAD_S`` seconds."""
    deadline = time.monotonic() + RUN_AHEAD_S
    while time.monotonic() < deadline and not all(stream.query() for stream in streams):
        time.sleep(0.0005)
