"""The cured interpreter computes what the plain one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from nsa_oracle.harness.interpreter.speed import deep_stack

PROGRAM = """
import torch, triton, triton.language as tl
from nsa_oracle.harness.interpreter import speed as interpreter
if {cured}:
    interpreter.speed_up()
    interpreter.speed_up()

@triton.jit
def halve(x):
    return tl.where(x % 2 == 0, x // 2, x)

@triton.jit
def kernel(source, target, count, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.load(source + lanes, mask=lanes < count, other=0)
    sums = tl.cumsum(halve(numbers), 0) + tl.sum(numbers.to(tl.int64), 0) + tl.max(numbers, 0)
    pairs = numbers[:, None] * 2 + numbers[None, :].to(tl.int64) * 2 - (1 - numbers)[None, :]
    sums += tl.sum((pairs > 0).to(tl.int32) * True - (0.0 - numbers * 0.5 < -0.0).to(tl.int32), 1)
    sums += tl.sum((numbers & 1) * (numbers[:, None] // 3), 1) - (2 - numbers) // 2 * (numbers >= 1)
    floats = numbers.to(tl.float32)
    zeros = (floats * 0.0).to(tl.int32, bitcast=True) ^ (floats * -0.0).to(tl.int32, bitcast=True)
    halves = floats.to(tl.float16) * 0.1 + floats.to(tl.float16)
    floats = floats / 3.0 + floats * 1 - floats * 1.0 + halves
    sums += (zeros >> 31) * 1000 + floats.to(tl.int32, bitcast=True) % 1009 + (numbers + 1.0).to(tl.int32) * 7
    tl.store(target + lanes, sums.to(tl.int32), mask=lanes < count)

source = torch.arange(-40, 60, dtype=torch.int32)
target = torch.zeros_like(source)
kernel[(4,)](source, target, 100, BLOCK=32)
print(target.tolist())
"""


def test_same_numbers_as_the_plain_interpreter(tmp_path: Path) -> None:
    """In processes of their own, since the cure cannot be undone. Triton reads kernels from files."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = []
    for cured in (True, False):
        program = tmp_path / f"cured_{cured}.py"
        program.write_text(PROGRAM.format(cured=cured))
        done = subprocess.run(
            [sys.executable, str(program)], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        printed.append(done.stdout)
    assert len(printed[0].split()) == 100
    assert printed[0] == printed[1]


def test_deep_stack_keeps_the_function() -> None:
    @deep_stack
    def add(a: int, *, b: int = 2) -> torch.Tensor:
        """Docstring."""
        return torch.tensor(a + b)

    assert add(1).item() == 3
    assert add(1, b=4).item() == 5
    assert add.__doc__ == "Docstring."
    assert add.__code__.co_stacksize >= 1 << 16
