"""Kernels that leave their tensors if they are told to, and memory of which they are given a part."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_oracle.harness.interpreter.bounds import hand_out


@triton.jit
def load_kernel(source: tl.tensor, target: tl.tensor, first: tl.tensor, count: tl.tensor) -> None:
    """Loads four entries from ``first`` on, those from ``count`` on masked off, and uses none."""
    lanes = tl.arange(0, 4)
    tl.load(source + first + lanes, mask=lanes < count, other=0)
    tl.store(target, 1)


@triton.jit
def store_kernel(target: tl.tensor, place: tl.tensor) -> None:
    tl.store(target + place, 1)


@triton.jit
def add_kernel(target: tl.tensor, place: tl.tensor) -> None:
    tl.atomic_add(target + place, 1)


@triton.jit
def through_integers_kernel(target: tl.tensor, address: tl.tensor) -> None:
    tl.store(address.to(tl.pointer_type(tl.int32)), 7)
    tl.store(target, 1)


def memory() -> tuple[torch.Tensor, torch.Tensor]:
    """The memory of an input of 16 entries, and the part of 4 that a batch has."""
    whole = torch.zeros(16, dtype=torch.int32)
    hand_out(whole[8:12], whole)
    return whole, whole[8:12]
