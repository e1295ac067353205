"""What a busy server does to a backend and a quiet test bench does not: late inputs, slow streams, reused memory.

A quiet stream hides a missing wait, for whatever was queued has long been done; memory that was freed a moment ago
still holds what it held. On a GPU, calls take turns: in one the engine's stream is held back, so that its inputs arrive
late; in the next every other stream that the backend turns to is. Who is held is let go when all others have had time
to run ahead. A backend that waits where it must sees no difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

RUN_AHEAD_S = 0.05  # for streams that may be waiting, rightly, for the one that is held
UNSEEN_S = 0.002  # for streams that torch was not told of


class Delivery:
    """Delivers the engine's inputs to their fixed addresses on the device, at once or, ``late``, behind other work.

    A copy from the host makes the host wait for the stream. So what is to come late is brought to the device first, and
    moves to its place in the order of the stream.
    """

    def __init__(self, device: torch.device, late: bool) -> None:
        self.device = device
        self.late = late and device.type == "cuda"
        self.calls = 0  # that were made under stress
        self._waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def send(self, target: torch.Tensor, content: torch.Tensor) -> None:
        """``content``, on the host, is what ``target`` holds from the next ``deliver`` on."""
        if self.late:
            self._waiting[target.data_ptr()] = target, content.to(self.device, copy=True)
        else:
            target.copy_(content)

    def deliver(self) -> None:
        """Put everything in its place."""
        for target, staged in self._waiting.values():
            target.copy_(staged)
        self._waiting.clear()


def under_stress(delivery: Delivery) -> AbstractContextManager[None]:
    """Around a preparation and what depends on it: inputs arrive late, or in every other call other streams are slow.

    Without stress, inputs are delivered at once.
    """
    delivery.calls += 1
    if not delivery.late or delivery.calls % 2:
        return late_inputs(delivery)
    delivery.deliver()
    return slow_side_streams(delivery.device)


@contextmanager
def late_inputs(delivery: Delivery) -> Iterator[None]:
    """Hold the current stream and deliver behind: until the body is done, and side streams are as far as they get."""
    if not delivery.late:
        delivery.deliver()
        yield
        return
    from nsa_oracle.harness.engine.stream_holds import holds_on  # late: it is made of compiled code

    holds = holds_on(delivery.device)
    holds.hold()
    delivery.deliver()
    try:
        with _side_streams(delivery.device) as others:
            yield
        time.sleep(UNSEEN_S)
        _run_ahead(others)
    finally:
        holds.release()


@contextmanager
def slow_side_streams(device: torch.device) -> Iterator[None]:
    """Hold any stream but the current one, once it is turned to: until the body is done, and so is the current one."""
    if device.type != "cuda":
        yield
        return
    from nsa_oracle.harness.engine.stream_holds import holds_on

    holds = holds_on(device)
    try:
        with _side_streams(device, holds.hold) as others:
            yield
        if others:
            _run_ahead([torch.cuda.current_stream(device)])
    finally:
        holds.release()


@contextmanager
def _side_streams(device: torch.device, first: Callable[[], None] = lambda: None) -> Iterator[list[torch.cuda.Stream]]:
    """The streams that become current meanwhile, besides the one that is; ``first`` is called when one does."""
    set_stream, engine, others = torch.cuda.set_stream, torch.cuda.current_stream(device), list[torch.cuda.Stream]()

    def set_noted_stream(stream: torch.cuda.Stream) -> None:
        set_stream(stream)
        if stream != engine and stream not in others:
            others.append(stream)
            first()

    torch.cuda.set_stream = set_noted_stream
    try:
        yield others
    finally:
        torch.cuda.set_stream = set_stream


def _run_ahead(streams: Sequence[torch.cuda.Stream]) -> None:
    """Wait until ``streams`` have done what they were given, or have had time to."""
    until = time.monotonic() + RUN_AHEAD_S
    while time.monotonic() < until and not all(stream.query() for stream in streams):
        time.sleep(0.0005)
