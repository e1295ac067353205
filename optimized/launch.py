"""Launches a Triton kernel without asking Triton, each time, which compiled variant the arguments select.

Triton derives the variant from every argument at every launch, which costs more host time than the launch itself.
Our kernels specialise on nothing but the dtypes of a few tensors and some flags, so the launch site names those.
Compiled code takes its arguments by position; launch sites name them, and ``Launcher`` puts them in order.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NewType

import torch

Signature = tuple[Hashable, ...]
# Products and sums may be contracted to fused multiply-adds. Said at each launch, because a version of Triton may
# change its default (TRITON_DEFAULT_FP_FUSION), and with it bits.
FUSED = True

# Values of one group of a kernel's parameters, in the order of its signature. Types of their own, so that mypy refuses
# one group in the place of another.
Tensors = NewType("Tensors", tuple[Any, ...])
Numbers = NewType("Numbers", tuple[Any, ...])
Constants = NewType("Constants", tuple[Any, ...])


class Launcher:
    """One kernel. The first launch of each variant goes through Triton, later ones call what it compiled.

    A kernel's parameters come in three groups: tensors, numbers, and compile-time constants (``constexpr``). The
    methods ``tensors``, ``numbers`` and ``constants`` take the values of one group as keyword arguments, named as in
    the kernel's signature and in any order, and put them in its order. They raise TypeError unless each parameter of
    the group is named once.

    Triton's interpreter compiles nothing and accepts any arguments. There, each launch is compared with the first one
    of its variant instead, since code that was compiled for the first would run for all of them.
    """

    tensors: Callable[..., Tensors]
    numbers: Callable[..., Numbers]
    constants: Callable[..., Constants]

    def __init__(self, kernel: Any, first_number: str) -> None:
        """``first_number``: the parameter at which the tensors end and the numbers begin."""
        self.kernel = kernel
        self._compiled: dict[tuple[Hashable, ...], Any] = {}  # or the first launch's signature, in the interpreter
        parameters = _constants(kernel.fn)
        names = list(parameters)
        numbers_begin, constants_begin = names.index(first_number), list(parameters.values()).index(True)
        self.tensors = _by_keyword(names[:numbers_begin])
        self.numbers = _by_keyword(names[numbers_begin:constants_begin])
        self.constants = _by_keyword(names[constants_begin:])

    def __call__(
        self,
        programs: int,
        variant: tuple[Hashable, ...],
        tensors: Tensors,
        numbers: Numbers,
        constants: Constants,
        **options: int,
    ) -> None:
        """Launch ``programs`` instances. ``variant``: all that selects compiled code: dtypes, flags, wide strides.

        The first tensor is on the device to use. ``options``: Triton's ``num_warps`` and ``num_stages``; they select
        compiled code as well, so always name them in the same order.
        Raises TypeError, in the interpreter, if compiled code of the variant's first launch would not fit this one.
        """
        compiled = self._compiled.get(key := (tensors[0].get_device(), *variant, *options.values()))
        args = (*tensors, *numbers, *constants)
        if compiled is None:
            compiled = self.kernel[(programs,)](*args, enable_fp_fusion=FUSED, **options)
            self._compiled[key] = signature(self.kernel, args) if compiled is None else compiled
        elif type(compiled) is tuple:
            _check(self.kernel, compiled, signature(self.kernel, args))
            self.kernel[(programs,)](*args, enable_fp_fusion=FUSED, **options)
        else:
            compiled[(programs, 1, 1)](*args)


def _by_keyword(names: Sequence[str]) -> Callable[..., Any]:
    """A function that takes one keyword-only argument for each of ``names`` and returns their values in this order.

    Generated, as ``namedtuple`` generates its constructor, because launch time is host time: for the 42 arguments of
    ``fill_metadata_kernel`` these functions cost 0.4 us in all, where a named tuple costs 2.4 us and a dict 1.5 us. And
    one function per group, not per kernel, because Python looks for each keyword among all parameters in turn: one
    function of 42 costs 2.1 us.
    """
    parameters = ", ".join(names)
    function: Callable[..., Any] = eval(f"lambda *, {parameters}: ({parameters},)", {})
    return function


def signature(kernel: Any, args: tuple[Any, ...]) -> Signature:
    """What compiled code depends on: dtypes, the width of each integer, and the value of each ``constexpr``.

    Also the properties of values that Triton specialises on, unless the kernel disables that.
    """
    signs = []
    for (name, constant), arg in zip(_constants(kernel.fn).items(), args, strict=True):
        signs.append(arg if constant else _kind(arg) + _speciality(kernel, name, arg))
    return tuple(signs)


def _speciality(kernel: Any, name: str, arg: Any) -> str:
    """What Triton specialises on beside the type, as text. Empty outside the interpreter, where nothing is checked."""
    options = getattr(kernel, "kwargs", None)
    if options is None or isinstance(arg, bool) or name in (options.get("do_not_specialize") or ()):
        return ""
    if isinstance(arg, torch.Tensor):
        number = arg.data_ptr()
    elif isinstance(arg, int):
        number = arg
        if number == 1:
            return ", equal to 1"
    else:
        return ""
    on_alignment = name not in (options.get("do_not_specialize_on_alignment") or ())
    return ", divisible by 16" if on_alignment and number % 16 == 0 else ""


def _check(kernel: Any, first: Signature, now: Signature) -> None:
    for name, before, after in zip(_constants(kernel.fn), first, now, strict=True):
        if before != after:
            raise TypeError(
                f"{kernel.fn.__name__}: {name} is {after}, but was {before} in the first launch of this variant; "
                "code compiled for that launch would not fit"
            )


@functools.cache
def _constants(function: Callable[..., Any]) -> dict[str, bool]:
    """For each parameter of a kernel, by name: whether it is a ``constexpr``."""
    parameters = inspect.signature(function).parameters
    return {name: str(parameter.annotation).endswith("constexpr") for name, parameter in parameters.items()}


def _kind(arg: Any) -> str:
    """The type that Triton gives an argument, as text."""
    if isinstance(arg, torch.Tensor):
        return f"a pointer to {arg.dtype}"
    if isinstance(arg, int) and not isinstance(arg, bool):
        return "a 32-bit integer" if -(1 << 31) <= arg < 1 << 31 else "a 64-bit integer"
    return type(arg).__name__


def is_wide(number: int) -> bool:
    """Whether ``number`` needs 64 bits, which changes the signature of a compiled kernel."""
    return number > 0x7FFFFFFF


def is_dense(*tensors: torch.Tensor) -> bool:
    """Whether the last dimension of each tensor is contiguous; the other dimensions may be strided."""
    return all(tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 for tensor in tensors)


@functools.cache
def is_hopper() -> bool:
    """Whether kernels are compiled for a Hopper GPU."""
    import triton  # late: see ``optimized.kernels``

    # Asks Triton, not torch: kernels are also compiled for GPUs that are not present.
    return not _is_interpreted() and triton.runtime.driver.active.get_current_target().arch == 90


def runs_gluon(kernel: Any) -> bool:
    """Whether a Gluon kernel for Hopper can run here: on a Hopper GPU, or interpreted.

    Triton's interpreter does not support Gluon. A Gluon interpreter, where one is installed, has replaced the kernel by
    an object of another type.
    """
    return is_hopper() or (_is_interpreted() and not _is_of_triton(kernel))


@functools.cache
def _is_interpreted() -> bool:
    import triton

    interpreted: bool = triton.knobs.runtime.interpret
    return interpreted


def _is_of_triton(kernel: Any) -> bool:
    from triton.runtime.jit import JITFunction

    return isinstance(kernel, JITFunction)
