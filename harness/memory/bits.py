"""Tensors as bytes: comparison of bits, unwritten memory, strided rows."""

from __future__ import annotations

import torch

GAP = 16  # elements between rows of strided inputs: whole vectors of 16 bytes, as in slices of a wider tensor


def unwritten_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, strided: bool) -> torch.Tensor:
    """A tensor of ``shape`` whose bytes are all 0xFF: NaN in a floating-point type, -1 in a signed integer type.

    strided: the last dimension is dense, and a gap of ``GAP`` elements follows each of its rows. A tensor of one
    dimension takes every other element of its memory.
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
    """A uint8 view of ``tensor``. Its last dimension is longer by the size of an element in bytes."""
    return tensor.view(torch.uint8)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes, on any devices. NaN is compared by its bits, too."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    # Not ``contiguous()``: it returns a tensor of at most one element as it is, whatever its stride.
    a, b = (as_bytes(tensor.detach().clone(memory_format=torch.contiguous_format).view(-1)) for tensor in (one, other))
    return torch.equal(a.to(b.device), b)


NAN_BYTE = 0xFF  # NaN in bf16, float32, float64 and e4m3 if all bytes have this value
NAN_WORD = -1  # an int32 of such bytes
