"""Unwritten memory of inputs, dense and strided."""

from __future__ import annotations

import pytest
import torch

from nsa_oracle.harness.memory.bits import unwritten_memory


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 32), (0, 2, 32), (1,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_unwritten_memory_of_strided_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Nothing in it or around it is a number that somebody could use, and vectors of 16 bytes stay aligned."""
    dense, apart = (unwritten_memory(shape, dtype, torch.device("cpu"), strided) for strided in (False, True))
    assert dense.is_contiguous()
    assert apart.shape == dense.shape == shape
    if len(shape) == 1:
        assert apart.stride() == (2,)
    else:
        assert apart.stride(-1) == 1
        assert apart.stride(-2) == shape[-1] + 16
    memory = torch.empty(0, dtype=torch.uint8).set_(apart.untyped_storage())
    assert memory.eq(0xFF).all()
