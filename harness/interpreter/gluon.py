"""Runs kernels written in Gluon without a GPU, on top of Triton's interpreter, which does not support Gluon.

This module implements the functions of Gluon with ``interpreter.gluon_machine``, Triton's interpreter and
``interpreter.ptx``. Layouts, registers and the warps of a partition are not modelled: a tensor is an array, and a
barrier among the threads of one partition, which act as one, does nothing.

``install`` makes the kernels of ``optimized/`` import this implementation. It covers the part of Gluon that they use;
any other name raises AttributeError. Import this module late: importing Triton fixes how kernels run.
"""

from __future__ import annotations

import functools
import importlib.abc
import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.experimental
import triton.language as tl
import triton.language.extra
from triton.language.extra import cuda
from triton.runtime import interpreter

from nsa_oracle.harness.compiled import tier
from nsa_oracle.harness.interpreter import ptx
from nsa_oracle.harness.interpreter.gluon_machine import (
    Allocation,
    Barrier,
    Copy,
    Descriptor,
    GluonError,
    Product,
    Program,
    numpy_type,
    tensor,
)

THREADS_PER_WARP = 32
POISON_BYTE = 0xFF  # repeated, it gives NaN in bf16 and float32
GLUON = "triton.experimental.gluon"
CUDA = "triton.language.extra.cuda"
_PACKAGE = "nsa_oracle.optimized.kernels."
KERNELS = frozenset(_PACKAGE + name for name in ("attention_hopper", "gluon_names", "indexer_hopper"))

_program: Program | None = None


def _running() -> Program:
    assert _program is not None, "outside a launch"
    return _program


# The language.


class Layout:
    """Any layout of Gluon; ignored."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...


class _Language(ModuleType):
    """A stand-in for a module of Gluon. Some names that it does not define come from ``triton.language``."""

    OF_TRITON = (
        "int1", "int32", "int64", "uint8", "float16", "float32", "bfloat16", "pointer_type", "constexpr", "tensor",
        "tuple", "load", "store", "where", "maximum", "minimum", "max", "sum", "abs", "zeros_like", "reshape",
        "permute", "join", "broadcast", "multiple_of", "max_contiguous", "fma", "program_id", "num_programs",
    )  # fmt: skip
    LAYOUTS = (
        "NVMMADistributedLayout", "NVMMASharedLayout", "BlockedLayout", "SliceLayout", "SwizzledSharedLayout",
        "DotOperandLayout", "DistributedLinearLayout",
    )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        if name in self.OF_TRITON:
            return getattr(tl, name)  # looked up each time: a launch replaces some
        if name in self.LAYOUTS:
            return Layout
        raise AttributeError(f"the Gluon interpreter does not implement {self.__name__}.{name}")


def _arange(start: Any, end: Any, layout: Any = None) -> Any:
    return tl.arange(start, end)


def _full(shape: Sequence[Any], value: Any, dtype: Any, layout: Any = None) -> Any:
    return tl.full([operator.index(size) for size in shape], value, dtype)


def _zeros(shape: Sequence[Any], dtype: Any, layout: Any = None) -> Any:
    return _full(shape, 0, dtype)


def _convert_layout(value: Any, layout: Any, assert_trivial: Any = False) -> Any:
    return value


def _static_range(*limits: Any) -> list[Any]:
    return [tl.constexpr(number) for number in range(*map(operator.index, limits))]


def _num_warps() -> int:
    return _running().current.warps


def _barrier() -> None: ...


def _allocate_shared_memory(dtype: Any, shape: Sequence[Any], layout: Any) -> Descriptor:
    allocation = Allocation()
    _running().allocations.append(allocation)
    data = np.empty([operator.index(size) for size in shape], numpy_type(dtype))
    data.view(np.uint8).fill(POISON_BYTE)
    return Descriptor(allocation, data, dtype)


def _warp_specialize(work: Sequence[Any], warps: Sequence[Any], registers: Sequence[Any]) -> Any:
    return _running().specialize(work, [operator.index(count) for count in warps])


def _inline_asm(asm: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    is_tuple = isinstance(dtype, tuple)
    dtypes = dtype if is_tuple else (dtype,)
    results = ptx.run(asm, [arg.handle.data for arg in args], len(dtypes))
    tensors = tuple(tensor(data.view(numpy_type(of)), of) for data, of in zip(results, dtypes, strict=True))
    return tensors if is_tuple else tensors[0]


def _fence_async_shared() -> None:
    for allocation in _running().allocations:
        allocation.unfenced.clear()


def _warpgroup_mma(a: Any, b: Descriptor, acc: Any, *, use_acc: Any = True, is_async: Any = False) -> Any:
    for operand in (a, b):
        if isinstance(operand, Descriptor) and operand.buffer in operand.allocation.unfenced:
            raise GluonError("the matrix units read shared memory that was written after the last fence")
    product = Product(a, b, acc if use_acc else None)
    if is_async:
        _running().current.products.append(product)
        return product
    return product.value()


def _warpgroup_mma_wait(num_outstanding: Any = 0, deps: Sequence[Any] = ()) -> Any:
    partition, left = _running().current, operator.index(num_outstanding)
    partition.products = partition.products[-left:] if left else []
    values = tuple(
        dep.value() if isinstance(dep, Product) and not any(dep is other for other in partition.products) else dep
        for dep in deps
    )
    return values[0] if len(values) == 1 else values


def _barrier_of(descriptor: Descriptor) -> Barrier:
    barrier = descriptor.allocation.barriers.get(descriptor.buffer)
    if barrier is None:
        raise GluonError("an mbarrier is used that was not initialised")
    return barrier


def _mbarrier_init(barrier: Descriptor, count: Any) -> None:
    barrier.allocation.barriers[barrier.buffer] = Barrier(operator.index(count), operator.index(count))


def _mbarrier_wait(barrier: Descriptor, phase: Any) -> None:
    _running().wait(_barrier_of(barrier), operator.index(phase))


def _mbarrier_arrive(barrier: Descriptor, *, count: Any = 1) -> None:
    _barrier_of(barrier).arrive(operator.index(count))
    _running().offer()


def _async_load(tile: Descriptor, pointers: Any, mask: Any = None) -> None:
    if mask is not None:
        pointers, mask = tl.broadcast(pointers, mask)
    if list(pointers.handle.data.shape) != tile.shape:
        raise GluonError(f"{pointers.type} does not fit a tile of {tile.shape}")
    copy = Copy(tile, pointers, mask)
    if _running().eager:
        copy.land()
    else:
        _running().current.copies.append(copy)


def _async_arrive(barrier: Descriptor, increment_count: Any = True) -> None:
    """Each thread of the partition arrives at the barrier once the partition's copies have landed."""
    program, target = _running(), _barrier_of(barrier)
    partition = program.current
    threads = partition.warps * THREADS_PER_WARP
    if increment_count:
        target.missing += threads
    target.late.append((partition.copies, threads))
    partition.copies = []
    if program.eager:
        target.land()
        program.offer()


def _commit_group() -> None:
    """The copies since the last group become a group."""
    partition = _running().current
    partition.groups.append(partition.copies)
    partition.copies = []


def _wait_group(num_outstanding: Any = 0) -> None:
    """Waits for all groups but the last ``num_outstanding``. Copies that are in no group are not waited for."""
    partition = _running().current
    ended = len(partition.groups) - operator.index(num_outstanding)
    for group in partition.groups[: max(0, ended)]:
        for copy in group:
            copy.land()
    del partition.groups[: max(0, ended)]


def _jit(function: Any = None, **options: Any) -> Any:
    return _decorated(function) if function is not None else functools.partial(_decorated, **options)


def _decorated(function: Callable[..., Any], **options: Any) -> Any:
    """Wraps a function for Triton's interpreter, so that each program of a launch is a ``Program``."""

    class Kernel(interpreter.InterpretedFunction):  # type: ignore[misc]
        def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            warps = options.pop("num_warps", 4)
            executor = interpreter.GridExecutor(_as_program(self.rewrite(), warps), self.arg_names, grid, [])
            executor.constexprs = [
                name for name, kind in function.__annotations__.items() if str(kind).endswith("constexpr")
            ]
            executor(*args, **options)

    return Kernel(function, **options)


def _as_program(body: Callable[..., Any], warps: int) -> Callable[..., None]:
    """Wraps a kernel to run as a ``Program`` of ``warps`` warps; every second one is eager.

    The interpreter looks for Triton's language in the globals of the function that it launches. For the wrapper these
    are the globals of this module.
    """

    @functools.wraps(body)
    def program(**args: Any) -> None:
        global _program
        tier.gluon_programs += 1
        _program = Program(warps, eager=interpreter.interpreter_builder.grid_idx[0] % 2 == 0)
        try:
            with _as_gluon_has_it():
                body(**args)
        finally:
            _program = None

    program.__signature__ = inspect.signature(body)  # type: ignore[attr-defined]
    return program


@contextmanager
def _as_gluon_has_it() -> Iterator[None]:
    """Give tensor types a layout, as in Gluon, and round casts to bf16, which the interpreter truncates."""
    builder: Any = interpreter.interpreter_builder
    cast = builder.cast_impl

    def cast_and_round(source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            bits = ptx.to_bf16(source.data)
            return interpreter.TensorHandle(bits, target.scalar)
        return cast(source, target)

    builder.cast_impl = cast_and_round
    tl.block_type.layout = None
    try:
        yield
    finally:
        del builder.cast_impl, tl.block_type.layout


def _module(name: str, **members: Any) -> _Language:
    module = _Language(name)
    vars(module).update(members)
    return module


def _modules() -> dict[str, ModuleType]:
    """The modules that replace Gluon, by name."""
    async_copy = _module(
        "async_copy",
        async_load=_async_load,
        async_copy_global_to_shared=_async_load,
        mbarrier_arrive=_async_arrive,
        commit_group=_commit_group,
        wait_group=_wait_group,
    )
    mbarrier = _module(
        "mbarrier", init=_mbarrier_init, wait=_mbarrier_wait, arrive=_mbarrier_arrive, MBarrierLayout=Layout
    )
    hopper = _module(
        "hopper",
        fence_async_shared=_fence_async_shared,
        mbarrier=mbarrier,
        warpgroup_mma=_warpgroup_mma,
        warpgroup_mma_wait=_warpgroup_mma_wait,
    )
    language = _module(
        "language",
        shared_memory_descriptor=Descriptor,
        arange=_arange,
        full=_full,
        zeros=_zeros,
        convert_layout=_convert_layout,
        static_range=_static_range,
        num_warps=_num_warps,
        barrier=_barrier,
        thread_barrier=_barrier,
        allocate_shared_memory=_allocate_shared_memory,
        warp_specialize=_warp_specialize,
        inline_asm_elementwise=_inline_asm,
    )
    return {
        CUDA: _module("cuda", **{**vars(cuda), "gdc_launch_dependents": _barrier}),
        GLUON: _module("gluon", jit=_jit, language=language),
        f"{GLUON}.language": language,
        f"{GLUON}.language.nvidia": _module("nvidia"),
        f"{GLUON}.language.nvidia.ampere": _module("ampere", async_copy=async_copy),
        f"{GLUON}.language.nvidia.hopper": hopper,
    }


@contextmanager
def stand_ins() -> Iterator[None]:
    """Modules imported inside this context import the replacements instead of Gluon."""
    replacements = _modules()
    packages = {triton.experimental: ("gluon", GLUON), triton.language.extra: ("cuda", CUDA)}
    before = {name: sys.modules.pop(name, None) for name in replacements}
    with ExitStack() as stack:
        for package, (attribute, name) in packages.items():
            stack.enter_context(patch.object(package, attribute, replacements[name], create=True))
        sys.modules.update(replacements)
        try:
            yield
        finally:
            for name in replacements:
                del sys.modules[name]
            sys.modules.update({name: module for name, module in before.items() if module is not None})


def as_installed(name: str) -> AbstractContextManager[None]:
    """The context in which to execute the module ``name``: ``stand_ins`` for Gluon kernels after ``install``."""
    is_installed = any(isinstance(finder, _Finder) for finder in sys.meta_path)
    return stand_ins() if name in KERNELS and is_installed else nullcontext()


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        with stand_ins():
            super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname in KERNELS else None
        if spec is not None:
            assert spec.origin is not None
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def install() -> None:
    """Make ``optimized/`` interpret its Gluon kernels. Call before importing it; repeated calls do nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
