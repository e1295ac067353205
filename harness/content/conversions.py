"""Conversions of small integers and of float bits to tensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Small = NDArray[np.int16]


def places_of(slots: Ints, version: int) -> list[tuple[int, int]]:
    return [(int(slot), version) for slot in slots]


def signs_of(random: NDArray[np.generic]) -> Small:
    """+1 where the lowest bit is set, else -1."""
    return ((random.astype(np.int64) & 1) * 2 - 1).astype(np.int16)


def bf16_of_integers(integers: Small, unit: float) -> torch.Tensor:
    """The integers times ``unit`` as bf16. The products must be representable; they are not rounded."""
    bits = (integers.astype(np.float32) * np.float32(unit)).view(np.uint32) >> 16
    return as_bf16(bits.astype(np.uint16))


def bf16_bits(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the numbers rounded to bf16, to nearest even."""
    bits = numbers.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


def as_bf16(bits: NDArray[np.uint16]) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def as_e4m3(numbers: NDArray[np.float32]) -> torch.Tensor:
    """The numbers rounded to e4m3, to nearest even. Their magnitudes must be at most 448."""
    return torch.from_numpy(numbers).to(torch.float8_e4m3fn)
