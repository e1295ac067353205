"""Runs a block of inline PTX on arrays, one element per thread; implements the instructions that our kernels use.

Register declarations are ignored: a register holds the last array written to it, with the width of that write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


class PtxError(NotImplementedError):
    """An instruction that is not implemented, or a read of a register that was not written. The message is one line."""


def run(asm: str, inputs: Sequence[Array], outputs: int) -> list[Array]:
    """Run ``asm`` and return its first ``outputs`` operands as uint32 arrays. The other operands are ``inputs``.

    All inputs have the same shape. Raises PtxError for an instruction or an operand that is not implemented.
    """
    registers: dict[str, Array] = {f"${outputs + number}": array for number, array in enumerate(inputs)}
    for statement in asm.strip().strip("{}").split(";"):
        if statement.strip():
            _step(" ".join(statement.split()), registers)
    return [registers[f"${number}"].view(np.uint32) for number in range(outputs)]


def _step(statement: str, registers: dict[str, Array]) -> None:
    guard, statement = re.fullmatch(r"(?:@(\S+) )?(.*)", statement).groups()  # type: ignore[union-attr]
    name, _, rest = statement.partition(" ")
    operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^\s,]+", rest)
    if name == ".reg" or name.startswith("prefetch."):
        return  # no effect on values: a prefetch accepts any address
    if guard is not None:
        raise PtxError(f"the PTX interpreter does not implement guarded {name}")
    if name == "mov.b32" and operands[0].startswith("{"):
        low, high = _names(operands[0])
        pairs = _read(operands[1], registers).view(np.uint32)
        registers[low], registers[high] = (pairs & 0xFFFF).astype(np.uint16), (pairs >> 16).astype(np.uint16)
    elif name in OPERATIONS:
        registers[operands[0]] = OPERATIONS[name](*(_read(operand, registers) for operand in operands[1:]))
    else:
        raise PtxError(f"the PTX interpreter does not implement {name}")


def _names(group: str) -> list[str]:
    return [name.strip() for name in group.strip("{}").split(",")]


def _read(operand: str, registers: dict[str, Array]) -> Array:
    if operand in registers:
        return registers[operand]
    if not re.fullmatch(r"-?(0x)?[0-9a-fA-F]+", operand):
        raise PtxError(f"the PTX interpreter finds no value in {operand}: it was not written")
    shape = next(iter(registers.values())).shape
    return np.full(shape, int(operand, 0), np.int64).astype(np.uint32)


def _pair(low: Array, high: Array) -> Array:
    """Packs two 16-bit words into one 32-bit word."""
    return low.view(np.uint16).astype(np.uint32) | high.view(np.uint16).astype(np.uint32) << 16


def _from_e4m3_pair(pairs: Array) -> Array:
    bytes_ = np.stack([pairs & 0xFF, pairs >> 8]).astype(np.uint8)
    halves = torch.from_numpy(bytes_).view(torch.float8_e4m3fn).to(torch.float16).numpy()
    return _pair(halves[0], halves[1])


def to_bf16(x: Array) -> Array:
    """The bits, as uint16, of float32 ``x`` rounded to bf16, to nearest even."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


OPERATIONS: dict[str, Callable[..., Array]] = {
    "mov.u32": lambda x: x,
    "setp.ne.s32": lambda a, b: a.view(np.int32) != b.view(np.int32),
    "cvt.rn.f16x2.e4m3x2": _from_e4m3_pair,
    "cvt.f32.f16": lambda x: x.view(np.float16).astype(np.float32),
    "mul.rn.f32": lambda a, b: a.view(np.float32) * b.view(np.float32),
    "cvt.rn.bf16x2.f32": lambda high, low: _pair(to_bf16(low), to_bf16(high)),
}
