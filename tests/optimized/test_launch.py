"""Every launch finds the compiled code that fits it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from nsa_oracle.harness.memory.far_apart import BEYOND_31_BITS, far_apart
from nsa_oracle.optimized import metadata, topk
from nsa_oracle.optimized.kernels.kv_cache import store_cache_kernel
from nsa_oracle.optimized.kernels.lengths import expand_seqlens_kernel
from nsa_oracle.optimized.kernels.topk import topk_kernel
from nsa_oracle.optimized.launch import Launcher, _check, signature
from nsa_oracle.reference.types import ForwardMode
from tests.support.launches import DEVICE, REQ_TO_TOKEN, fill_arguments, step_buffers


def test_pool_whose_rows_lie_far_apart_after_one_that_is_dense() -> None:
    """Their stride takes 64 bits, which the kernel must have been compiled for."""
    mode, filled = ForwardMode.DECODE, []
    for pool in (REQ_TO_TOKEN, far_apart(REQ_TO_TOKEN.clone(), BEYOND_31_BITS), REQ_TO_TOKEN):
        target = step_buffers(mode, 2, 64)
        arguments = [pool if argument is REQ_TO_TOKEN else argument for argument in fill_arguments(mode, target)]
        metadata.fill_metadata(*arguments)
        filled.append(target.page_table_1)
    assert torch.equal(filled[0], filled[1])
    assert torch.equal(filled[0], filled[2])
    assert filled[0].any()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="compiled code tells by itself")
def test_variant_that_does_not_tell_launches_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the second launch would run what was compiled for the first."""
    monkeypatch.setattr(metadata, "is_wide", lambda number: False)
    monkeypatch.setattr(metadata, "_fill", Launcher(metadata._fill.kernel))
    mode = ForwardMode.DECODE
    arguments = fill_arguments(mode, step_buffers(mode, 2, 64))
    metadata.fill_metadata(*arguments)
    far = far_apart(REQ_TO_TOKEN.clone(), BEYOND_31_BITS)
    with pytest.raises(
        TypeError, match=r"^fill_metadata_kernel: req_to_token_stride is of 64 bits, and was of 32 bits when"
    ):
        metadata.fill_metadata(*(far if argument is REQ_TO_TOKEN else argument for argument in arguments))


def test_signature_is_types_and_constants() -> None:
    names = expand_seqlens_kernel.arg_names
    lens = torch.zeros(4, dtype=torch.int32)
    args: list[object] = [1] * len(names)
    args[:3] = lens, lens, lens.long()
    first = signature(expand_seqlens_kernel, tuple(args))
    assert first[:4] == (*["a pointer to torch.int32"] * 2, "a pointer to torch.int64", "of 32 bits")
    assert first[-1] == 1  # a tile's size
    _check(expand_seqlens_kernel, first, signature(expand_seqlens_kernel, (lens, lens, lens.long(), 7, *args[4:])))
    for number, other, told in (
        (1, lens.long(), "seq_lens is a pointer to torch.int64, and was a pointer to torch.int32"),
        (3, -(1 << 31) - 1, f"{names[3]} is of 64 bits, and was of 32 bits"),
        (-1, 2, f"{names[-1]} is 2, and was 1"),
    ):
        changed = [*args]
        changed[number] = other
        with pytest.raises(TypeError, match=told):
            _check(expand_seqlens_kernel, first, signature(expand_seqlens_kernel, tuple(changed)))


@triton.jit
def specialised(cells: tl.tensor, count: tl.tensor, flag: tl.tensor, scale: tl.tensor) -> None: ...


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["cells"])
def told_not_to(cells: tl.tensor, count: tl.tensor, flag: tl.tensor, scale: tl.tensor) -> None: ...


@pytest.mark.skipif(DEVICE.type == "cuda", reason="compiled code tells by itself")
def test_what_a_kernel_does_not_forbid_triton_to_look_at_is_part_of_a_signature() -> None:
    cells = torch.zeros(8)
    assert cells.data_ptr() % 16 == 0
    plain, aligned = "a pointer to torch.float32", "a pointer to torch.float32, a multiple of 16"
    assert signature(specialised, (cells, 32, True, 16.0)) == (aligned, "of 32 bits, a multiple of 16", "bool", "float")
    assert signature(specialised, (cells[1:], 1, True, 1.0)) == (plain, "of 32 bits, and 1", "bool", "float")
    assert signature(specialised, (cells[4:], 7, None, 0.5)) == (aligned, "of 32 bits", "NoneType", "float")
    forbidden = (plain, "of 32 bits", "of 32 bits, and 1", "float")
    assert signature(told_not_to, (cells, 32, 1, 0.5)) == signature(told_not_to, (cells[1:], 1, 1, 0.5)) == forbidden


@pytest.mark.skipif(DEVICE.type == "cuda", reason="compiled code tells by itself")
@pytest.mark.parametrize(("name", "width", "k"), [("k", 32, 2), ("logits_stride", 30, 1)])
def test_argument_that_triton_may_look_at(name: str, width: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second launch would run what was compiled for one key a row, or for rows that start on 16 numbers."""
    kept = [other for other in topk_kernel.kwargs["do_not_specialize"] if other != name]
    monkeypatch.setitem(topk_kernel.kwargs, "do_not_specialize", kept)
    monkeypatch.setitem(topk_kernel.kwargs, "do_not_specialize_on_alignment", kept)
    monkeypatch.setattr(topk, "_topk", Launcher(topk_kernel))
    lengths = torch.tensor([20, 3, 7])
    topk.topk_indices(torch.randn(3, 32), lengths, 1)
    with pytest.raises(TypeError, match=f"^topk_kernel: {name} is of 32 bits, and was of 32 bits, "):
        topk.topk_indices(torch.randn(3, width), lengths, k)


def test_floats_and_flags_are_kinds_of_their_own() -> None:
    names = store_cache_kernel.arg_names
    kinds = [signature(store_cache_kernel, (value, *[0] * (len(names) - 1)))[0] for value in (1.5, True, 1, None)]
    assert kinds == ["float", "bool", "of 32 bits", "NoneType"]
