"""An input of the engine between bands of poison."""

from __future__ import annotations

import torch

from nsa_oracle.harness.memory.far_apart import BEYOND_31_BITS, far_apart
from nsa_oracle.harness.memory.poison import ALIGNED_WORDS, band


class BandedInput:
    """An input of the engine: memory at a fixed address, with poison at either end, and a host copy of all of it.

    A read past either end returns poison. A write there is detected like a write to the input itself. far: rows, each
    between poison, lie so far apart that the offset of the last one, in elements, needs 64 bits.
    """

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, sentinel: int, device: torch.device, far: bool = False
    ) -> None:
        rows, columns = shape
        margin = band(-(-max(columns, 1) // ALIGNED_WORDS) * ALIGNED_WORDS)  # at least a row; keeps the alignment
        inside: tuple[slice, ...]
        if far:
            self.expected = torch.full((rows, columns + 2 * margin), sentinel, dtype=dtype)
            self.memory = far_apart(self.expected.to(device, copy=True), BEYOND_31_BITS)
            inside = (slice(None), slice(margin, margin + columns))
        else:
            self.expected = torch.full((rows * columns + 2 * margin,), sentinel, dtype=dtype)
            self.memory = self.expected.to(device, copy=True)
            inside = (slice(margin, margin + rows * columns),)
        self.content = self.expected[inside].view(shape)  # on the host: the content to send next
        self.tensor = self.memory[inside].view(shape)  # on the device

    def is_modified(self) -> bool:
        return not torch.equal(self.memory.cpu(), self.expected)
