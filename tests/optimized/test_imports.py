"""Whatever of ``optimized/`` is imported first, Triton is not imported before ``optimized.kernels`` has prepared it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa_oracle import optimized

ROOT = Path(__file__).parents[2]
PACKAGE = Path(optimized.__path__[0])
PROGRAM = """
import os, torch
{before}
import {module}
print(os.environ.get("TRITON_INTERPRET"))
import triton.language as tl
print(type(tl.zeros).__name__)
"""


def after_import(module: str, interpret: str | None = None, before: str = "") -> list[str]:
    """TRITON_INTERPRET and the type of Triton's functions, in a new process that starts with ``interpret``."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret is not None:
        environment["TRITON_INTERPRET"] = interpret
    program = PROGRAM.format(module=module, before=before)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return done.stdout.split()


def imported_at_head(module: ast.Module) -> set[str]:
    """Top-level packages that a module imports outside functions."""
    names = set()
    for statement in module.body:
        match statement:
            case ast.Import(names=aliases):
                names |= {alias.name.partition(".")[0] for alias in aliases}
            case ast.ImportFrom(module=str(name)):
                names.add(name.partition(".")[0])
    return names


def test_only_kernels_import_triton_at_their_head() -> None:
    files = [*PACKAGE.glob("*.py"), PACKAGE / "kernels" / "__init__.py"]
    heads = {file.name: imported_at_head(ast.parse(file.read_text())) for file in files}
    assert len(heads) > 10
    assert [name for name, imported in heads.items() if "triton" in imported] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
@pytest.mark.parametrize("module", ["nsa_oracle.optimized.attention", "nsa_oracle.optimized.kernels.topk"])
def test_without_a_gpu_kernels_are_interpreted(module: str) -> None:
    assert after_import(module) == ["1", "InterpretedFunction"]


def test_a_choice_that_was_made_is_kept() -> None:
    assert after_import("nsa_oracle.optimized.attention", interpret="0") == ["0", "JITFunction"]


def test_with_a_gpu_nothing_is_set() -> None:
    found = after_import("nsa_oracle.optimized.kernels", before="torch.cuda.is_available = lambda: True")
    assert found == ["None", "JITFunction"]


def test_switches_are_imported_without_a_look_for_a_gpu() -> None:
    """Such a look initialises CUDA; a process that imports only the switches may still choose its GPU, or fork."""
    found = after_import("nsa_oracle.optimized.optimizations", before="torch.cuda.is_available = None")
    assert found[0] == "None"
