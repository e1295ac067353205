"""Mutants of our own making."""

from __future__ import annotations

from pathlib import Path

from nsa_oracle.harness.mutants.mutants import Mutant, mutants_of

STORE = Path("kernels/page_table.py").as_posix()


def a_mutant(line: str = "x = a < b") -> Mutant:
    return next(m for m in mutants_of("m.py", f"def f(a, b):\n    {line}\n") if m.edit.operator == "boundary-shifted")
