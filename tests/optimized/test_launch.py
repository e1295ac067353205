"""Every argument reaches the parameter that it is named for, and every launch the compiled code that fits it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch
import triton
import triton.language as tl

from nsa_oracle import optimized
from nsa_oracle.harness.memory.far_apart import BEYOND_31_BITS, far_apart
from nsa_oracle.optimized import attention, indexer, metadata, topk
from nsa_oracle.optimized.kernels.kv_cache import store_cache_kernel
from nsa_oracle.optimized.kernels.lengths import expand_seqlens_kernel
from nsa_oracle.optimized.kernels.topk import topk_kernel
from nsa_oracle.optimized.launch import Launcher, _check, signature
from nsa_oracle.reference.types import ForwardMode
from tests.support.launches import DEVICE, REQ_TO_TOKEN, fill_arguments, step_buffers

MODULES = [
    importlib.import_module(found.name) for found in pkgutil.iter_modules(optimized.__path__, "nsa_oracle.optimized.")
]
LAUNCHERS = {
    f"{module.__name__}.{name}": value
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, Launcher)
}
GROUPS = ("tensors", "numbers", "constants")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_groups_of_arguments_are_the_signature_of_the_kernel(name: str) -> None:
    """Each group takes its parameters by name, in any order, and returns them in the order of the signature."""
    launcher = LAUNCHERS[name]
    names = list(inspect.signature(launcher.kernel.fn).parameters)
    arguments: list[str] = []
    for group in GROUPS:
        function = getattr(launcher, group)
        of_group = inspect.signature(function).parameters
        assert {parameter.kind for parameter in of_group.values()} == {inspect.Parameter.KEYWORD_ONLY}
        arguments += function(**{name: name for name in reversed(of_group)})
    assert arguments == names


@pytest.mark.parametrize(
    "kernels",
    [
        (attention._attend, attention._attend_on_hopper),
        (indexer._indexer_logits, indexer._indexer_logits_on_hopper),
    ],
)
def test_the_kernels_of_a_stage_have_the_same_tensors_and_numbers(kernels: tuple[Launcher, Launcher]) -> None:
    """They are named for one and passed to either."""
    for group in ("tensors", "numbers"):
        of_each = [inspect.signature(getattr(one, group)) for one in kernels]
        assert of_each[0] == of_each[1]


def test_argument_that_is_missing_or_unknown() -> None:
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'lengths_stride'"):
        topk._filter.numbers(logits_stride=1, width=1, k=1, num_shares=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rows'"):
        topk._filter.numbers(logits_stride=1, lengths_stride=1, width=1, k=1, num_shares=1, rows=1)
    with pytest.raises(TypeError, match="positional argument"):
        topk._filter.constants(1, 2, 3)


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


@pytest.mark.skipif(DEVICE.type == "cuda", reason="only the interpreter checks this")
def test_variant_that_does_not_distinguish_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the second launch would run what was compiled for the first."""
    monkeypatch.setattr(metadata, "is_wide", lambda number: False)
    monkeypatch.setattr(metadata, "_fill", Launcher(metadata._fill.kernel, "packed_stride"))
    mode = ForwardMode.DECODE
    arguments = fill_arguments(mode, step_buffers(mode, 2, 64))
    metadata.fill_metadata(*arguments)
    far = far_apart(REQ_TO_TOKEN.clone(), BEYOND_31_BITS)
    message = "^fill_metadata_kernel: req_to_token_stride is a 64-bit integer, but was a 32-bit integer in the first"
    with pytest.raises(TypeError, match=message):
        metadata.fill_metadata(*(far if argument is REQ_TO_TOKEN else argument for argument in arguments))


def test_signature_is_types_and_constants() -> None:
    names = expand_seqlens_kernel.arg_names
    lens = torch.zeros(4, dtype=torch.int32)
    args: list[object] = [1] * len(names)
    args[:3] = lens, lens, lens.long()
    first = signature(expand_seqlens_kernel, tuple(args))
    assert first[:4] == (*["a pointer to torch.int32"] * 2, "a pointer to torch.int64", "a 32-bit integer")
    assert first[-1] == 1  # a tile's size
    _check(expand_seqlens_kernel, first, signature(expand_seqlens_kernel, (lens, lens, lens.long(), 7, *args[4:])))
    for number, other, message in (
        (1, lens.long(), "seq_lens is a pointer to torch.int64, but was a pointer to torch.int32"),
        (3, -(1 << 31) - 1, f"{names[3]} is a 64-bit integer, but was a 32-bit integer"),
        (-1, 2, f"{names[-1]} is 2, but was 1"),
    ):
        changed = [*args]
        changed[number] = other
        with pytest.raises(TypeError, match=message):
            _check(expand_seqlens_kernel, first, signature(expand_seqlens_kernel, tuple(changed)))


@triton.jit
def specialised(cells: tl.tensor, count: tl.tensor, flag: tl.tensor, scale: tl.tensor) -> None: ...


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["cells"])
def unspecialised(cells: tl.tensor, count: tl.tensor, flag: tl.tensor, scale: tl.tensor) -> None: ...


@pytest.mark.skipif(DEVICE.type == "cuda", reason="only the interpreter checks this")
def test_signature_has_what_triton_specialises_on_unless_the_kernel_disables_it() -> None:
    cells = torch.zeros(8)
    assert cells.data_ptr() % 16 == 0
    plain, aligned = "a pointer to torch.float32", "a pointer to torch.float32, divisible by 16"
    integer = "a 32-bit integer"
    multiple, one = f"{integer}, divisible by 16", f"{integer}, equal to 1"
    assert signature(specialised, (cells, 32, True, 16.0)) == (aligned, multiple, "bool", "float")
    assert signature(specialised, (cells[1:], 1, True, 1.0)) == (plain, one, "bool", "float")
    assert signature(specialised, (cells[4:], 7, None, 0.5)) == (aligned, integer, "NoneType", "float")
    forbidden = (plain, integer, one, "float")
    assert signature(unspecialised, (cells, 32, 1, 0.5)) == forbidden
    assert signature(unspecialised, (cells[1:], 1, 1, 0.5)) == forbidden


@pytest.mark.skipif(DEVICE.type == "cuda", reason="only the interpreter checks this")
@pytest.mark.parametrize(("name", "width", "k"), [("k", 32, 2), ("logits_stride", 30, 1)])
def test_argument_that_triton_specialises_on(name: str, width: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second launch would run what was compiled for one key a row, or for rows that start on 16 numbers."""
    kept = [other for other in topk_kernel.kwargs["do_not_specialize"] if other != name]
    monkeypatch.setitem(topk_kernel.kwargs, "do_not_specialize", kept)
    monkeypatch.setitem(topk_kernel.kwargs, "do_not_specialize_on_alignment", kept)
    monkeypatch.setattr(topk, "_topk", Launcher(topk_kernel, "logits_stride"))
    lengths = torch.tensor([20, 3, 7])
    topk.topk_indices(torch.randn(3, 32), lengths, 1)
    with pytest.raises(TypeError, match=f"^topk_kernel: {name} is a 32-bit integer, but was a 32-bit integer, "):
        topk.topk_indices(torch.randn(3, width), lengths, k)


def test_floats_and_flags_are_types_of_their_own() -> None:
    names = store_cache_kernel.arg_names
    kinds = [signature(store_cache_kernel, (value, *[0] * (len(names) - 1)))[0] for value in (1.5, True, 1, None)]
    assert kinds == ["float", "bool", "a 32-bit integer", "NoneType"]
