"""Memory seen as bytes: equal bits, unwritten memory, strided rows."""

from __future__ import annotations

import torch

GAP = 16  # elements between rows of strided inputs: whole vectors of 16 bytes, as slices of something wider have


def unwritten_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, strided: bool) -> torch.Tensor:
    """Memory of ``shape``, every byte 0xFF: NaN, or -1. strided: rows, and what they consist of, lie apart.

    The last dimension stays dense, unless it is the only one: that has every other element of its memory.
    """
    if not strided or not shape:
        whole = memory = torch.empty(*shape, dtype=dtype, device=device)
    elif len(shape) == 1:
        whole = torch.empty(*shape, 2, dtype=dtype, device=device)
        memory = whole[:, 0]
    else:
        whole = torch.empty(*shape[:-1], shape[-1] + GAP, dtype=dtype, device=device)
        memory = whole[..., : shape[-1]]
    as_bytes(whole.view(-1)).fill_(NAN_BYTE)
    return memory


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of ``tensor``: uint8, the last dimension as many times longer. A view."""
    return tensor.view(torch.uint8)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes, wherever they are. NaN is like any other."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    # Not ``contiguous``: what has at most one element counts as that, whatever its stride.
    a, b = (as_bytes(tensor.detach().clone(memory_format=torch.contiguous_format).view(-1)) for tensor in (one, other))
    return torch.equal(a.to(b.device), b)


NAN_BYTE = 0xFF  # all bytes so: NaN in bf16, float32, float64 and e4m3
NAN_WORD = -1  # an int32 of such bytes
