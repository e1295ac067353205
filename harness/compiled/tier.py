"""Whether kernels of this process are compiled for the CPU, and which of them are not."""

from __future__ import annotations

import sys

gluon_programs = 0  # of kernels in Gluon, which are interpreted even where others are compiled
interpreted: dict[str, str] = {}  # by the name of a kernel of which a launch was left to the interpreter: why


def is_installed() -> bool:
    """Whether kernels of this process are compiled."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    return interpreter is not None and hasattr(interpreter.GridExecutor.__call__, "compiles")
