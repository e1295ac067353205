"""Holds streams until the host releases them, so that no race is decided by the speed of a machine.

The kernel needs Triton's compiler, so this module is imported only where a stream is held.
"""

# mypy: disable-error-code="untyped-decorator"
# (Triton ships no types for its decorator)

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

MOST_NANOSECONDS = 100_000_000  # limit, for a host that waits for the held stream and would never release it


class Holds:
    """Kernels that occupy streams of a device until the host releases them. ``holds_on`` makes one per device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._released = torch.zeros(1, dtype=torch.int32).pin_memory()
        self._last = 0
        with torch.cuda.device(device):
            self.hold()  # compiles the kernel now, and not in the middle of a case
        self.release()

    def hold(self) -> None:
        """Make work that is queued on the current stream from now on wait for ``release``, for at most 0.1 s."""
        self._last += 1
        with torch.cuda.device(self._device):
            hold_kernel[1,](self._released, self._last, MOST_NANOSECONDS, num_warps=1)

    def release(self) -> None:
        """Release every held stream."""
        self._released.fill_(self._last)


@cache
def holds_on(device: torch.device) -> Holds:
    return Holds(device)


@triton.jit(do_not_specialize=["number", "most"])
def hold_kernel(released: tl.tensor, number: tl.tensor, most: tl.tensor) -> None:
    """Ends when ``released`` [1] int32, which the host writes, reaches ``number``, or after ``most`` nanoseconds."""
    began = globaltimer()
    held = tl.load(released, volatile=True) < number
    while held:
        held = (tl.load(released, volatile=True) < number) & (globaltimer() - began < most)
