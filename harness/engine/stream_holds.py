"""Holds streams back until the host lets go, so that no race is won or lost by the speed of a machine.

Compiled code only; imported late.
"""

# mypy: disable-error-code="untyped-decorator"
# (Triton ships no types for its decorator)

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

MOST_NANOSECONDS = 100_000_000  # for a host that waits for the stream, and so would never let go


class Holds:
    """Work on any stream of a device that ends when the host releases it. Make one a device, by ``holds_on``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._released = torch.zeros(1, dtype=torch.int32).pin_memory()
        self._last = 0
        with torch.cuda.device(device):
            self.hold()  # compiles: never in the middle of a case
        self.release()

    def hold(self) -> None:
        """What the current stream is given from now on waits for ``release``, but for 0.1 s at most."""
        self._last += 1
        with torch.cuda.device(self._device):
            hold_kernel[1,](self._released, self._last, MOST_NANOSECONDS, num_warps=1)

    def release(self) -> None:
        """Let go of whatever is held."""
        self._released.fill_(self._last)


@cache
def holds_on(device: torch.device) -> Holds:
    return Holds(device)


@triton.jit(do_not_specialize=["number", "most"])
def hold_kernel(released: tl.tensor, number: tl.tensor, most: tl.tensor) -> None:
    """Ends when ``released`` [1] int32, which the host writes to, reaches ``number``, or after ``most`` nanoseconds."""
    began = globaltimer()
    held = tl.load(released, volatile=True) < number
    while held:
        held = (tl.load(released, volatile=True) < number) & (globaltimer() - began < most)
