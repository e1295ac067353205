"""A mask made of two comparisons loads and stores under every supported interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch, triton, triton.language as tl
from nsa_oracle.harness.interpreter.masks import accept_integer_masks
accept_integer_masks()
accept_integer_masks()

@triton.jit
def kernel(source, target, row, rows, count, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    mask = (row < rows) & (lanes < count)
    tl.store(target + lanes, tl.load(source + lanes, mask=mask, other=7), mask=mask | (lanes == 7))

source, target = torch.arange(8, dtype=torch.int32), torch.full((8,), -1, dtype=torch.int32)
kernel[(1,)](source, target, 0, 1, 5, BLOCK=8)
print(target.tolist())
"""


def test_a_mask_of_two_comparisons_is_accepted(tmp_path: Path) -> None:
    """In a process of its own, since the cure cannot be undone. Triton reads kernels from files."""
    program = tmp_path / "masks.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "[0, 1, 2, 3, 4, -1, -1, 7]\n", done.stderr
