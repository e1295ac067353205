"""Which lines of a kernel are in its compiled code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_oracle.harness.mutants.mutants import TREE, tree_sources
from nsa_oracle.harness.mutants.nursery import compiled_lines


def test_compiled_code_reports_its_lines(tmp_path: Path) -> None:
    source = tmp_path / "kernel.source"
    source.write_text(
        f"""#loc = loc("{TREE}/kernels/topk.py":12:0)
        %0 = tt.load %1 : !tt.ptr<i32> loc("score"(#loc1))
        #loc1 = loc("{TREE}/kernels/fp8.py":345:18)
        #loc2 = loc("/elsewhere/triton/language/standard.py":7:4)
        #loc3 = loc(unknown)"""
    )
    assert compiled_lines(source) == {("kernels/topk.py", 12), ("kernels/fp8.py", 345)}


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from nsa_oracle.harness.mutants.nursery import _note_kernels
from nsa_oracle.optimized.kernels.attention import sparse_mla_combine_kernel as kernel

pointers = dict(zip(("out", "lse", "accs", "stats"), ("*bf16", "*fp32", "*fp32", "*fp32")))
signature = {**pointers, "num_chunks": "i32", "scale": "fp32", "scale_log2": "fp32"}
constants = {"HEADS": 16, "RANK": 64, "EARLY": %s}
reach = set()
_note_kernels(reach)
compile(ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants), GPUTarget("cuda", 90, 32))
print(sorted(line for file, line in reach if file == "kernels/attention.py"))
"""


@pytest.mark.parametrize("early", [False, True])
def test_lines_of_the_branch_that_was_compiled(early: bool, tmp_path: Path) -> None:
    """What Triton itself says, of a kernel that is compiled for a GPU that is not there."""
    lines = tree_sources()["kernels/attention.py"].splitlines()
    wait = next(number for number, line in enumerate(lines, start=1) if "gdc_wait()" in line)
    reported = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE % early],
        cwd=TREE.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    reached = json.loads(reported.stdout)
    assert (wait in reached) == early
    assert wait - 1 not in reached  # the branch itself is decided while compiling
    assert len(reached) > 20
